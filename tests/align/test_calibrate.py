"""The noise table of a run: measured on a tiny genuine pipeline, stored, found again, refused where it does not belong."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from align.calibrate import (
    Stopped,
    apply_psi,
    cache_path,
    calibrate,
    calibration_progress,
    fingerprint,
    load_table,
    plan_to_search,
    psi_table,
    save_table,
)
from align.cli import app
from align.config import load_config
from align.errors import UserError
from align.psi_chart import chart, draw_chart, ends
from align.run import rng_state, start
from samplers.calibration import flow_sde_sigmas, sigmas_to_multipliers
from samplers.config import SamplerConfig

SETTINGS = ["calibration.samples=6", "calibration.iterations=3", "checkpoint.every=100"]
STEPS, SEARCHED, PROMPTS = 4, 3, 4


@pytest.fixture
def config_file(on_cpu, write_config, tmp_path):
    return write_config(tmp_path, "flow_grpo", {"sampler": {"num_steps": STEPS}})


@pytest.fixture
def start_run(config_file):
    """start_run(*overrides) -> a Run of the tiny pipeline, its table not yet measured."""

    def build(*overrides):
        config = load_config(config_file, [*SETTINGS, *overrides])
        run = start(dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, psi=None)), quiet())
        run.config.sampler.psi = config.sampler.psi or "auto"
        return run

    return build


def quiet():
    return Console(quiet=True)


def silent(*_):
    pass


def made_for(run, sigma=0.5, **changes):
    """A table for `run` made without measuring, every entry `sigma`."""
    rows = {"history": [[1.0] * STEPS] * 2, "up": [[0.5] * SEARCHED], "down": [[0.4] * SEARCHED]}
    levels = {"sigma": [sigma] * STEPS, "multiplier": [0.7] * STEPS}
    spent = {"nfe": 1000, "seconds": 60.0, "settled": True, "iterations": 1}
    return {"fingerprint": fingerprint(run) | changes, **levels, **rows, **spent}


def timeless(table):
    return {key: value for key, value in table.items() if key != "seconds"}


# -- measuring ----------------------------------------------------------------------------------------------------


def test_the_measured_table_moved_by_whole_steps_and_not_at_the_last_step(start_run):
    run, reports = start_run(), []
    table = calibrate(run, lambda *line: reports.append(line))
    sigmas = torch.tensor(table["sigma"])
    first = flow_sde_sigmas(run.grid, 0.7)
    assert sigmas[-1].item() == pytest.approx(first[-1].item())
    history = sigmas_to_multipliers(torch.tensor(table["history"]), run.grid)[:, :SEARCHED]
    torch.testing.assert_close(history.diff(dim=0).abs(), torch.full((3, SEARCHED), 0.01).double(), rtol=0, atol=2e-5)
    # brightness is continuous: every image gains or loses by every step's noise
    total = torch.tensor(table["up"]) + torch.tensor(table["down"])
    torch.testing.assert_close(total, torch.ones(3, SEARCHED), rtol=0, atol=2e-6)
    # T + T (T - 1) / 2 velocities per image: the trajectory and the completions from each of the T - 1 searched states
    assert table["nfe"] == 3 * 6 * (STEPS + STEPS * (STEPS - 1) // 2)
    assert [done for _, done, _ in reports] == [0, 1, 2, 3]


def test_measuring_leaves_weights_random_generators_and_the_run_as_they_were(start_run):
    run = start_run()
    weights = [p.detach().clone() for p in run.parameters]
    before, kernel, levels = rng_state(), run.kernel, run.noise_levels
    calibrate(run, silent)
    after = rng_state()
    assert torch.equal(before["tensors"]["cpu"], after["tensors"]["cpu"])
    assert before["json"] == after["json"]
    assert all(torch.equal(a, b) for a, b in zip(weights, run.parameters, strict=True))
    assert run.kernel == kernel
    assert torch.equal(run.noise_levels, levels)
    assert run.counters.iteration == 0


def test_measuring_twice_gives_the_same_table_and_another_seed_another(start_run):
    first, again = (calibrate(start_run(), silent) for _ in range(2))
    assert timeless(first) == timeless(again)
    assert first["seconds"] > 0
    other = calibrate(start_run("calibration.seed=7"), silent)
    assert other["up"] != first["up"]


def test_batches_do_not_change_the_counts(start_run):
    tables = [calibrate(start_run(f"train.rollout_batch={size}"), silent) for size in (2, 6)]
    assert tables[0]["up"] == tables[1]["up"]


def test_too_many_missing_scores_stop_it_with_their_share(start_run, tmp_path):
    file = tmp_path / "failing_reward.py"
    file.write_text("def score(images, prompts, metadata):\n    return [float('nan'), 0.5, 0.5] * (len(images) // 3)\n")
    run = start_run(f"rewards.brightness.type={file}:score", "train.rollout_batch=3")
    with pytest.raises(UserError, match="33% of the scores are missing, more than train.max_invalid_fraction"):
        calibrate(run, silent)


def test_a_request_to_stop_ends_it_without_a_table(start_run):
    run = start_run()
    run.interrupted = True
    with pytest.raises(Stopped, match="the same command continues it"):
        psi_table(run, silent)
    apply_psi(run)  # the loop, which asks next, ends the run in its own way
    assert run.kernel == "flow_sde"
    assert not (run.config.run_dir / "psi.json").exists()


def test_a_table_is_put_in_force_only_where_the_config_asks_for_one(start_run):
    run = start_run()
    save_table(run.config.run_dir / "psi.json", made_for(run))
    apply_psi(run)
    assert run.kernel == "psi_sde"
    assert run.noise_levels.tolist() == [0.5] * STEPS
    assert (run.counters.nfe, run.counters.seconds) == (1000, 60.0)
    apply_psi(run)  # as after a restart before the first iteration
    assert (run.counters.nfe, run.counters.seconds) == (1000, 60.0)
    plain = start_run()
    plain.config.sampler.psi = None
    apply_psi(plain)
    assert plain.kernel == "flow_sde"
    assert plain.noise_levels.tolist() == [0.7] * STEPS


def test_a_whole_run_measures_its_table_and_pays_for_it(config_file, train_here):
    changes = ["sampler.psi=auto", "credit.rule=gain", "train.iterations=1", *SETTINGS]
    train_here(config_file, *changes)  # refuses to go on if the first probability ratio is not 1
    folder = config_file.parent / "run"
    first = next(row for row in map(json.loads, (folder / "metrics.jsonl").open()) if row["kind"] == "train")
    table = json.loads((folder / "psi.json").read_text())
    spent = table["nfe"]
    assert first["seconds"] > table["seconds"] > 0
    assert not list(folder.rglob("*.partial.json"))
    train_here(config_file, "sampler.psi=null", "name=plain", *changes[1:])
    rows = map(json.loads, (config_file.parent / "plain" / "metrics.jsonl").open())
    assert first["nfe"] - spent == next(row for row in rows if row["kind"] == "train")["nfe"]


@pytest.mark.parametrize(
    ("changes", "searched"),
    [
        ({"plan": "full"}, range(9)),
        ({"plan": "window", "window_size": 2, "window_range": [1, 3]}, range(1, 3)),
        ({"plan": "window", "window_size": 6}, range(6)),  # the default range is no longer than the window
        ({"plan": "window", "window_size": 2, "window_range": [1, 4]}, range(9)),
        ({"plan": "sliding", "window_size": 2}, range(9)),
    ],
)
def test_a_window_that_cannot_move_is_searched_as_it_is_trained(changes, searched):
    assert plan_to_search(SamplerConfig(num_steps=10, **changes)).stochastic == tuple(searched)


def test_a_fixed_window_is_measured_alone_with_plain_steps_around_it(start_run):
    window = ["sampler.plan=window", "sampler.window_size=1", "sampler.window_range=[1,2]"]
    run = start_run(*window)
    table = calibrate(run, silent)
    assert table["fingerprint"]["stochastic"] == [1]
    first = flow_sde_sigmas(run.grid, 0.7).tolist()
    assert [table["sigma"][k] for k in (0, 2, 3)] == [first[k] for k in (0, 2, 3)]
    assert table["sigma"][1] != pytest.approx(first[1])
    assert table["nfe"] == 3 * 6 * (STEPS + 2)  # the trajectory and two steps more to complete the state before step 1
    assert [len(row) for row in table["up"] + table["down"]] == [1] * 6


def stop_at(run, iteration):
    def report(stage, done, total):
        run.interrupted = done == iteration

    return report


@pytest.mark.parametrize("kind", ["brightness", "random"])
def test_a_calibration_that_was_stopped_goes_on_exactly(start_run, tmp_path, kind):
    changes = ["calibration.iterations=4"]
    if kind == "random":  # draws from the global generators
        file = tmp_path / "moody.py"
        file.write_text(
            "import random, torch\n"
            "def score(images, prompts, metadata):\n"
            "    return [random.random() + torch.rand(()).item() for _ in images]\n"
        )
        changes.append(f"rewards.brightness.type={file}:score")
    whole, partial = calibrate(start_run(*changes), silent), tmp_path / "psi.partial.json"
    run = start_run(*changes)
    with pytest.raises(Stopped):
        calibrate(run, stop_at(run, 2), partial)
    kept = json.loads(partial.read_text())
    assert len(kept["counts"]) == 2
    assert kept["nfe"] == whole["nfe"] // 2
    asked = []
    again = calibrate(start_run(*changes), lambda stage, done, total: asked.append(done), partial)
    assert asked == [2, 3, 4]
    assert timeless(again) == timeless(whole)
    assert again["seconds"] > round(kept["seconds"], 3)
    # killed after the last iteration and before the table was written
    last = calibrate(start_run(*changes), lambda stage, done, total: asked.append(done), partial)
    assert asked == [2, 3, 4, 4]
    assert last == again


@pytest.mark.parametrize("left", ["{", "[]", "other settings"])
def test_what_does_not_belong_to_this_calibration_is_measured_anew(start_run, tmp_path, left):
    partial = tmp_path / "psi.partial.json"
    run = start_run("calibration.tolerance=0.3")
    if left == "other settings":
        with pytest.raises(Stopped):
            calibrate(run, stop_at(run, 1), partial)
    else:
        partial.write_text(left)
    asked = []
    calibrate(start_run(), lambda stage, done, total: asked.append(done), partial)
    assert asked == [0, 1, 2, 3]


def test_a_run_stopped_while_calibrating_continues_and_leaves_one_table(start_run):
    run = start_run()
    with pytest.raises(Stopped):
        psi_table(run, stop_at(run, 2))
    assert [p.name for p in run.config.run_dir.glob("psi*")] == ["psi.partial.json"]
    run, asked = start_run(), []
    psi_table(run, lambda stage, done, total: asked.append(done))
    assert asked == [2, 3]
    assert run.counters.nfe == 3 * 6 * 10
    assert run.counters.seconds == json.loads((run.config.run_dir / "psi.json").read_text())["seconds"]
    assert [p.name for p in run.config.run_dir.glob("psi*")] == ["psi.json"]


def test_a_reward_that_tells_no_images_apart_is_warned_about_with_the_steps(start_run, tmp_path):
    file = tmp_path / "flat.py"
    file.write_text("def score(images, prompts, metadata):\n    return [0.5] * len(images)\n")
    run = start_run(f"rewards.brightness.type={file}:score")
    run.console = Console(file=io.StringIO(), width=400)
    calibrate(run, silent)
    calibrate(run, silent)
    assert run.console.file.getvalue().count("the noise of step(s) 0, 1, 2 was hardly measured: fewer than 5%") == 1
    run = start_run()
    run.console = Console(file=io.StringIO(), width=400)
    calibrate(run, silent)
    assert "hardly measured" not in run.console.file.getvalue()


def test_without_a_terminal_every_tenth_iteration_is_a_line():
    console = Console(file=io.StringIO(), width=100)
    with calibration_progress(console) as report:
        for done in range(24):
            report("calibrating", done, 100)
        report("calibrating", 24, 24)
    lines = [line for line in console.file.getvalue().splitlines() if line]
    assert lines == [f"calibrating noise: {n} iterations" for n in ("0 of 100", "10 of 100", "20 of 100", "24 of 24")]


# -- storing and finding ------------------------------------------------------------------------------------------


def test_auto_measures_once_and_finds_the_table_again_at_the_same_charge(start_run):
    run = start_run()
    table = psi_table(run, silent)
    cached = cache_path(run.config, fingerprint(run))
    assert json.loads(cached.read_text()) == json.loads((run.config.run_dir / "psi.json").read_text())
    assert table.dtype == torch.float64
    assert table.tolist() == json.loads(cached.read_text())["sigma"]
    charged = run.counters.nfe
    assert charged == 3 * 6 * 10

    second = start_run("name=second")
    assert torch.equal(psi_table(second, never_called), table)
    assert second.counters.nfe == charged
    assert (second.config.run_dir / "psi.json").is_file()


def never_called(*_):
    raise AssertionError("measured again")


def test_auto_measures_again_for_other_calibration_settings(start_run):
    run = start_run()
    save_table(cache_path(run.config, fingerprint(run)), made_for(run))
    assert psi_table(run, never_called).tolist() == [0.5] * STEPS
    other = start_run("calibration.tolerance=0.3")
    assert psi_table(other, silent).tolist() != [0.5] * STEPS


def test_a_run_that_continues_takes_its_own_copy(start_run, tmp_path):
    first = start_run()
    save_table(tmp_path / "table.json", made_for(first, sigma=0.5))
    first.config.sampler.psi = str(tmp_path / "table.json")
    assert psi_table(first, silent).tolist() == [0.5] * STEPS
    first.counters.iteration = 1
    first.save()

    save_table(tmp_path / "table.json", made_for(first, sigma=0.9))
    again = start_run()
    assert again.counters.iteration == 1
    again.config.sampler.psi = str(tmp_path / "table.json")
    assert psi_table(again, silent).tolist() == [0.5] * STEPS
    assert (again.counters.nfe, again.counters.seconds) == (1000, 60.0)  # charged once, by the first start


def test_a_run_that_continues_does_not_measure_with_changed_weights(start_run):
    run = start_run()
    run.counters.iteration = 1
    with pytest.raises(UserError, match=r"psi\.json is missing"):
        psi_table(run, never_called)


def test_a_table_for_other_settings_is_refused_with_every_difference(start_run, tmp_path):
    run = start_run()
    grid = [1.0, 0.9, 0.8, 0.1, 0.0]
    rewards = {"brightness": {"type": "brightness", "weight": 2.0, "args": {}}}
    changes = {"grid": grid, "rewards": rewards, "guidance_scale": 4.5, "precision": "bf16", "prompts": "geneval"}
    save_table(tmp_path / "other.json", made_for(run, **changes, stochastic=[1, 2]))
    with pytest.raises(UserError) as problem:
        load_table(tmp_path / "other.json", fingerprint(run))
    first, *lines = str(problem.value).splitlines()
    assert "other.json was made for other settings" in first
    now = json.dumps([round(float(t), 6) for t in run.grid])
    assert [line.strip() for line in lines] == [
        f"grid: [1.0, 0.9, 0.8, 0.1, 0.0] in the table, {now} in this run",
        "guidance_scale: 4.5 in the table, 1.0 in this run",
        f'precision: "bf16" in the table, "{run.config.model.precision}" in this run',
        f'prompts: "geneval" in the table, "{run.config.prompts.train}" in this run',
        "rewards.brightness.weight: 2.0 in the table, 1.0 in this run",
        "stochastic: [1, 2] in the table, [0, 1, 2] in this run",
    ]


def test_calibration_settings_are_recorded_but_not_compared(start_run, tmp_path):
    run = start_run()
    table = made_for(run, calibration=dataclasses.asdict(run.config.calibration) | {"samples": 999})
    save_table(tmp_path / "table.json", table)
    assert load_table(tmp_path / "table.json", fingerprint(run))["fingerprint"]["calibration"]["samples"] == 999


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"fingerprint": {}, "nfe": 1, "sigma": [0.5]}',
        '{"fingerprint": {"grid": []}, "nfe": 1, "sigma": [0.0]}',
        '{"fingerprint": {"grid": []}, "nfe": 1, "sigma": [null]}',
        '{"fingerprint": {"grid": []}, "nfe": 1, "sigma": [0.5], "seconds": "many"}',
    ],
)
def test_a_file_that_is_no_table_is_named(start_run, tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table\.json: not a table"):
        load_table(path, {})
    with pytest.raises(UserError, match=r"no file .*missing\.json"):
        load_table(tmp_path / "missing.json", {})


def test_numbers_survive_storing(start_run, tmp_path):
    run = start_run()
    table = made_for(run, sigma=math.pi / 3)
    save_table(tmp_path / "table.json", table)
    assert load_table(tmp_path / "table.json", fingerprint(run)) == table


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_writes_table_and_chart_where_auto_looks_and_nothing_else(config_file, start_run):
    folder = config_file.parent
    before = set(folder.rglob("*"))
    result = CliRunner().invoke(app, ["calibrate", str(config_file), *SETTINGS])
    assert result.exit_code == 0, result.output
    written = sorted(p for p in set(folder.rglob("*")) - before if p.is_file())
    assert [p.suffix for p in written] == [".json", ".png"]
    run = start_run()
    assert written[0] == cache_path(run.config, fingerprint(run))
    assert psi_table(run, never_called).tolist() == json.loads(written[0].read_text())["sigma"]


def test_the_command_shows_the_steps_of_a_window_and_continues_beside_its_table(config_file, tmp_path):
    window = ["sampler.plan=window", "sampler.window_size=2", "sampler.window_range=[1,3]"]
    out = tmp_path / "here" / "mine.json"
    command = ["calibrate", str(config_file), "--out", str(out), *SETTINGS, *window]
    assert CliRunner().invoke(app, command).exit_code == 0
    table = json.loads(out.read_text())
    partial, counts = out.with_name("mine.partial.json"), [[[6, 0], [0, 6], [6, 6]]] * 3
    save_table(partial, {"fingerprint": table["fingerprint"], "nfe": 77, "seconds": 5.0, "counts": counts})
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "77 network evaluations" in result.output
    rows = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    assert [row[-2].strip() for row in rows] == ["-", "100%", "0%", "-"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine.json", "mine.png"]


def test_the_chart_shows_the_searched_steps_at_their_own_places(start_run):
    table = made_for(start_run(), stochastic=[1, 2])
    table |= {"up": [[0.5, 0.6]], "down": [[0.4, 0.3]]}
    sigma, multiplier, shares, search = chart(table).axes[:4]
    for axes in (sigma, multiplier):
        assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2]]
    assert [round(bar.get_x() + bar.get_width() / 2, 3) for bar in shares.containers[0]] == [0.8, 1.8]
    assert len(search.lines) == 2
    table["fingerprint"].pop("stochastic")  # as written before windows were searched
    assert list(chart(table).axes[0].lines[0].get_xdata()) == [0, 1]


def test_the_command_refuses_other_kernels(config_file):
    result = CliRunner().invoke(app, ["calibrate", str(config_file), "sampler.kernel=cps"])
    assert result.exit_code == 1
    assert "only flow_sde takes a noise table, got 'cps'" in result.output.replace("\n", "")


def test_the_chart_compares_the_first_iteration_with_the_mean_of_the_last_ten(start_run, tmp_path):
    rows = [[0.9, 0.1]] * 2 + [[0.2, 0.4], [0.4, 0.8]] * 5
    assert ends(rows) == ([0.9, 0.1], pytest.approx([0.3, 0.6]))
    path = draw_chart(tmp_path / "folder" / "chart.png", made_for(start_run()))
    assert path.read_bytes().startswith(b"\x89PNG")
