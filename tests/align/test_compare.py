"""Runs side by side: which differences are stated, what refuses to be compared, and that pictures are each run's own."""

from __future__ import annotations

import io
import json
import math
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.colors import to_rgb
from PIL import Image
from rich.console import Console

from align.checkpoint import write_adapter
from align.compare import change_text, compare_runs
from align.compare_curves import COLOURS, chosen_metrics, figure, overlays, save_curves
from align.compare_runs import differing_settings, labels, method, open_runs, paired_differences, remarks, rows
from align.config import load_config, to_yaml
from align.errors import UserError
from align.evaluate import sample_images
from align.grids import comparison_grid
from align.inference import Share, compare, load_target
from align.models.base import load_model
from align.prompts import Prompt
from align.report import Score
from align.tracking import write_json

UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
FAKE = runpy.run_path(str(Path(__file__).parents[1] / "fake_run.py"))
NAN = float("nan")
SETTINGS: dict[str, Any] = {
    "preset": ["nft", "playground"],
    "model": {"path": "playground"},
    "rewards": {"verifier": {"type": "verifier", "args": {}}},
    "eval_rewards": {"clip": {"type": "clip", "args": {}}},
    "objective": {"type": "forward_process"},
    "sampler": {"kernel": "ode", "guidance_scale": 1.0},
    "train": {"iterations": 80},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAKE["write_fake_run"](tmp_path_factory.mktemp("runs") / "done", iterations=40)


@pytest.fixture
def make(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """make(name, tuned={...}, **changed sections): a copy of a finished run with other settings and scores."""

    def copy(name: str, tuned: dict[str, Any] | None = None, **sections: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "name": name, **sections}))
        path = folder / "eval" / "tuned.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **(tuned or {})}))
        return folder

    return copy


