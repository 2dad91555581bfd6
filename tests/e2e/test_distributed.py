"""What is learnt depends neither on the number of processes nor on how a batch is cut."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.config import load_config
from align.geometry import geometry, local_order
from align.prompts import prompt_indices
from align.runfolder import metric_rows

REPOSITORY = Path(__file__).parents[2]
UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
SEVERAL = str(Path(__file__).with_name("several_runs.py"))
LAUNCHERS = {
    "accelerate": [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
COMPARED = (
    "reward/", "eval/", "train/", "values/", "sample/", "credit/", "select/", "weight/", "ensemble/", "uncertainty/",
    "advantage/", "gate/",
)  # fmt: skip
# The clip is a threshold: a ratio beside it could fall on either side of it by rounding, so it is set far away.
CHANGES: dict[str, dict[str, Any]] = {
    "flow_grpo": {
        "objective": {"clip_range": 0.5},
        "optim": {"lr": 3e-4},
        "train": {"iterations": 3},
        "eval": {"diversity": {"prompts": 2, "images": 2, "embedder": {"type": "proxy"}}},
    },
    # two rewards with advantages of their own, one of them behind a gate that some images do not pass
    "nft": {
        "rewards": {
            "bright": {"type": "brightness"},
            "near": {"type": f"{Path(__file__).with_name('near_reward.py')}:score", "weight": 0.5, "args": {"target": 0.527}},
        },
        "combine": {"rule": "decoupled", "gates": {"bright": 0.525}},
        "advantage": {"std_floor": 0.05},
        "optim": {"lr": 3e-4},
        "train": {"iterations": 3},
    },
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
    # eps stands in for a floor; histories of 6 are full, and in use, from the second iteration on
    "ddpo": {
        "sampler": {"num_steps": 4, "guidance_scale": 2.0},
        "advantage": {"eps": 0.01, "history": {"entries": 6, "min_count": 5}},
        "objective": {"clip_range": 0.5},
        "optim": {"lr": 3e-4},
        "train": {"iterations": 3, "prompts_per_iteration": 4, "inner_epochs": 2, "step_fraction": 0.5},
    },
    # four groups in two updates on two processes: each has one group an update, and of one group nothing is selected
    "b2_diffurl": {
        "rewards": {"partly": {"type": f"{Path(__file__).with_name('partial_reward.py')}:score"}},
        "sampler": {
            "kernel": "cps", "noise_level": 0.7, "num_steps": 4,
            "branch": {"suffix_start": 3, "suffix_end": 4, "stages": 2, "prefix": "stochastic"},
        },
        "advantage": {"eps": 0.002},
        "selection": {"pos_threshold": 0.2, "neg_threshold": -0.2},
        "objective": {"clip_range": 0.5},
        "optim": {"lr": 3e-4},
        "train": {"iterations": 3, "prompts_per_iteration": 4},
    },
    # two groups in two updates: on two processes every group is on both
    "prdp": {
        "sampler": {"kernel": "flow_sde", "noise_level": 0.7},
        "objective": {"pair_beta": 0.01, "step_clip": 0.5},
        "optim": {"lr": 3e-4},
        "train": {"iterations": 3, "inner_epochs": 2, "updates_per_iteration": 2},
    },
    # units from three base images, of which one process has two; weights from a committee and from ranks
    "dance_grpo": {
        "rewards": {
            "committee": {
                "type": "ensemble",
                "args": {"members": {
                    "bright": {"type": "brightness"},
                    "near": {"type": f"{Path(__file__).with_name('near_reward.py')}:score", "args": {"target": 0.4}},
                }},
            },
            "watched": {
                "type": f"{Path(__file__).with_name('near_reward.py')}:score", "weight": 0.0, "args": {"target": 0.527},
            },
        },
        "uncertainty": {
            "mode": "weight", "sources": ["native", "rank_disagreement"], "auxiliaries": ["watched"],
        },
        "eval": {"prompts": 3},
        "objective": {"clip_range": 0.5},
        "advantage": {"std_floor": 0.5},
        "optim": {"lr": 3e-4},
        "train": {"iterations": 3},
    },
}  # fmt: skip


def launch(launcher: str, *arguments: str) -> None:
    """Two processes, to their successful end."""
    done = subprocess.run(
        [*LAUNCHERS[launcher], *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_equal_runs(one: Path, other: Path) -> None:
    """Same rows to 1e-5 (absolute below 1, relative above), but for wall times."""
    first, second = (metric_rows(folder / "metrics.jsonl")[0] for folder in (one, other))
    assert [(r["kind"], r["iteration"]) for r in first] == [(r["kind"], r["iteration"]) for r in second]
    assert sum(r["kind"] == "train" for r in first) == 3
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert a["nfe"] == b["nfe"]
        names = [k for k in a if k.startswith(COMPARED)]
        assert {k: a[k] for k in names} == pytest.approx({k: b[k] for k in names}, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return UNET["sd_pipeline"](tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture
def configure(tmp_path, write_config, sd15) -> Callable[[str], Path]:
    """configure(method) -> a configuration in a folder of its own, where its runs land too."""

    def write(method: str) -> Path:
        changes = CHANGES[method] | ({"model": {"path": str(sd15)}} if method == "ddpo" else {})
        return write_config(tmp_path / method, method, changes)

    return write


@pytest.fixture(params=["flow_grpo", "nft", "dense_grpo", "tp_grpo", "ddpo", "b2_diffurl", "prdp"])
def alone(request, configure, train_here) -> tuple[Path, Path]:
    """A configuration and the folder of its run on one process."""
    config = configure(request.param)
    train_here(config, "name=alone")
    return config, config.with_name("alone")


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
    launch(launcher, "-m", "align.train", str(config), "name=both")
    both = folder.with_name("both")
    assert json.loads((both / "environment.json").read_text())["processes"] == 2
    assert_equal_runs(folder, both)


@pytest.mark.e2e
@pytest.mark.slow
def test_two_processes_with_histories_selections_and_pairs(configure, train_here):
    """DDPO, B2-DiffuRL, PRDP and a committee with weights, one after the other in one launch."""
    configs = [configure(method) for method in ("ddpo", "b2_diffurl", "prdp", "dance_grpo")]
    for config in configs:
        train_here(config, "name=alone")
    launch("torchrun", SEVERAL, *map(str, configs))
    for config in configs:
        assert json.loads((config.with_name("both") / "environment.json").read_text())["processes"] == 2
        assert_equal_runs(config.with_name("alone"), config.with_name("both"))
    ddpo, b2, prdp, trust = (metric_rows(config.with_name("alone") / "metrics.jsonl")[0] for config in configs)
    assert [row["train/history_fraction"] for row in ddpo if row["kind"] == "train"] == [0, 1, 1]
    kept = [row["select/kept_fraction"] for row in b2 if row["kind"] == "train"]
    assert all(3 / 16 <= fraction <= 6 / 16 for fraction in kept)
    assert all(row["train/pair_target"] > 0 for row in prdp if row["kind"] == "train")
    assert all(row["weight/ess"] < 8 for row in trust if row["kind"] == "train")


def test_these_selections_leave_an_update_empty_on_one_process_only(configure):
    """What the launch above is about: the group of which nothing is kept is all of an update on one of two processes."""
    config = load_config(configure("b2_diffurl"))
    shape = geometry(config, 2)
    for iteration in range(3):
        flat = prompt_indices(4, 4, iteration, config.train.seed).index(0)
        owners = [[{i // 4 for i in update} for update in local_order(shape, rank, 0, iteration)] for rank in (0, 1)]
        empty = [[groups == {flat} for groups in updates] for updates in owners]
        assert sum(sum(updates) for updates in empty) == 1
