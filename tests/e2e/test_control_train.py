"""A ControlNet trained by the published command: on two processes as on one, from real files and from the playground."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from align.config import load_config

TOGETHER = runpy.run_path(str(Path(__file__).with_name("test_distributed.py")))
LOOP = runpy.run_path(str(Path(__file__).parents[1] / "align" / "test_control_loop.py"))
launch, assert_equal_runs = TOGETHER["launch"], TOGETHER["assert_equal_runs"]
sd15, segmenter, files, configure = (LOOP[name] for name in ("sd15", "segmenter", "files", "configure"))
pytestmark = pytest.mark.e2e


def test_two_processes_train_as_one(configure, train_here):
    """Every process knows from the keyed timesteps how many samples of the update are judged."""
    path = configure("ctrl_u", {"train": {"iterations": 3, "prompts_per_iteration": 4, "micro_batch": 4}})
    train_here(path, "name=one")
    launch("accelerate", "-m", "align.train", str(path), "name=two", "train.micro_batch=1")
    assert_equal_runs(path.parent / "one", path.parent / "two")
    environment = json.loads((path.parent / "two" / "environment.json").read_text())
    assert environment["processes"] == 2


def test_the_playground_run_by_the_command(tmp_path):
    """`align train configs/playground/ctrl_u.yaml`, cut short: its ControlNet, its grid, and what it reports."""
    small = [
        "train.iterations=2", "train.prompts_per_iteration=4", "train.micro_batch=4", "eval.prompts=4", "eval.grid_prompts=2",
        "eval.num_steps=4", "eval.every=1", "prompts.train=playground:train_scenes:16", "trackers=[]",
    ]  # fmt: skip
    config = Path(__file__).parents[2] / "configs" / "playground" / "ctrl_u.yaml"
    done = cli("train", str(config), f"output_dir={tmp_path}", "name=run", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run"
    assert {p.name for p in (folder / "controlnet").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["base"]) == {"verifier", "layout", "condition"}
    assert summary["base"]["layout"] > 0.5  # the shipped ControlNet is a start that keeps layouts
    report = (folder / "report.html").read_text()
    assert str(folder / "controlnet") in report
    assert "consistency" in load_config(folder / "config.yaml").objective.type
    again = cli("eval", str(folder), "--n", "4", "--out", str(tmp_path / "again"))
    assert again.returncode == 0, again.stdout + again.stderr
    found = json.loads((tmp_path / "again" / "summary.json").read_text())
    for column in ("base", "tuned"):
        assert found[column] == pytest.approx(summary[column], abs=1e-6)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`align ...`"""
    command = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)
