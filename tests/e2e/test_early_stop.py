"""A run ends when the reward that it only watches has fallen, with the weights of its best evaluation."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from align.checkpoint import checkpoints, load_checkpoint
from align.config import load_config
from align.runfolder import metric_rows
from align.train import train

REPOSITORY = Path(__file__).parents[2]
RESUME = runpy.run_path(str(Path(__file__).with_name("test_resume.py")))
NEAR = f"{Path(__file__).with_name('near_reward.py')}:score"


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    """Evaluation rows by iterations done."""
    return {r["iteration"]: r for r in metric_rows(folder / "metrics.jsonl")[0] if r["kind"] == "eval"}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def watching(target: float, **settings: Any) -> dict[str, Any]:
    """Settings of a run that watches how near the mean brightness is to `target`."""
    reward = {"type": NEAR, "args": {"target": target}}
    return {"eval_rewards": {"near": reward}, "early_stop": {"reward": "near", **settings}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, write_config) -> tuple[Path, str]:
    """Configuration of a run on two processes that trains towards brightness past the one that is watched for, and what
    it printed. The base is at .15 and gets brighter by a few hundredths an iteration: .22 is passed after the second."""
    folder = tmp_path_factory.mktemp("watched")
    changes = watching(0.22, patience=2) | {
        "model": {"path": "playground", "max_sequence_length": 24},
        "sampler": {"num_steps": 4},
        "objective": {"old_decay_slope": 0.01},
        "optim": {"lr": 1e-2, "ema_decay": 0.5},
        "train": {
            "iterations": 10, "group_size": 8, "updates_per_iteration": 1, "rollout_batch": 16, "micro_batch": 48
        },
        "eval": {"every": 1, "during": 4, "prompts": 4, "num_steps": 4},
        "checkpoint": {"every": 1, "keep": 10},
    }  # fmt: skip
    config = write_config(folder, "nft", changes)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "align.train", str(config)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return config, done.stdout


@pytest.mark.e2e
class TestStopped:
    def test_where_it_stops_and_what_it_says(self, stopped):
        config, printed = stopped
        found = evaluations(config.parent / "run")
        assert list(found) == [0, 1, 2, 3, 4]
        near = [row["eval/near"] for row in found.values()]
        assert near[0] < near[1] < near[2] > near[3] > near[4]  # the case that this is about
        assert found[4]["eval/brightness"] > found[2]["eval/brightness"]
        line = f"stopped at iteration 4: near was below its best ({near[2]:.4g} at iteration 2) for 2 evaluations"
        assert printed.count(line) == 1
        assert f"the result is that of iteration 2, where near was highest ({near[2]:.4g}, the base's" in printed
        assert [c.name for c in checkpoints(config.parent / "run")][-1] == "iteration-000004"

    def test_the_result_is_the_best_evaluation(self, stopped):
        folder = stopped[0].parent / "run"
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["iterations"], summary["best_iteration"]) == (4, 2)
        row = evaluations(folder)[2]
        for name in ("near", "brightness"):  # the same four prompts
            assert summary["tuned"][name] == pytest.approx(row[f"eval/{name}"], abs=1e-6)

    def test_the_adapter_is_what_was_evaluated_then(self, stopped):
        folder = stopped[0].parent / "run"
        exported = adapter(folder).values()
        averages = {
            c.name: [v for k, v in load_checkpoint(c)[0].items() if k.startswith("average.")]
            for c in checkpoints(folder)
        }

        def same(weights: list[torch.Tensor]) -> bool:
            return all(any(torch.equal(a, b) for b in exported) for a in weights)

        assert len(averages["iteration-000002"]) == len(exported)
        assert {name for name, weights in averages.items() if same(weights)} == {"iteration-000002"}

    def test_the_same_command_trains_no_further_and_more_patience_does(self, stopped, on_cpu):
        config, _ = stopped
        folder = config.parent / "run"
        before, rows = adapter(folder), evaluations(folder)
        console = Console(record=True, file=io.StringIO())
        summary = train(load_config(config), console)
        assert (summary["iterations"], summary["best_iteration"]) == (4, 2)
        assert "nothing to train: the run stopped early, at iteration 4: near was below" in console.export_text()
        assert evaluations(folder) == rows
        assert_equal(adapter(folder), before)
        summary = train(load_config(config, ["early_stop.patience=3"]), Console(quiet=True))
        assert (summary["iterations"], summary["best_iteration"]) == (5, 2)
        assert_equal(adapter(folder), before)


@pytest.mark.e2e
def test_a_run_killed_between_an_evaluation_and_its_checkpoint_has_the_same_best(tmp_path, write_config, train_here):
    changes = watching(0.53, drop=1000.0) | {
        "rewards": {"moody": {"type": f"{RESUME['REWARD']}:brightness"}},
        "train": {"rollout_batch": 8},
        "eval": {"every": 1},
        "checkpoint": {"every": 2, "keep": RESUME["KEPT"]},
    }
    config = write_config(tmp_path, "nft", changes)
    # calls: the base, then iterations and evaluations in turn; the eighth is within the iteration after the third evaluation
    assert RESUME["killed"](config, call=8, delay=0) == -9
    assert [c.name for c in checkpoints(tmp_path / "disturbed")] == ["iteration-000002"]
    assert list(evaluations(tmp_path / "disturbed")) == [0, 1, 2, 3]
    ends = [train_here(config, f"name={name}") for name in ("disturbed", "undisturbed")]
    assert ends[0]["best_iteration"] == ends[1]["best_iteration"]
    RESUME["assert_same_end"](tmp_path / "disturbed", tmp_path / "undisturbed")
    tensors, state = load_checkpoint(checkpoints(tmp_path / "disturbed")[-1])
    assert "best.0" in tensors
    assert [i for i, _ in state["early_stop"]["means"]] == list(range(7))
    assert_equal(*(adapter(tmp_path / name) for name in ("disturbed", "undisturbed")))


def test_it_can_be_switched_on_and_off_and_measured_anew_within_a_run(tmp_path, write_config, train_here):
    changes = watching(0.53) | {"eval": {"every": 2}, "early_stop": {"reward": None}}
    config, folder = write_config(tmp_path, "flow_grpo", changes), tmp_path / "run"

    def record(*settings: str) -> list[int] | None:
        """Iterations in the record of the last checkpoint after a run with these settings."""
        summary = train_here(config, *settings)
        _, state = load_checkpoint(checkpoints(folder)[-1])
        assert ("best_iteration" in summary) == ("early_stop" in state)
        return [i for i, _ in state["early_stop"]["means"]] if "early_stop" in state else None

    assert record("train.iterations=2") is None
    on = ["early_stop.reward=near", "early_stop.drop=1000"]
    assert record("train.iterations=4", *on) == [0, 4]
    assert record("train.iterations=5", *on) == [0, 4, 5]  # the last is evaluated in any case
    assert record("train.iterations=8", *on, "eval.num_steps=3") == [0, 6, 8]
    assert record("train.iterations=9") is None
    assert list(evaluations(folder)) == [0, 2, 4, 5, 6, 8, 9]