def unfinish(run: Path) -> Path:
    for name in ("summary.json", "eval/tuned.json", "adapter"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def opened(*folders: Path) -> list[Any]:
    return open_runs([str(folder) for folder in folders])


def command(*folders: Path, **options: Any) -> tuple[str, Path]:
    """What `align compare` prints, and its folder."""
    output = io.StringIO()
    out = folders[0].parent / "out"
    compare_runs([str(f) for f in folders], Console(file=output, width=200), out=out, **options)
    return output.getvalue(), out


# -- which run is which -------------------------------------------------------------------------------------------


def test_labels_are_the_shortest_names_that_differ_and_never_the_grids_own():
    assert labels([Path("/o/a"), Path("/o/b")]) == ["a", "b"]
    assert labels([Path("/o/a"), Path("/p/a"), Path("/p/b")]) == ["o/a", "p/a", "b"]
    assert labels([Path("/o/base")]) == ["o/base"]


def test_a_path_that_is_no_run_names_the_nearest(make, tmp_path):
    make("ddpo-long")
    with pytest.raises(UserError, match=r"dpo-long is not the folder of a run \(did you mean '.*/ddpo-long'\?\)"):
        open_runs([str(tmp_path / "dpo-long")])
    with pytest.raises(UserError, match="holds some: name them, as in align compare .*/ddpo-long"):
        open_runs([str(tmp_path)])
    with pytest.raises(UserError, match="given twice"):
        open_runs([str(tmp_path / "ddpo-long"), str(tmp_path / "ddpo-long" / "eval" / ".." / "..") + "/ddpo-long"])


def test_the_method_is_the_presets_without_the_base_model_and_else_the_objective(make):
    named, plain = opened(make("a"), make("b", preset=[]))
    assert (method(named), method(plain)) == ("nft", "forward_process on ode")


# -- which differences are stated -----------------------------------------------------------------------------------


def test_pairs_are_over_the_prompts_with_which_both_begin_and_for_which_both_have_a_score(make):
    first, second = (
        make(name, tuned={"prompts": prompts, "scores": {"verifier": scores}})
        for name, prompts, scores in (("a", ["p", "q", "r"], [0.0, None, 0.5]), ("b", ["p", "q"], [0.25, 0.9]))
    )
    third = make("c", tuned={"prompts": ["p", "q", "r"], "scores": {"verifier": [0.2, 0.3, 1.0]}})
    pairs, notes = paired_differences(opened(first, second, third))
    found = {(p.run, p.against): p.score for p in pairs}
    assert notes == []
    assert found["b", "a"].n == 1
    assert found["b", "a"].delta == pytest.approx(0.25)
    assert math.isnan(found["b", "a"].low)  # one prompt has no interval
    assert found["c", "a"].n == 2
    assert found["c", "a"].delta == pytest.approx((0.2 + 0.5) / 2)
    assert [found["c", "a"].low, found["c", "a"].high] == pytest.approx([0.2, 0.5])  # resamples of two prompts
    assert found["c", "b"].delta == pytest.approx((-0.05 - 0.6) / 2)


def test_the_paired_interval_is_narrower_than_that_of_unpaired_runs(make):
    level = np.random.default_rng(0).normal(0.5, 0.3, 64)
    runs = [
        make(name, tuned={"prompts": [str(i) for i in range(64)], "scores": {"verifier": list(level + shift)}})
        for name, shift in (("a", 0.0), ("b", 0.01 + 0.005 * np.sin(np.arange(64))))
    ]
    ((pair,), _) = paired_differences(opened(*runs))
    assert 0 < pair.score.low < 0.01 < pair.score.high < 0.02  # 0.3 / 8 would be the standard error of either mean
    assert pair.score.verdict == "better"


@pytest.mark.parametrize(
    ("tuned", "sections", "reason"),
    [
        ({"prompts": ["other"] * 64}, {}, "their held-out prompts differ"),
        ({"seed": 7}, {}, "their evaluation seeds differ"),
        ({}, {"rewards": {"verifier": {"type": "verifier", "args": {"graded": False}}}}, "'verifier' are not the same"),
    ],
)
def test_runs_that_were_not_evaluated_alike_have_no_difference_and_it_is_said(make, tuned, sections, reason):
    pairs, (note,) = paired_differences(opened(make("a"), make("b", tuned, **sections)))
    assert "verifier" not in {pair.score.reward for pair in pairs}
    assert note.startswith("no paired difference between a and b: their ")
    assert note.endswith(reason)


def test_a_run_that_is_going_on_shows_where_it_stands(make):
    running, done = unfinish(make("running")), make("done")
    entries = opened(done, running)
    pairs, notes = paired_differences(entries)
    assert pairs == []
    assert notes == ["no paired difference to running: no final evaluation (eval/tuned.json) yet"]
    by_run = {row["run"]: row for row in rows(entries, pairs) if row["reward"] == "verifier"}
    row, evals = by_run["running"], entries[1].run.evals
    assert (row["base"], row["tuned"]) == (evals[0]["eval/verifier"], evals[-1]["eval/verifier"])
    assert math.isnan(row["ci95_low"])
    assert (row["finished"], by_run["done"]["finished"]) == (False, True)
    assert any("running is not finished" in remark and "iteration 40" in remark for remark in remarks(entries))
    printed, out = command(done, running, pictures=False)
    assert "so far" in printed
    assert "40 of 80" in printed
    assert json.loads((out / "compare.json").read_text())["rows"][-1]["ci95_low"] is None


def test_settings_that_differ_are_listed_and_defaults_of_older_versions_are_not(make):
    first = make("a", train={"iterations": 80, "seed": 0}, optim={"lr": 1e-3})
    entries = opened(first, make("b", train={"iterations": 40}, optim={"lr": 1e-3, "betas": [0.9, 0.999]}))
    assert differing_settings(entries) == [("train.iterations", ["80", "40"])]


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score("r", 0.5, 0.6426, 0.106, 0.18, 9), "+0.143 [+0.106, +0.180]"),
        (Score("r", 0.5, 0.5, -0.00052, 0.0004, 9), "+0.00000 [−0.00052, +0.00040]"),
        (Score("r", 100.0, 60.0, -41.0, -39.0, 9), "−40.00 [−41.00, −39.00]"),
        (Score("r", 0.5, 0.4, NAN, NAN, 1), "−0.100 so far"),
        (Score("r", 0.5, NAN, NAN, NAN, 0), "n/a"),
    ],
)
def test_all_numbers_of_an_interval_have_the_digits_that_its_width_needs(score, text):
    assert change_text(score, so_far=True) == text


# -- base models ------------------------------------------------------------------------------------------------------


def test_different_base_models_have_no_grid_but_everything_else(make):
    runs = make("a"), make("b", model={"path": "org/other", "revision": "v2"})
    with pytest.raises(UserError) as refused:
        command(*runs)
    assert str(refused.value) == (
        "no grid of runs with different base models: playground (a); org/other at v2 (b); --no-grid compares the rest"
    )
    printed, out = command(*runs, pictures=False)
    assert "note: different base models: playground (a); org/other at v2 (b)" in printed
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json", "curves.png"]


