"""A run that is killed or stopped, at any moment, ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from align.checkpoint import checkpoints, load_checkpoint
from align.errors import UserError
from align.runfolder import metric_rows

REPOSITORY = Path(__file__).parents[2]
UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
REWARD = Path(__file__).with_name("moody_reward.py")
KEPT = 2


@pytest.fixture(params=["flow_grpo", "nft"])
def method(request) -> str:
    return request.param


@pytest.fixture
def configure(tmp_path, write_config) -> Callable[..., Path]:
    """configure(preset, **settings of checkpoint) -> the YAML file of a run with the moody reward."""

    def write(preset: str, **checkpoint: int) -> Path:
        reward = {"moody": {"type": f"{REWARD}:brightness"}}
        changes: dict[str, Any] = {"rewards": reward, "checkpoint": {"keep": KEPT, **checkpoint}}
        changes["train"] = {"rollout_batch": 8}  # one reward call an iteration
        return write_config(tmp_path, preset, changes)

    return write


def killed(config: Path, call: int, delay: float) -> int:
    """Exit status of the run in a process of its own that gets SIGKILL `delay` seconds into reward call `call`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "align.train", str(config), "name=disturbed"],
        cwd=REPOSITORY,
        env=environment | {"MOMENT": f"SIGKILL {call} {delay}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, -9), done.stdout + done.stderr
    return done.returncode


def assert_complete(folder: Path) -> None:
    """Every checkpoint that has a checkpoint's name can be loaded whole."""
    for checkpoint in (folder / "checkpoints").glob("iteration-*"):
        tensors, state = load_checkpoint(checkpoint)
        assert state["iteration"] == int(checkpoint.name.removeprefix("iteration-"))
        assert any(key.startswith("optim.") for key in tensors) == (state["iteration"] > 0)
        assert load_file(checkpoint / "adapter" / "pytorch_lora_weights.safetensors")


def assert_same_end(disturbed: Path, undisturbed: Path) -> None:
    """Last checkpoints equal bit for bit, metrics equal but for wall times, nothing left lying about."""
    last, expected = checkpoints(disturbed)[-1], checkpoints(undisturbed)[-1]
    assert last.name == expected.name == "iteration-000006"
    ours, theirs = load_file(last / "state.safetensors"), load_file(expected / "state.safetensors")
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    states = [json.loads((folder / "state.json").read_text()) for folder in (last, expected)]
    for state in states:
        state["counters"].pop("seconds")
    assert states[0] == states[1]
    assert timeless(disturbed) == timeless(undisturbed)
    assert len(checkpoints(disturbed)) == KEPT
    assert not list(disturbed.rglob(".tmp-*"))


def timeless(folder: Path) -> list[dict[str, Any]]:
    rows = metric_rows(folder / "metrics.jsonl")[0]
    return [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("time/")} for row in rows]


@pytest.mark.e2e
def test_three_iterations_and_three_more_after_kill_9_are_six(configure, train_here, tmp_path, method):
    # calls: base evaluation, iterations 0 1 2, evaluation, iteration 3, and the end within iteration 4
    config = configure(method, every=3, keep=KEPT)
    assert killed(config, call=7, delay=0) == -9
    assert [c.name for c in checkpoints(tmp_path / "disturbed")] == ["iteration-000003"]
    assert len([r for r in timeless(tmp_path / "disturbed") if r["kind"] == "train"]) == 4
    train_here(config, "name=disturbed")
    train_here(config, "name=undisturbed")
    assert_same_end(tmp_path / "disturbed", tmp_path / "undisturbed")


def test_step_rewards_on_a_calibrated_noise_table_continue_exactly(write_config, train_here, tmp_path):
    """The table is measured once, before training; a continued run takes the copy in its folder."""
    config = write_config(tmp_path, "dense_grpo", {"checkpoint": {"keep": KEPT}})
    train_here(config, "name=disturbed", "train.iterations=3")
    table = tmp_path / "disturbed" / "psi.json"
    measured, found = table.read_bytes(), json.loads(table.read_text())
    assert all(sigma > 0 for sigma in found["sigma"])
    for cached in (tmp_path / "psi").iterdir():
        cached.unlink()
    train_here(config, "name=disturbed")
    assert table.read_bytes() == measured
    train_here(config, "name=undisturbed")
    again = json.loads((tmp_path / "undisturbed" / "psi.json").read_text())
    assert again | {"seconds": found["seconds"]} == found
    assert_same_end(tmp_path / "disturbed", tmp_path / "undisturbed")


