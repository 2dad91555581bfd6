"""When an optimised and a held-out reward part: right on curves that do, silent on noise, silent on other illnesses."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.evaluate import Evaluation
from align.hacking import FALL, RISE, Point, curve, parting
from align.hacking_report import Finding, _agreement, find, metrics_of, parts_of_trained, roles, section, warning_of
from align.prompts import Prompt
from align.report import write_report
from align.runfolder import parse_config, read_run
from align.scoring import Scores
from align.snapshots import LONGEST_SIDE, keep_snapshot, kept_pictures, points

FAKE = runpy.run_path(str(Path(__file__).parents[1] / "fake_run.py"))
UNITS = {"proxy": 2.0, "gold": 0.1}
PROMPTS = 64


def evaluations(
    proxy: Sequence[float], gold: Sequence[float], *, noise: float = 0.0, seed: int = 0, by_prompt: bool = True
) -> list[Point]:
    """Ten iterations apart; levels in std of the base's scores, `noise` the std of a prompt's change in that unit."""
    rng = np.random.default_rng(seed)
    start = {name: rng.normal(0, UNITS[name], PROMPTS) for name in UNITS}
    found = []
    for i, levels in enumerate(zip(proxy, gold, strict=True)):
        scores, means, halves = {}, {}, {}
        for (name, unit), level in zip(UNITS.items(), levels, strict=True):
            values = start[name] + unit * (level + noise * rng.normal(0, 1, PROMPTS) * (i > 0))
            scores[name], means[name] = values.tolist(), float(values.mean())
            halves[name] = 1.96 * float(values.std(ddof=1)) / math.sqrt(PROMPTS)
        found.append(Point(10 * i, means, halves, scores if by_prompt else {}))
    return found


def parted(found: Sequence[Point]) -> tuple[int, int] | None:
    """(iteration of the best, iteration of the alarm)."""
    where = parting(curve(found, UNITS, {"proxy": 1.0}), curve(found, UNITS, {"gold": 1.0}))
    return where and (found[where.best].iteration, found[where.alarm].iteration)


RISING = [0.0, 0.2, 0.4, 0.7, 1.0, 1.2, 1.4, 1.5]


def test_the_alarm_comes_with_the_first_fall_from_the_best_that_is_large_enough():
    gold = [0.0, 0.2, 0.4, 0.5, 0.4, 0.2, 0.0, -0.3]  # .5 - .25 is first undercut at 50, long before the base at 60
    assert parted(evaluations(RISING, gold)) == (30, 50)
    assert parted(evaluations(RISING, gold, noise=0.3)) == (30, 50)


def test_a_reward_that_only_falls_parts_at_the_base():
    assert parted(evaluations(RISING, [0, -0.1, -0.2, -0.4, -0.5, -0.6, -0.7, -0.8])) == (0, 30)


def test_no_alarm_where_both_rise_or_both_fall():
    assert parted(evaluations(RISING, [0, 0.1, 0.3, 0.4, 0.5, 0.5, 0.45, 0.4])) is None
    diverged = [0, 0.5, 1.0, 1.5, 0.9, 0.5, 0.3, 0.3]  # still above the base, but falling as the held-out one does
    assert parted(evaluations(diverged, [0, 0.3, 0.5, 0.6, 0.3, 0.0, -0.3, -0.5])) is None


def test_a_rise_of_less_than_a_quarter_counts_where_it_is_more_than_chance():
    gold = [0, 0.1, -0.2, -0.4, -0.6]
    signs = np.resize([1.0, -1.0], PROMPTS)
    # .2 is 8 and 1.1 standard errors, of which the largest of four rises needs 2.3; .04 is no rise, however sure
    for rise, swing, expected in ((0.2, 0.2, (10, 20)), (0.2, 1.5, None), (0.04, 0.0, None)):
        found = []
        for point in evaluations([0] * 5, gold):
            levels = np.array(point.scores["proxy"]) + UNITS["proxy"] * (rise + swing * signs) * (point.iteration > 0)
            found.append(replace(point, scores={**point.scores, "proxy": levels.tolist()}))
        assert 0.9 * rise < curve(found, UNITS, {"proxy": 1.0}).changes.max() < RISE
        assert parted(found) == expected


def test_a_trained_reward_that_stays_is_called_hacked_in_fewer_than_one_run_of_twenty():
    flat, falling = np.zeros(20), np.linspace(0, -1, 20)
    runs = [evaluations(flat, falling, noise=0.5, seed=seed) for seed in range(200)]
    assert sum(parted(run) is not None for run in runs) <= 16  # as above; it need not rise above 0 at the end either


def test_a_trained_reward_that_falls_with_the_watched_one_is_not_hacked():
    assert parted(evaluations([0, 0.2, 0.1, 0.05], [0, 0.3, -0.3, -0.8])) is None  # it lost as much as is left
    rise_and_fall = [0, 0.3, 0.6, 0.6, 0.6]
    gold = [0, 0.2, -0.2, -0.5, -0.8]
    assert parted(evaluations(rise_and_fall, gold)) == (10, 20)
    assert parted(evaluations([*rise_and_fall, -0.5], [*gold, -1.2])) is None


@pytest.mark.parametrize(
    ("proxy", "gold", "said"),
    [
        ([0, 0.04], [0, 0.01], "No sign of hacking, and little change so far"),
        ([0, 0.5], [0, 0.3], "No sign of hacking"),
        ([0, -0.5, -1.5], [0, -0.4, -0.8], "The held-out rewards fell, and the optimised one did not rise with that"),
        ([0, 0.5, 0.06], [0, 0.3, -0.8], "The held-out rewards fell, and the optimised one did not rise with that"),
        ([0, 0.3, 0.5], [0, 0.3, 0.0], "Perhaps hacked: the held-out rewards fell, but not all of it is beyond doubt"),
    ],
)
def test_what_is_said_without_an_alarm(proxy, gold, said):
    rows = evaluations(proxy, gold, by_prompt=False)
    optimised, held_out = (curve(rows, UNITS, {name: 1.0}) for name in UNITS)
    assert parting(optimised, held_out) is None
    assert _agreement(Finding(rows, UNITS, optimised, held_out, None)).said == said


def test_an_alarm_is_void_once_the_held_out_reward_climbs_above_where_it_fell_from():
    dip = [0, 0.3, -0.1, -0.1, 0.2, 0.4, 0.5, 0.5]
    assert parted(evaluations(RISING[:4], dip[:4])) == (10, 20)
    assert parted(evaluations(RISING, dip)) is None


def test_a_fall_that_is_made_up_for_is_no_alarm_at_the_end():
    dip = [0, 0.5, 0.1, 0.1, 0.3, 0.45, 0.45, 0.45]  # just below the best is not above it
    assert parted(evaluations(RISING[:4], dip[:4])) == (10, 20)
    assert parted(evaluations(RISING, dip)) is None


def test_noise_alone_raises_an_alarm_in_fewer_than_one_run_of_twenty():
    # Each prompt's change is as wide as the base's scores: means of 64 differ by .18 std of chance, and the largest
    # fall among thirty evaluations is far above FALL.
    proxy, flat = np.linspace(0, 2, 30), np.zeros(30)
    runs = [evaluations(proxy, flat, noise=1.0, seed=seed) for seed in range(200)]
    held = [curve(run, UNITS, {"gold": 1.0}).changes for run in runs]
    largest = [float(np.max(np.maximum.accumulate(h) - h)) for h in held]
    assert np.median(largest) > FALL
    alarms = sum(parted(run) is not None for run in runs)
    assert alarms <= 16  # 5 % of 200 is 10; with that rate more than 16 come up once in fifty times


def test_few_prompts_take_the_wider_tails_of_their_own_spread():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        table = rng.normal(0, 1, (20, 12))
        table[0] = 0
        rows = [
            Point(i, {"proxy": 2.0 * i, "gold": row.mean()}, {}, {"proxy": [2.0 * i] * 12, "gold": row.tolist()})
            for i, row in enumerate(table)
        ]
        units = {"proxy": 1.0, "gold": 1.0}
        alarms += parting(curve(rows, units, {"proxy": 1.0}), curve(rows, units, {"gold": 1.0})) is not None
    assert alarms <= 25  # 15 expected at most; with normal tails over forty, without the correction over two hundred


def test_a_handful_of_prompts_is_never_beyond_doubt():
    # Scores of 0 and 1: that two or six prompts change alike is chance, and their differences have no spread at all.
    for count, expected in ((2, None), (6, None), (12, (0, 30))):
        rows = [
            Point(10 * i, {"proxy": i, "gold": g}, {}, {"proxy": [1.0 * i] * count, "gold": [g] * count})
            for i, g in enumerate([1.0, 1.0, 1.0, 0.0])
        ]
        assert parted(rows) == expected, count


def test_rewards_that_speak_of_different_prompts_part_as_one_that_speaks_of_all():
    gold = [0, 0.2, 0.2, -0.1, -0.15, -0.2, -0.2, -0.25]
    rows = evaluations(RISING, gold, noise=0.2)
    odd = []
    for row in rows:  # text and count: each silent on the other's prompts
        g = np.array(row.scores["gold"])
        halves = {
            "text": np.where(np.arange(PROMPTS) % 2, g, np.nan),
            "count": np.where(np.arange(PROMPTS) % 2, np.nan, g),
        }
        means = {"proxy": row.means["proxy"], **{k: float(np.nanmean(v)) for k, v in halves.items()}}
        scores = {"proxy": row.scores["proxy"], **{k: v.tolist() for k, v in halves.items()}}
        odd.append(Point(row.iteration, means, {}, scores))
    units = {"proxy": UNITS["proxy"], "text": UNITS["gold"], "count": UNITS["gold"]}
    whole = curve(rows, UNITS, {"gold": 1.0})
    split = curve(odd, units, {"text": 1.0, "count": 1.0})
    np.testing.assert_allclose(split.changes, whole.changes, atol=1e-12)  # as many of each
    np.testing.assert_allclose([split.error(1, i) for i in (3, 7)], [whole.error(1, i) for i in (3, 7)], rtol=0.1)
    assert parting(curve(odd, units, {"proxy": 1.0}), split) == parting(curve(rows, UNITS, {"proxy": 1.0}), whole)


def test_a_prompt_without_a_score_does_not_move_the_rest():
    # The easiest prompts are silent at the last evaluation: the mean of what is left falls, no prompt does.
    levels = np.linspace(-2, 2, PROMPTS)
    last = np.where(levels > 1, np.nan, levels)
    rows = [
        Point(
            10 * i, {"proxy": i, "gold": float(np.nanmean(g))}, {}, {"proxy": [1.0 * i] * PROMPTS, "gold": g.tolist()}
        )
        for i, g in enumerate((levels, levels, last))
    ]
    assert rows[2].means["gold"] < rows[0].means["gold"] - FALL
    assert curve(rows, {"proxy": 1.0, "gold": 1.0}, {"gold": 1.0}).changes.tolist() == [0, 0, 0]


def test_evaluations_on_more_and_on_fewer_prompts_share_the_first():
    rows = evaluations(RISING, [0, 0.2, 0.4, 0.5, 0.4, 0.2, 0.0, -0.3], noise=0.3)
    fewer = [
        Point(p.iteration, p.means, {}, {n: v[: 40 if i > 4 else PROMPTS] for n, v in p.scores.items()})
        for i, p in enumerate(rows)
    ]
    assert curve(fewer, UNITS, {"gold": 1.0}).prompts == 40
    assert parted(fewer)[0] == 30


def test_pairs_of_prompts_show_a_fall_that_intervals_hide():
    gold = [0, 0.2, 0.2, -0.1, -0.15, -0.2, -0.2, -0.25]
    assert parted(evaluations(RISING, gold, noise=0.2)) is not None
    assert parted(evaluations(RISING, gold, noise=0.2, by_prompt=False)) is None
    deep = [0, 0.2, 0, -0.4, -0.6, -0.9, -1.0, -1.2]  # a run of before scores by prompt were kept
    assert parted(evaluations(RISING, deep, by_prompt=False)) == (10, 30)


def test_several_rewards_count_by_their_weights_in_their_own_units():
    rows = [
        Point(0, {"a": 1.0, "b": 10.0, "cost": 5.0}),
        Point(1, {"a": 2.0, "b": 14.0, "cost": 2.0}),
    ]
    units = {"a": 1.0, "b": 2.0, "cost": 1.0}
    # (2 * 1 + 1 * 2 - 1 * -3) / 4: a reward of negative weight is optimised by falling
    assert curve(rows, units, {"a": 2.0, "b": 1.0, "cost": -1.0}).changes[1] == pytest.approx(7 / 4)
    assert curve(rows, units, {"a": 1.0, "unknown": 5.0}).names == ("a",)


def test_an_evaluation_without_scores_is_passed_over():
    nan = math.nan
    assert parted(evaluations(RISING, [0, 0.2, nan, 0.5, nan, 0.2, 0.0, -0.3])) == (30, 50)
    assert parted(evaluations([nan] * 8, [nan] * 8)) is None
    assert parted(evaluations([0.0], [0.0])) is None


@pytest.fixture
def hacked(tmp_path: Path) -> Path:
    return FAKE["hack"](FAKE["write_fake_run"](tmp_path / "run"))


def of(folder: Path):
    run = read_run(folder)
    shown = section(run, parse_config(run.config))
    assert shown is not None
    return shown


def settings(folder: Path, old: str, new: str) -> None:
    path = folder / "config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_hacked_run_names_the_iteration_and_the_command_for_its_checkpoint(hacked: Path):
    shown = of(hacked)
    assert shown.said == "Hacked from iteration 30 on"
    assert shown.prompts == 64
    assert "parted: iteration 30" in shown.chart
    assert shown.advice.command == f"align eval {hacked} --adapter {hacked}/checkpoints/iteration-000030/adapter"
    assert shown.advice.again == ""
    assert shown.picture["uri"].startswith("data:image/webp;base64,")
    html = write_report(hacked).read_text()
    assert html.index("Hacked from iteration 30 on") < html.index("Base and tuned")


def test_a_checkpoint_that_was_not_kept_is_replaced_by_the_best_that_was_and_a_way_to_keep_it(hacked: Path):
    (hacked / "checkpoints" / "iteration-000030" / "state.json").unlink()  # an unfinished checkpoint is none
    advice = of(hacked).advice
    assert "were not kept" in advice.text
    assert advice.command.endswith("checkpoints/iteration-000020/adapter")
    assert "checkpoint.every=10 checkpoint.keep=8 early_stop.reward=clip" in advice.again
    (hacked / "checkpoints" / "iteration-000020" / "state.json").unlink()
    late = hacked / "checkpoints" / "iteration-000060"  # clip is .4 std below the base there: nearest, and of no use
    (late / "adapter").mkdir(parents=True)
    (late / "state.json").write_text("{}")
    advice = of(hacked).advice
    assert advice.command == ""
    assert "Use the base model" in advice.text
    assert "checkpoint.keep=8" in advice.again
    for folder in (hacked / "checkpoints").glob("*/state.json"):
        folder.unlink()
    advice = of(hacked).advice
    assert advice.command == ""
    assert "checkpoint.keep=8" in advice.again


def test_an_adapter_that_early_stop_chose_is_the_advice(hacked: Path):
    path = hacked / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best_iteration": 30}))
    assert of(hacked).advice.command == f"align eval {hacked}"


def test_a_run_that_was_hacked_from_the_start_is_told_to_keep_the_base(tmp_path: Path):
    folder = FAKE["write_fake_run"](tmp_path / "run")
    FAKE["hack"](folder, best=1, height=0.0)
    shown = of(folder)
    assert shown.said == "Hacked from the start"
    assert shown.advice.text.startswith("Use the base model")
    assert shown.advice.command == ""


def test_an_old_run_without_pictures_or_scores_by_prompt_is_read_all_the_same(tmp_path: Path):
    folder = FAKE["hack"](FAKE["write_fake_run"](tmp_path / "run"), snapshots=False)
    shown = of(folder)
    assert shown.said == "Hacked from iteration 30 on"
    assert shown.prompts == 0
    assert shown.picture is None
    assert "eval.pictures" in shown.no_picture


def test_evaluations_made_with_other_settings_are_no_part_of_the_comparison(hacked: Path):
    # Continued after 40 with other settings, the base evaluated again: what came before has another level.
    for path in sorted((hacked / "eval").glob("iteration-*.json"))[:4]:
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_steps": 3}))
    assert [p.iteration for p in points(read_run(hacked))] == [0, 50, 60, 70, 80]
    rows = [json.loads(line) for line in (hacked / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "eval" and row["iteration"] == 0:
            row["eval/clip"] += 5.0  # the base's row is of before as well; eval/base.json is not
    (hacked / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert of(hacked).said == "Hacked from the start"
    run = read_run(hacked)
    found = find(run, parse_config(run.config))
    assert found.held_out.changes[-1] == pytest.approx(-1, abs=0.15)
    assert metrics_of(hacked, run.evals[-1])["hacking/held_out"] == pytest.approx(found.held_out.changes[-1])
    for path in (hacked / "eval").glob("iteration-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_steps": 3}))
    assert "settings of eval/base.json" in of(hacked).why
    assert warning_of(hacked) is None


def test_a_damaged_file_of_scores_leaves_the_means(hacked: Path):
    (hacked / "eval" / "iteration-000050.json").write_text("{")
    (hacked / "eval" / "iteration-000060.json").write_text("[]")
    shown = of(hacked)
    assert (shown.said, shown.prompts) == ("Hacked from iteration 30 on", 0)


def test_a_member_of_the_trained_ensemble_does_not_count_as_held_out(hacked: Path):
    # `verifier` rises as what is trained does, and would hide half of what `clip` falls.
    old = "verifier: {type: verifier, weight: 1.0}"
    members = "{one: {type: verifier}, two: {type: proxy, args: {seed: 2}}}"
    settings(
        hacked,
        old,
        f"committee: {{type: ensemble, args: {{members: {members}}}}}\n  verifier: {{type: verifier, weight: 0}}",
    )
    config = parse_config((hacked / "config.yaml").read_text())
    assert roles(config) == ({"committee": 1.0}, {"clip": 1.0})
    assert parts_of_trained(config) == ("verifier",)
    config["rewards"]["verifier"]["args"] = {"threshold": 0.5}
    assert roles(config)[1] == {"verifier": 1.0, "clip": 1.0}
    config["eval_rewards"] = {
        "other": {"type": "proxy", "args": {"seed": 2}},
        "third": {"type": "proxy", "args": {"seed": 3}},
    }
    assert parts_of_trained(config) == ("other",)
    d2 = {"guided": {"type": "d2align", "args": {"base": {"type": "clip"}, "direction": "b.safetensors"}}}
    assert roles({"rewards": d2, "eval_rewards": {"plain": {"type": "clip"}}}) == ({"guided": 1.0}, {})


def test_without_a_held_out_reward_the_report_says_what_to_add(hacked: Path):
    settings(hacked, "eval_rewards:\n  clip: {type: clip}\n", "")
    shown = of(hacked)
    assert "eval_rewards: {clip: {type: clip}}" in shown.why
    assert shown.chart == ""
    assert "cannot tell whether its reward was hacked" in write_report(hacked).read_text()
    assert warning_of(hacked) is None


def test_a_reward_of_weight_zero_is_held_out(hacked: Path):
    settings(hacked, "verifier: {type: verifier, weight: 1.0}", "verifier: {type: verifier, weight: 0.0}")
    settings(hacked, "eval_rewards:\n  clip: {type: clip}", "  clip: {type: clip}")
    run = read_run(hacked)
    found = find(run, parse_config(run.config))
    assert (found.optimised.names, found.held_out.names) == (("clip",), ("verifier",))
    assert found.parting is None


def test_rewards_whose_base_scores_do_not_differ_have_no_unit(hacked: Path):
    path = hacked / "eval" / "base.json"
    data = json.loads(path.read_text())
    data["scores"]["clip"] = [0.3] * 64
    path.write_text(json.dumps(data))
    assert "clip" in of(hacked).why
    assert metrics_of(hacked, {"eval/verifier": 0.5, "eval/clip": 0.3}).keys() == {"hacking/optimised"}


def test_the_warning_of_a_run_comes_when_the_rewards_have_parted_and_not_before(hacked: Path):
    path = hacked / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for end, warned in ((30, False), (40, True)):
        path.write_text("\n".join(line for line in lines if json.loads(line)["iteration"] <= end))
        line = warning_of(hacked)
        assert (line is not None) == warned, end
    assert "its best, at iteration 30" in line
    assert f"`align report {hacked}`" in line
    line = warning_of(hacked.rename(hacked.with_name("my run")))
    assert f"`align report '{hacked.with_name('my run')}'`" in line
    assert "early_stop.reward" in line


def test_a_run_that_goes_on_reads_its_evaluations_only(hacked: Path):
    whole, part = read_run(hacked), read_run(hacked, only="eval")
    assert (part.evals, part.train) == (whole.evals, [])
    assert points(part) == points(whole)


def test_the_metrics_are_the_curve_of_the_report(hacked: Path):
    run = read_run(hacked)
    found = find(run, parse_config(run.config))
    for i, row in enumerate(run.evals):
        metrics = metrics_of(hacked, row)
        assert metrics["hacking/optimised"] == pytest.approx(found.optimised.changes[i], abs=1e-12)
        assert metrics["hacking/held_out"] == pytest.approx(found.held_out.changes[i], abs=1e-12)


def test_what_an_evaluation_leaves_behind_is_read_back(tmp_path: Path):
    folder = FAKE["write_fake_run"](tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    small, large = torch.rand(3, 3, 64, 64, generator=generator), torch.rand(3, 3, 300, 600, generator=generator)
    values = {"verifier": torch.tensor([0.25, math.nan, 1.0]), "clip": torch.zeros(3)}
    for iteration, images in ((10, small), (20, large)):
        texts = [Prompt(str(i)) for i in range(3)]
        evaluation = Evaluation(
            texts, Scores(values, {k: ~v.isnan() for k, v in values.items()}), images, 10, 1.0, 1234
        )
        keep_snapshot(folder, iteration, evaluation, 3, 2)
    found = {p.iteration: p for p in points(read_run(folder))}
    np.testing.assert_equal(found[10].scores["verifier"], [0.25, math.nan, 1.0])
    assert found[30].scores == {}
    pictures = [Image.open(p) for p in kept_pictures(folder, 10)]
    assert len(pictures) == 2
    # small ones keep every pixel
    np.testing.assert_array_equal(np.asarray(pictures[0]), (small[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert Image.open(kept_pictures(folder, 20)[0]).size == (LONGEST_SIDE, LONGEST_SIDE // 2)
    assert not list(folder.rglob(".*"))