# -- curves -----------------------------------------------------------------------------------------------------------


def test_a_metric_in_none_of_the_runs_names_the_nearest(make):
    entries = opened(make("a"))
    assert chosen_metrics(entries, []) == ["eval/verifier", "eval/clip", "reward/mean"]
    with pytest.raises(UserError, match=r"--metric train/kll: .*did you mean 'train/kl'"):
        chosen_metrics(entries, ["train/kll"])


def test_curves_stand_against_what_each_run_has_spent(make):
    entries = opened(make("a"), make("b"))
    entries[1].run.evals[:] = [{**row, "nfe": 2 * row["nfe"]} for row in entries[1].run.evals]
    ((iteration, nfe),) = overlays(entries, ["eval/verifier"], ["iteration", "nfe"])
    first, second = (curve.series for curve in nfe.curves)
    assert list(second.x) == [2 * x for x in first.x]
    assert list(first.y) == list(second.y) == [row["eval/verifier"] for row in entries[0].run.evals]
    assert [y + 0.042 for y in first.y] == pytest.approx(list(first.high))
    assert iteration.curves[0].series.x == iteration.curves[1].series.x
    ((train,),) = overlays(entries, ["reward/mean"], ["nfe"])
    assert [curve.thin for curve in train.curves] == [True, True, False, False]  # averages over single iterations
    assert train.title == "Training reward, moving average"


def test_many_runs_are_drawn_without_bands_that_would_hide_each_other(make):
    entries = opened(*(make(f"r{i}") for i in range(4)))
    for count, drawn in ((3, True), (4, False)):
        ((held_out,), (train,)) = overlays(entries[:count], ["eval/verifier", "reward/mean"], ["nfe"])
        assert all(bool(curve.series.low) == drawn for curve in held_out.curves)
        assert any(curve.thin for curve in train.curves) == drawn


def test_every_run_is_in_the_legend_in_reading_order_and_has_a_look_of_its_own(make, tmp_path):
    names = ["_first", "$x$", *(f"a-name-that-needs-some-room-{i}" for i in range(14))]
    entries = opened(*(make(name) for name in names))
    panels = overlays(entries, ["eval/verifier"], ["nfe"])
    panels[0] *= 2
    drawn = figure(panels, [entry.label for entry in entries])
    (legend,) = drawn.legends
    columns = legend._ncols
    written = [text.get_text().strip("\u200b") for text in legend.get_texts()]
    assert sorted(written) == sorted(names)
    assert columns > 1
    first_row = [written[0], written[math.ceil(len(names) / columns)]]  # matplotlib fills column by column
    assert first_row == ["_first", "$x$"]
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in drawn.axes[0].lines}
    assert len(looks) == len(names)
    with Image.open(save_curves(tmp_path / "curves.png", panels, names)) as image:
        assert image.width > 500


def test_colours_differ_in_lightness_or_hue_for_readers_without_red_and_green():
    """Distances under a simulation of deuteranopia (Viénot et al. 1999), in linear RGB."""
    simulate = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    seen = [simulate @ np.array(to_rgb(colour)) ** 2.2 for colour in COLOURS]
    apart = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 0.1
    page = (Path(__file__).parents[2] / "align" / "templates" / "compare.html.j2").read_text()
    assert all(f"--c{i}: #" in page for i in range(len(COLOURS)))  # each has a counterpart for dark pages


# -- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_holds_what_the_table_says(make):
    evil = make("<b>a"), make("b", rewards={"verifier": {"type": "<script>"}})
    printed, out = command(*evil, pictures=False)
    page = (out / "compare.html").read_text()
    assert "&lt;b&gt;a" in page
    assert "<b>a" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert page.count('<svg class="chart"') == 9  # two held-out rewards and the training reward, against three costs
    data = json.loads((out / "compare.json").read_text())
    assert {row["kind"] for row in data["rows"]} == {"run", "pair"}
    for row in data["rows"]:
        assert not [value for value in row.values() if isinstance(value, (list, dict))]
        if row["kind"] == "run":
            score = Score(row["reward"], row["base"], row["tuned"], row["ci95_low"], row["ci95_high"], row["n"])
            assert change_text(score) in page
            assert change_text(score) in printed
    for note in data["notes"]:
        assert f"note: {note}" in printed.splitlines()