STATEFUL: dict[str, dict[str, Any]] = {
    "ddpo": {
        "advantage": {"history": {"entries": 6, "min_count": 5}},
        "train": {"inner_epochs": 2, "step_fraction": 0.5},
    },
    "b2_diffurl": {
        "sampler": {"kernel": "cps", "noise_level": 0.7, "branch": {"suffix_start": 2, "suffix_end": 4, "stages": 4}},
        "advantage": {"history": {"iterations": 2}},
    },
    "prdp": {"sampler": {"kernel": "flow_sde", "noise_level": 0.7}, "train": {"inner_epochs": 2}},
}


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Two layers of settings of two levels."""
    return {key: {**low.get(key, {}), **high.get(key, {})} for key in {**low, **high}}


@pytest.mark.parametrize("preset", list(STATEFUL))
def test_histories_curricula_and_pairs_continue_exactly(write_config, train_here, tmp_path, monkeypatch, preset):
    """Stopped when the images of the fourth iteration are scored, which are then not yet part of the history."""
    changes = {
        "rewards": {"moody": {"type": f"{REWARD}:brightness"}},
        "sampler": {"num_steps": 4},
        "checkpoint": {"keep": KEPT, "every": 100},
    }
    overrides = ["train.rollout_batch=8"]  # one reward call an iteration
    overrides += [f"model.path={UNET['sd_pipeline'](tmp_path / 'sd15')}"] if preset == "ddpo" else []
    config = write_config(tmp_path, preset, merged(changes, STATEFUL[preset]))
    monkeypatch.setenv("MOMENT", "SIGTERM 6 0")
    assert train_here(config, "name=disturbed", *overrides) is None
    monkeypatch.delenv("MOMENT")
    (stopped,) = checkpoints(tmp_path / "disturbed")
    assert stopped.name == "iteration-000003"
    train_here(config, "name=disturbed", *overrides)
    train_here(config, "name=undisturbed", *overrides)
    assert_same_end(tmp_path / "disturbed", tmp_path / "undisturbed")
    before, after = (load_checkpoint(folder)[1]["history"] for folder in checkpoints(tmp_path / "disturbed"))
    kept = [{iteration for rows in past.values() for iteration, _ in rows} for past in (before, after)]
    # four prompts, two an iteration: each came up at every other
    assert (
        kept
        == {"ddpo": [{0, 1, 2}, {2, 3, 4, 5}], "b2_diffurl": [{0, 1, 2}, {3, 4, 5}], "prdp": [set(), set()]}[preset]
    )
    assert preset != "ddpo" or {len(rows) for rows in after.values()} == {6}


def test_judging_while_sampling_goes_on_continues_exactly_also_without_it(configure, train_here, tmp_path, monkeypatch):
    """Signalled in the thread that judges; the reward draws from global generators, and the rest is judged afterwards."""
    config = configure("flow_grpo", every=100)
    cut = "train.rollout_batch=4"  # two reward calls an iteration, so the second half is sampled beside the first
    monkeypatch.setenv("MOMENT", "SIGTERM 6 0")  # base evaluation, two iterations, and within the third
    assert train_here(config, "name=disturbed", cut, "train.async_scoring=true") is None
    monkeypatch.delenv("MOMENT")
    (stopped,) = checkpoints(tmp_path / "disturbed")
    assert stopped.name == "iteration-000002"
    train_here(config, "name=disturbed", cut)
    train_here(config, "name=undisturbed", cut, "train.async_scoring=true")
    assert_same_end(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.e2e
@pytest.mark.slow
def test_killed_at_random_moments_in_a_row(configure, train_here, tmp_path):
    config = configure("nft", every=1)
    draw = random.Random(0)
    for _ in range(10):
        # an iteration here takes some 0.1 s, most of it training, averaging, and writing the checkpoint
        killed(config, call=draw.randint(1, 4), delay=draw.uniform(0.01, 0.2))
        assert_complete(tmp_path / "disturbed")
    train_here(config, "name=disturbed")
    train_here(config, "name=undisturbed")
    assert_same_end(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.parametrize("call", [1, 2, 5, 6])
def test_sigterm_writes_a_checkpoint_and_the_same_command_continues(
    configure, train_here, tmp_path, monkeypatch, method, call
):
    """Signalled in the base evaluation, in the first iteration, in a later evaluation, and in a later iteration."""
    config = configure(method, every=100)
    done = {1: 0, 2: 0, 5: 3, 6: 3}[call]  # iterations completed by then: calls are as in the test above
    monkeypatch.setenv("MOMENT", f"SIGTERM {call} 0")
    assert train_here(config, "name=disturbed") is None
    monkeypatch.delenv("MOMENT")
    assert [c.name for c in checkpoints(tmp_path / "disturbed")] == [f"iteration-{done:06d}"]
    assert_complete(tmp_path / "disturbed")
    assert train_here(config, "name=disturbed", "checkpoint.keep=1")["iterations"] == 6
    train_here(config, "name=undisturbed", "checkpoint.keep=1")
    last = [checkpoints(tmp_path / name)[-1] / "state.safetensors" for name in ("disturbed", "undisturbed")]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert timeless(tmp_path / "disturbed") == timeless(tmp_path / "undisturbed")


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("whole_group", [False, True], ids=["launcher", "group"])
def test_sigterm_to_the_launcher_reaches_the_run(configure, train_here, tmp_path, whole_group):
    """`accelerate launch` passes no signal on; a scheduler may signal the launcher alone or the whole group."""
    config = configure("nft", every=100_000)
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launcher = subprocess.Popen(
        [accelerate, "launch", "--cpu", "--num_processes", "1", "-m", "align.train", str(config), "name=disturbed"]
        + ["train.iterations=100000", "eval.every=0"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    try:
        metrics = tmp_path / "disturbed" / "metrics.jsonl"
        until = time.monotonic() + 300
        while not any(r["kind"] == "train" for r in metric_rows(metrics)[0]):
            assert launcher.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        family = psutil.Process(launcher.pid).children(recursive=True)
        if whole_group:
            os.killpg(launcher.pid, 15)
        else:
            launcher.terminate()
        launcher.wait(60)
        _, alive = psutil.wait_procs(family, timeout=120)
        assert not alive
    finally:
        for process in [*family, psutil.Process(launcher.pid)] if launcher.poll() is None else family:
            if process.is_running():
                process.kill()
    (checkpoint,) = checkpoints(tmp_path / "disturbed")
    iteration = load_checkpoint(checkpoint)[1]["iteration"]
    assert iteration >= 1
    summary = train_here(config, "name=disturbed", f"train.iterations={iteration + 1}")
    assert summary is not None
    assert summary["iterations"] == iteration + 1


@pytest.fixture
def finished(configure, train_here, tmp_path) -> tuple[Path, Path]:
    """A configuration and the folder of its finished run."""
    config = configure("nft", every=1)
    train_here(config)
    return config, tmp_path / "run"


def test_what_a_finished_run_keeps_refuses_and_repeats(finished, train_here):
    config, folder = finished
    assert [c.name for c in checkpoints(folder)] == ["iteration-000005", "iteration-000006"]
    with pytest.raises(UserError, match=r"other settings \(optim\.lr, train\.group_size\)"):
        train_here(config, "optim.lr=0.5", "train.group_size=8")
    with pytest.raises(UserError, match="already holds a run"):
        train_here(config, "checkpoint.resume=never")
    with pytest.raises(UserError, match="is not a checkpoint"):
        train_here(config, f"checkpoint.resume={folder}")
    # the same command once more changes nothing, and what a kill left half-written goes with the next checkpoint
    before, summary = timeless(folder), json.loads((folder / "summary.json").read_text())
    assert train_here(config, "train.micro_batch=7") == summary
    assert timeless(folder) == before
    half = folder / "checkpoints" / ".tmp-half"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    train_here(config, "train.iterations=7", "checkpoint.keep=1")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["iteration-000007"]


def test_a_checkpoint_of_another_adapter_is_refused(finished, train_here):
    config, folder = finished
    other = checkpoints(folder)[-1]
    targets = "model.lora.targets=[to_q]"
    with pytest.raises(UserError, match="made for another model, LoRA or objective"):
        train_here(config, "name=other", targets, f"checkpoint.resume={other}")
