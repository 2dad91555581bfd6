"""What is learnt depends neither on the number of processes nor on how a batch is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.runfolder import metric_rows

REPOSITORY = Path(__file__).parents[2]
LAUNCHERS = {
    "accelerate": [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
# The clip is a threshold: a ratio beside it could fall on either side of it by rounding, so it is set far away.
CHANGES = {
    "flow_grpo": {"objective": {"clip_range": 0.5}, "optim": {"lr": 3e-4}, "train": {"iterations": 3}},
    "nft": {"optim": {"lr": 3e-4}, "train": {"iterations": 3}},
    # without a floor the group's std, here of tiny gains, would blow rounding up to the size of an advantage
    "dense_grpo": {
        "objective": {"clip_range": 0.5},
        "optim": {"lr": 3e-4},
        "advantage": {"std_floor": 0.05},
        "train": {"iterations": 3, "updates_per_iteration": 2},
    },
    "tp_grpo": {
        "sampler": {"plan": "sliding", "window_size": 2, "window_every": 1, "num_steps": 5},
        "credit": {"turning_point": {"consistent": False}},
        "objective": {"clip_range": 0.5},
        "optim": {"lr": 3e-4},
        "advantage": {"std_floor": 0.05},
        "train": {"iterations": 3},
    },
}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Same rows to 1e-5 (absolute below 1, relative above), but for wall times."""
    first, second = (metric_rows(folder / "metrics.jsonl")[0] for folder in (one, other))
    assert [(r["kind"], r["iteration"]) for r in first] == [(r["kind"], r["iteration"]) for r in second]
    assert sum(r["kind"] == "train" for r in first) == 3
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert a["nfe"] == b["nfe"]
        names = [k for k in a if k.startswith(("reward/", "eval/", "train/", "values/", "sample/", "credit/"))]
        assert {k: a[k] for k in names} == pytest.approx({k: b[k] for k in names}, rel=1e-5, abs=1e-5)


@pytest.fixture(params=["flow_grpo", "nft", "dense_grpo", "tp_grpo"])
def alone(request, tmp_path, write_config, train_here) -> tuple[Path, Path]:
    """A configuration and the folder of its run on one process."""
    config = write_config(tmp_path, request.param, CHANGES[request.param])
    train_here(config, "name=alone")
    return config, tmp_path / "alone"


def test_cutting_of_batches(alone, train_here):
    config, folder = alone
    train_here(config, "name=cut", "train.micro_batch=16", "train.rollout_batch=8", "completions.chunk=5")
    assert_equal_runs(folder, folder.with_name("cut"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(
    ("alone", "launcher"),
    [("flow_grpo", "accelerate"), ("nft", "torchrun"), ("dense_grpo", "torchrun")],
    indirect=["alone"],
)
def test_two_processes(alone, launcher):
    config, folder = alone
    done = subprocess.run(
        [*LAUNCHERS[launcher], "-m", "align.train", str(config), "name=both"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    both = folder.with_name("both")
    assert json.loads((both / "environment.json").read_text())["processes"] == 2
    assert_equal_runs(folder, both)
