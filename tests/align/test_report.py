"""The report: its numbers are the run's, it stands alone, and no state of a run's folder breaks it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from align.charts import Series, balance_chart, histogram, line_chart, stacked_chart, tick_labels, ticks
from align.errors import UserError
from align.report import delta_text, duration, paired_change, write_report
from align.report_curves import CREDIT, DIVERSITY, FURTHER, KNOWN, credit_panels
from align.runfolder import metric_rows, read_run

FAKE = runpy.run_path(str(Path(__file__).parents[1] / "fake_run.py"))
write_fake_run = FAKE["write_fake_run"]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags with their attributes, text without tags, and whether every tag is closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "done")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report.html"))
    return tmp_path / "run"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_verdict_is_that_of_the_summary(run: Path):
    edit(
        run / "summary.json",
        base={"verifier": 0.447, "clip": 0.3},
        tuned={"verifier": 0.662, "clip": 0.29},
        delta_ci95={"verifier": [0.18, 0.25], "clip": [-0.02, -0.001]},
    )
    text = Page(write_report(run)).text
    assert "verifier on held-out prompts: 0.447 → 0.662, +0.215 [0.180, 0.250]" in text
    assert "The tuned model is better" in text
    assert "−0.010 −0.020 to −0.001" in text  # the second reward's row, with a true minus sign


@pytest.mark.parametrize(
    ("interval", "words"),
    [([0.01, 0.2], "is better"), ([-0.2, -0.01], "is worse"), ([-0.1, 0.1], "No clear change"), (None, "No interval")],
)
def test_only_an_interval_without_zero_is_called_a_change(run: Path, interval: list[float] | None, words: str):
    edit(run / "summary.json", delta_ci95={"verifier": interval})
    assert words in Page(write_report(run)).text


def test_the_file_stands_alone(finished: Path):
    page = Page(write_report(finished))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base", "form")]
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    assert len(sources) == 2
    for source in sources:
        kind, data = source.removeprefix("data:image/").split(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format == kind.upper()
    assert not [a for _, a in page.tags if set(a) & {"href", "srcset", "action", "data", "poster", "xlink:href"}]
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert any(a.get("http-equiv") == "Content-Security-Policy" for tag, a in page.tags if tag == "meta")
    assert len(page.html) < 400_000


def test_the_final_grid_comes_first(finished: Path):
    page = Page(write_report(finished))
    names = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert names == ["Grid of images: final", "Grid of images: iteration-000040"]


def test_prompts_are_text_and_never_markup(finished: Path):
    page = Page(write_report(finished))
    assert FAKE["NASTY"] in page.text  # the parser unescapes: the reader sees the prompt as it is
    assert not [a for _, a in page.tags if "onerror" in a]


def test_every_curve_is_drawn(finished: Path):
    page = Page(write_report(finished))
    charts = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a["class"] == "chart"]
    for reward in ("verifier", "clip"):
        for axis in ("iteration", "network evaluations", "minutes"):
            assert f"{reward} on held-out prompts against {axis}" in charts
    titles = ["Training reward", "Loss", "Gradient norm", "Clip fraction", "Ratio", "KL to the reference"]
    titles += ["Learning rate", "Groups without spread", "Skipped updates", "Distance to the old policy"]
    for title in titles:
        assert f"{title} against iteration" in charts
    assert "Seconds by stage" in charts
    assert len([c for c in charts if str(c).startswith("Change of")]) == 2


def credit_rows(iterations: int, windows: tuple[tuple[int, ...], ...] = ((0, 1, 2),)) -> list[dict[str, Any]]:
    """Training rows as step-wise credit writes them; the value of state k in iteration i is k + i / 100."""
    rows = []
    for i in range(iterations):
        row: dict[str, Any] = {"kind": "train", "iteration": i, "reward/mean": 7 + i / 100}
        for k in windows[i % len(windows)]:
            row |= {f"values/step_{k:02d}": k + i / 100, f"gain/up_{k:02d}": 0.5, f"gain/down_{k:02d}": 0.1 * k}
            row |= {f"values/rank_corr_{k:02d}": 0.3 * k if k else None, f"gain/zero_spread_{k:02d}": 0.0}
        row |= {"credit/turning_point_rate": 0.2, "credit/turning_point_null": 0.166, "credit/kept_fraction": 0.9}
        rows.append(row | {"credit/first_step_rate": 0.4, "credit/first_step_null": 0.5})
    return rows


def points(svg: str) -> list[list[str]]:
    """The words at the points of a chart, a list for each colour, in the order of drawing."""
    found: dict[str, list[str]] = {}
    for style, title in re.findall(r'class="dot (\w+)"[^>]*><title>([^<]*)</title>', svg):
        found.setdefault(style, []).append(title)
    return list(found.values())


def test_values_by_step_stand_beside_those_of_the_start():
    panel = credit_panels(credit_rows(100))[0]
    start, now = points(panel.svg)
    # over ten iterations: the first ones average 0.045, the last ones 0.945; the final reward comes after step 2
    assert [p.split(": ")[1] for p in start] == ["0.045", "1.045", "2.045", "7.045"]
    assert [p.split(": ")[1] for p in now] == ["0.945", "1.945", "2.945", "7.945"]
    assert [text for text, _ in panel.legend] == ["now", "at the start"]


def test_a_moving_window_shows_every_step_that_was_ever_trained():
    panel = credit_panels(credit_rows(8, windows=((0, 1), (4, 5))))[0]
    start, now = points(panel.svg)
    assert [p.split(": ")[1] for p in start] == ["0", "1", "4.01", "5.01", "7.005"]  # the first of a step's own four
    assert [p.split(": ")[1] for p in now] == ["0.06", "1.06", "4.07", "5.07", "7.065"]


def test_credit_is_shown_where_a_run_has_it_and_only_there(run: Path):
    def charts() -> list[str | None]:
        return [a["aria-label"] for tag, a in Page(write_report(run)).tags if tag == "svg" and a["class"] == "chart"]

    by_step = ["Value of the states", "Gains and losses", "Rank correlation", "Steps without spread"]
    by_iteration = ["Turning points", "First steps selected", "Turning points kept"]
    labels = [f"{t} by step" for t in by_step] + [f"{t} against iteration" for t in by_iteration]
    assert not set(labels) & set(charts())
    assert "Credit by step" not in Page(write_report(run)).text
    for rows, shown in ((credit_rows(40), labels), (credit_rows(1), labels)):
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert [label for label in charts() if label in labels] == shown
        assert "Credit by step" in Page(write_report(run)).text
    gain_only = [{k: v for k, v in row.items() if not k.startswith("credit/")} for row in credit_rows(40)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, gain_only)))
    assert [label for label in charts() if label in labels] == labels[:4]


def test_rates_of_turning_points_stand_against_those_of_pure_noise():
    panels = {panel.key: panel.svg for panel in credit_panels(credit_rows(40))}
    assert "pure noise 0.166" in panels["credit/turning_point_rate"]
    assert "pure noise 0.500" in panels["credit/first_step_rate"]
    assert 'class="reference"' not in panels["credit/kept_fraction"]


def test_bars_of_gains_and_losses_grow_from_zero_to_either_side():
    svg = ElementTree.fromstring(
        balance_chart([3, 4], [0.5, 0.25], [0.25, math.nan], ([0.5, 0.5], [0.5, math.nan]), label="l", x_label="x")
    )
    zero = next(float(e.get("y1", "")) for e in svg if e.get("class") == "zero")
    bars = [(e.get("class"), float(e.get("y", "")), float(e.get("height", ""))) for e in svg if e.tag == "rect"]
    unit = bars[0][2] / 0.5
    for (kind, top, height), (wanted, share) in zip(bars, [("gain", 0.5), ("gain", 0.25), ("loss", 0.25)], strict=True):
        assert kind == f"bar {wanted}"
        assert height == pytest.approx(share * unit, abs=0.11)  # coordinates have one decimal
        assert top == pytest.approx(zero - height if wanted == "gain" else zero, abs=0.11)
    before = [float(e.get("y1", "")) for e in svg if e.get("class") == "before"]
    assert before == pytest.approx([zero - 0.5 * unit] * 2 + [zero + 0.5 * unit], abs=0.11)


def test_prompts_that_changed_most(finished: Path):
    base, tuned = (json.loads((finished / "eval" / f"{k}.json").read_text()) for k in ("base", "tuned"))
    deltas = np.subtract(tuned["scores"]["verifier"], base["scores"]["verifier"])
    text = Page(write_report(finished)).text
    better, worse = int((deltas > 1e-9).sum()), int((deltas < -1e-9).sum())
    assert f"{better} prompts better , {64 - better - worse} the same, {worse} worse" in text
    improved = text.split("Most improved")[1].split("Most worsened")[0]
    worsened = text.split("Most worsened")[1].split("clip:")[0]
    for chosen, where in ((np.argsort(deltas)[::-1][:5], improved), (np.argsort(deltas)[:5], worsened)):
        for index in chosen:
            assert f"{base['scores']['verifier'][index]:.3f} {tuned['scores']['verifier'][index]:.3f}" in where
    assert "clip (missing: 0 base, 1 tuned)" in text


def test_categories_average_their_prompts(finished: Path):
    base = json.loads((finished / "eval" / "base.json").read_text())
    text = Page(write_report(finished)).text
    mean = np.mean(base["scores"]["verifier"][1::4])
    assert f"count 16 {mean:.3f}" in text


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path):
    run = write_fake_run(tmp_path / "run", finished=False)
    page = Page(write_report(run))
    assert "running or unfinished" in page.text
    assert "of 80 iterations" in page.text
    assert re.search(r"verifier on held-out prompts so far: 0\.\d{3} → 0\.\d{3} at iteration 60", page.text)
    for name in ("summary.json", "environment.json", "eval/tuned.json"):
        assert f"{name} is not there" in page.text
    assert "metrics.jsonl line" not in page.text  # the line a kill cut is nothing to report
    assert any(a.get("aria-label") == "Training reward against iteration" for _, a in page.tags)


def test_scores_come_from_the_evaluations_before_there_is_a_summary(run: Path):
    (run / "summary.json").unlink()
    text = Page(write_report(run)).text
    base, tuned = (json.loads((run / "eval" / f"{k}.json").read_text())["scores"] for k in ("base", "tuned"))
    change, low, high, _ = paired_change(base["verifier"], tuned["verifier"])
    assert f"+{change:.3f} [{low:.3f}, {high:.3f}]" in text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "environment.json", "eval/base.json"])
def test_no_single_bad_file_breaks_the_report(run: Path, name: str):
    (run / name).unlink()
    assert f"{name} is not there" in Page(write_report(run)).text
    odd = b'{"scores": 3, "prompts": {}, "base": [], "preset": 1}'
    for content in (b"", b"{", b"[1, 2]", b"\xff\xfe\x00null", odd):
        (run / name).write_bytes(content)
        assert "<h1>" in Page(write_report(run)).html


def test_a_bad_picture_is_named(run: Path):
    (run / "grids" / "broken.png").write_bytes((run / "grids" / "final.png").read_bytes()[:500])
    page = Page(write_report(run))
    assert "grids/broken.png is not a readable image" in page.text
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 2


def test_heavy_pictures_are_made_lighter(run: Path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "grids" / "heavy.png")
    assert (run / "grids" / "heavy.png").stat().st_size > 1_500_000
    page = Page(write_report(run))
    heavy = next(a for tag, a in page.tags if tag == "img" and a["alt"] == "Grid of images: heavy")
    assert (heavy["src"] or "").startswith("data:image/webp")
    assert (heavy["width"], heavy["height"]) == ("1000", "900")


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path):
    for folder, words in ((tmp_path / "absent", "is not a folder"), (tmp_path, "is not the folder of a run")):
        with pytest.raises(UserError, match=words) as error:
            write_report(folder)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_report_replaces_the_old_one_and_leaves_nothing_behind(run: Path):
    names = {p.name for p in run.iterdir()}
    assert write_report(run) == write_report(run) == run / "report.html"
    assert {p.name for p in run.iterdir()} == names | {"report.html"}


def test_metrics_of_a_resumed_and_killed_run(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "iteration": i, "reward/mean": v} for i, v in ((0, 1), (1, 2), (1, 3), (2, 4))]
    lines = [json.dumps(r) for r in rows]
    path.write_text("\n".join([*lines[:2], "junk", *lines[2:], lines[0][:20]]))
    found, notes = metric_rows(path)
    assert [r["reward/mean"] for r in found] == [1, 3, 4]  # the later row of iteration 1 counts
    assert notes == ["metrics.jsonl line 3 cannot be read and is left out"]


def test_grids_are_in_the_order_of_their_numbers(run: Path):
    source = (run / "grids" / "final.png").read_bytes()
    for name in ("iteration-9.png", "iteration-100.png", "iteration-20.png"):
        (run / "grids" / name).write_bytes(source)
    names = [p.stem for p in read_run(run).grids if re.fullmatch(r"iteration-\d{1,3}", p.stem)]
    assert names == ["iteration-9", "iteration-20", "iteration-100"]


def test_paired_change_drops_pairs_with_a_missing_half():
    nan = math.nan
    mean, low, high, n = paired_change([0.0, 1.0, nan, 2.0], [1.0, nan, 1.0, 5.0])
    assert (mean, n) == (2.0, 2)  # of the deltas 1 and 3
    half = 1.96 * math.sqrt(2.0 / 2)  # their variance is 2
    assert (low, high) == pytest.approx((2 - half, 2 + half))
    assert paired_change([nan], [1.0])[3] == 0
    assert math.isnan(paired_change([0.0], [1.0])[1])


def test_a_gap_in_a_metric_is_a_gap_in_its_line():
    values = [1.0, 2.0, math.nan, 2.0, 1.0, math.inf, 3.0]
    svg = ElementTree.fromstring(line_chart([Series("s", range(7), values)], label="l", x_label="x"))
    assert len([e for e in svg if e.get("class") == "line c0"]) == 2
    assert len([e for e in svg if e.get("class") == "dot c0"]) == 1  # the value on its own
    assert "nan" not in ElementTree.tostring(svg).decode()


def test_a_spike_survives_thinning():
    values = [0.0] * 5000
    values[2345] = 1.0
    svg = line_chart([Series("s", range(5000), values)], label="l", x_label="x")
    path = re.search(r'class="line c0" d="M([^"]*)"', svg)
    assert path
    points = [tuple(map(float, p.split())) for p in path[1].split("L")]
    assert len(points) <= 302
    assert min(y for _, y in points) < max(y for _, y in points) - 100
    assert points == sorted(points, key=lambda p: p[0])


def test_stacked_layers_add_up():
    svg = stacked_chart({"a": [1.0, 1.0], "b": [2.0, math.nan]}, [0, 1], label="l", x_label="x")
    areas = re.findall(r'class="area c\d" d="M([^"]*)Z"', svg)
    first, second = ([tuple(map(float, p.split())) for p in a.split("L")] for a in areas)
    floor, one = first[2][1], first[0][1]
    assert second[0][1] == pytest.approx(floor - 3 * (floor - one), abs=0.3)  # 1 + 2; coordinates have one decimal
    assert second[1][1] == pytest.approx(one, abs=0.11)  # 1 + nothing


@given(st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_a_histogram_counts_every_value_on_its_side(values: list[float]):
    svg = histogram(values, label="l", x_label="x")
    counts = dict.fromkeys(("loss", "flat", "gain"), 0)
    for kind, count in re.findall(r'class="bar (\w+)"[^>]*><title>(\d+)</title>', svg):
        counts[kind] += int(count)
    width = max(1e-300, *map(abs, values)) / 10.5 if values else 1.0  # smaller ones are all flat
    assert sum(counts.values()) == len(values)
    assert counts["loss"] <= sum(v < 0 for v in values)
    assert counts["loss"] >= sum(v < -0.51 * width for v in values)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_inside_distinct_and_few(low: float, size: float):
    if size < 1e-9 * abs(low):  # closer than a float can be labelled
        return
    values = ticks(low, low + size)
    slack = 1e-6 * size
    assert 1 <= len(values) <= 5
    assert all(low - slack <= v <= low + size + slack for v in values)
    assert len(set(tick_labels(values))) == len(values)


def test_ticks_are_written_short():
    assert tick_labels([0, 500, 1000, 1500]) == ["0", "500", "1000", "1500"]
    assert tick_labels([0, 20_000, 40_000]) == ["0", "20k", "40k"]
    assert tick_labels([0, 2e-4, 4e-4]) == ["0", "2e-4", "4e-4"]
    assert tick_labels([0.99995, 1.0, 1.00005]) == ["0.99995", "1", "1.00005"]
    assert tick_labels([-1.5e6, 0, 1.5e6]) == ["-1.5M", "0", "1.5M"]


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [1e-300], [-5.0, -5.0, -5.0], [1e12, -1e12]])
def test_charts_of_any_range_are_well_formed(values: list[float]):
    x = list(range(len(values)))
    label = 'a "label" with <b>'
    charts = [
        line_chart([Series("s", x, values, values, values, points=True)], label=label, x_label="<x>"),
        stacked_chart({"a": values}, x, label=label, x_label="<x>"),
        histogram(values, label=label, x_label="<x>"),
        balance_chart(x, [abs(v) for v in values], [math.nan] * len(x), label=label, x_label="<x>"),
    ]
    for svg in charts:
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == label
        assert "nan" not in svg
        assert "inf" not in svg


def test_words_for_numbers():
    assert [delta_text(v) for v in (0.215, -0.03, 0.0, math.nan)] == ["+0.215", "−0.030", "+0.000", "n/a"]
    assert [duration(v) for v in (44.6, 492, 11100, math.nan)] == ["45 s", "8 min 12 s", "3 h 05 min", "n/a"]


def test_every_metric_with_a_title_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for key in (*KNOWN, *FURTHER, *CREDIT, *DIVERSITY) if f"`{key}" not in page] == []