def test_bars_that_are_compared_have_one_scale():
    def ends(score: Score, reach: float) -> tuple[float, float]:
        bar = re.search(r'<rect class="bar gain" x="([0-9.]+)"[^>]*? width="([0-9.]+)"', score.interval_to(reach))
        assert bar is not None
        return float(bar[1]) - 60, float(bar[2])  # zero stands at 60

    small, large = Score("r", 0.0, 0.02, 0.01, 0.03, 9), Score("r", 0.0, 0.2, 0.1, 0.3, 9)
    assert ends(small, 0.0) == ends(large, 0.0)  # each on its own
    left, width = ends(large, 0.3)
    assert ends(small, 0.3) == pytest.approx((left / 10, width / 10), abs=0.1)  # coordinates have one decimal


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_names_that_differ_at_their_end_have_different_heads():
    cell = [Image.new("RGB", (64, 64))]
    names = [f"a-rather-long-name-of-a-run-that-ends-in-seed-{i}" for i in (1, 2)]
    page = np.asarray(comparison_grid(dict.fromkeys(names, cell), ["p"]))
    left = [int(x) for x in np.flatnonzero((page == 0).all(-1).any(0))]
    assert len(left) == 2 * 192
    first, second = (page[:110, start : start + 192] for start in (left[0], left[192]))
    assert (first != second).any()
    assert (first[:60] == second[:60]).all()


@pytest.fixture
def trained(request, sd35, write_config, tmp_path) -> list[Path]:
    """Folders of two runs with random adapters of different ranks, as far as pictures need them."""
    family = getattr(request, "param", "sd35")
    base = sd35 if family == "sd35" else UNET[f"{family}_pipeline"](tmp_path / "base")
    runs = []
    for index, rank in enumerate((2, 4)):
        name = f"run-{index}"
        config = load_config(
            write_config(tmp_path / "configs", "nft", {"model": {"path": str(base), "lora": {"rank": rank}}}),
            [f"output_dir={tmp_path}", f"name={name}", "prompts.eval=playground:heldout_test", "sampler.num_steps=2"],
        )
        model = load_model(config.model)
        for parameter in model.add_lora(seed=index):
            torch.nn.init.normal_(parameter, std=0.3)
        write_adapter(model, tmp_path / name / "adapter")
        (tmp_path / name / "config.yaml").write_text(to_yaml(config))
        runs.append(tmp_path / name)
    return runs


@pytest.mark.parametrize("trained", ["sd35", "sd", "sdxl"], indirect=True)
def test_adapters_take_turns_in_one_pipeline_and_leave_nothing_behind(trained, on_cpu):
    prompts = [Prompt("a red circle"), Prompt("two blue star")]
    setup = load_target(str(trained[0]))
    network = setup.model.network
    order = {"first": [Share(trained[0] / "adapter")], "second": [Share(trained[1] / "adapter")]}
    found = compare(setup, {}, prompts, Console(quiet=True), keep=2, adapters=order)
    assert list(found) == ["base", "first", "second"]
    assert setup.model.network is network
    for label, run in (("base", None), ("first", trained[0]), ("second", trained[1])):
        alone = load_target(str(run or trained[0]), scale=0.0 if run is None else 1.0)
        images = sample_images(alone.model, [p.text for p in prompts], [0, 1], alone.num_steps, 1.0, alone.seed)
        assert torch.equal(found[label].images, (images * 255).round() / 255), label
    assert (found["first"].images - found["second"].images).abs().max() > 0.05
    assert (found["first"].images - found["base"].images).abs().max() > 0.05


def test_the_grid_has_a_column_a_run_and_takes_the_checkpoint_of_one_that_is_going_on(trained, on_cpu):
    first, second = trained
    checkpoint = second / "checkpoints" / "iteration-000003"
    checkpoint.mkdir(parents=True)
    (second / "adapter").rename(checkpoint / "adapter")
    write_json(checkpoint / "state.json", {})
    printed, out = command(first, second, count=2)
    assert "note: pictures of run-1 are from its checkpoint iteration-000003" in printed
    with Image.open(out / "grid.png") as image:
        narrow = image.width
    page = (out / "compare.html").read_text()
    assert page.count('src="data:image/') == 1
    shutil.rmtree(checkpoint)
    printed, out = command(first, second, count=2)
    assert "note: no pictures of run-1: it has neither an adapter nor a checkpoint yet" in printed
    with Image.open(out / "grid.png") as image:
        assert image.width < narrow
