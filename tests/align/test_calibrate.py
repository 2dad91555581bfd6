"""The noise table of a run: measured on a tiny genuine pipeline, stored, found again, refused where it does not belong."""

import dataclasses
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
    fingerprint,
    load_table,
    psi_table,
    save_table,
)
from align.cli import app
from align.config import load_config
from align.errors import UserError
from align.psi_chart import draw_chart, ends
from align.run import rng_state, start
from samplers.calibration import flow_sde_sigmas, sigmas_to_multipliers

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
    return {"fingerprint": fingerprint(run) | changes, **levels, **rows, "nfe": 1000, "settled": True, "iterations": 1}


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
    assert first == again
    other = calibrate(start_run("calibration.seed=7"), silent)
    assert other["up"] != first["up"]


def test_batches_do_not_change_the_counts(start_run):
    tables = [calibrate(start_run(f"train.rollout_batch={size}"), silent) for size in (2, 6)]
    assert tables[0]["up"] == tables[1]["up"]


def test_too_many_missing_scores_stop_it_with_their_share(start_run, tmp_path):
    file = tmp_path / "failing_reward.py"
    file.write_text("def score(images, prompts, metadata):\n    return [float('nan')] + [0.5] * (len(images) - 1)\n")
    run = start_run(f"rewards.brightness.type={file}:score", "train.rollout_batch=3")
    with pytest.raises(UserError, match="33% of the scores are missing, more than train.max_invalid_fraction"):
        calibrate(run, silent)


def test_a_request_to_stop_ends_it_without_a_table(start_run):
    run = start_run()
    run.interrupted = True
    with pytest.raises(Stopped, match="no table was written"):
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
    assert run.counters.nfe == 1000
    apply_psi(run)  # as after a restart before the first iteration
    assert run.counters.nfe == 1000
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
    spent = json.loads((folder / "psi.json").read_text())["nfe"]
    train_here(config_file, "sampler.psi=null", "name=plain", *changes[1:])
    rows = map(json.loads, (config_file.parent / "plain" / "metrics.jsonl").open())
    assert first["nfe"] - spent == next(row for row in rows if row["kind"] == "train")["nfe"]


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
    assert again.counters.nfe == 1000  # charged once, by the first start


def test_a_run_that_continues_does_not_measure_with_changed_weights(start_run):
    run = start_run()
    run.counters.iteration = 1
    with pytest.raises(UserError, match=r"psi\.json is missing"):
        psi_table(run, never_called)


def test_a_table_for_other_settings_is_refused_with_every_difference(start_run, tmp_path):
    run = start_run()
    grid = [1.0, 0.9, 0.8, 0.1, 0.0]
    rewards = {"brightness": {"type": "brightness", "weight": 2.0, "args": {}}}
    save_table(tmp_path / "other.json", made_for(run, grid=grid, rewards=rewards, guidance_scale=4.5))
    with pytest.raises(UserError) as problem:
        load_table(tmp_path / "other.json", fingerprint(run))
    first, *lines = str(problem.value).splitlines()
    assert "other.json was made for other settings" in first
    now = json.dumps([round(float(t), 6) for t in run.grid])
    assert [line.strip() for line in lines] == [
        f"grid: [1.0, 0.9, 0.8, 0.1, 0.0] in the table, {now} in this run",
        "guidance_scale: 4.5 in the table, 1.0 in this run",
        "rewards.brightness.weight: 2.0 in the table, 1.0 in this run",
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
        '{"fingerprint": {}, "nfe": 1, "sigma": [0.0]}',
        '{"fingerprint": {}, "nfe": 1, "sigma": [null]}',
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


def test_the_command_refuses_other_kernels(config_file):
    result = CliRunner().invoke(app, ["calibrate", str(config_file), "sampler.kernel=cps"])
    assert result.exit_code == 1
    assert "only flow_sde takes a noise table, got 'cps'" in result.output.replace("\n", "")


def test_the_chart_compares_the_first_iteration_with_the_mean_of_the_last_ten(start_run, tmp_path):
    rows = [[0.9, 0.1]] * 2 + [[0.2, 0.4], [0.4, 0.8]] * 5
    assert ends(rows) == ([0.9, 0.1], pytest.approx([0.3, 0.6]))
    path = draw_chart(tmp_path / "folder" / "chart.png", made_for(start_run()))
    assert path.read_bytes().startswith(b"\x89PNG")
