"""Shared material: tiny genuine pipelines, small run configurations, and runs inside the test process."""

from __future__ import annotations

import copy
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from rich.console import Console

TINY = runpy.run_path(str(Path(__file__).parent / "tiny.py"))
PROMPTS = ["a red circle", "two blue star and a ring", "a cat left of the dog", "three green square"]
SIZES: dict[str, Any] = {
    "trackers": [],
    "model": {"max_sequence_length": 8, "lora": {"rank": 2, "alpha": 6}},
    "rewards": {"brightness": {"type": "brightness"}},
    "sampler": {"num_steps": 3, "guidance_scale": 1.0},
    "optim": {"lr": 1e-2, "ema_every": 1},
    "train": {
        "iterations": 6,
        "prompts_per_iteration": 2,
        "group_size": 4,
        "updates_per_iteration": 2,
        "micro_batch": 3,
        "rollout_batch": 3,
    },
    "eval": {"every": 3, "during": 2, "prompts": 2, "num_steps": 2, "grid_prompts": 2},
    "checkpoint": {"every": 3},
}
METHODS: dict[str, dict[str, Any]] = {
    "nft": {"objective": {"old_decay_slope": 0.2}},  # it would otherwise lag by a thousandth only
    "dense_grpo": {"calibration": {"samples": 4, "iterations": 2}},
}


@pytest.fixture(scope="session")
def sd35(tmp_path_factory) -> Path:
    """Folder of an SD3.5-type pipeline with T5."""
    return TINY["sd35_pipeline"](tmp_path_factory.mktemp("models") / "sd35")


@pytest.fixture(scope="session")
def sd35_without_t5(tmp_path_factory) -> Path:
    """The same without T5."""
    return TINY["sd35_pipeline"](tmp_path_factory.mktemp("models") / "sd35", with_t5=False)


@pytest.fixture(scope="session")
def write_config(sd35) -> Callable[..., Path]:
    """write_config(folder, preset, changes) -> a YAML file in `folder` of a six-iteration run below that folder."""

    def write(folder: Path, preset: str = "flow_grpo", changes: Mapping[str, Any] | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n")
        data = copy.deepcopy(SIZES) | {"preset": [preset], "name": "run", "output_dir": str(folder)}
        data["prompts"] = {"train": str(prompts), "eval": str(prompts)}
        for layer in ({"model": {"path": str(sd35)}}, METHODS.get(preset, {}), changes or {}):
            merge(data, layer)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


def merge(data: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put nested `layer` over `data`, in place; rewards are replaced as a whole."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), dict) and key != "rewards":
            merge(data[key], value)
        else:
            data[key] = copy.deepcopy(value)


@pytest.fixture
def on_cpu(monkeypatch) -> Iterator[None]:
    """Runs started inside use the CPU, and leave no global state of Accelerate and no signal handler behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train_here(on_cpu) -> Callable[..., dict[str, Any] | None]:
    """train_here(config file, *overrides): a whole run in this process; its summary, or None if it was stopped."""
    from align.config import load_config
    from align.train import train

    def run(path: Path, *overrides: str) -> dict[str, Any] | None:
        return train(load_config(path, overrides), Console(quiet=True))

    return run


@pytest.fixture(scope="session")
def launch() -> Callable[[Path], None]:
    """launch(config file): the published command in a process of its own, as the run `done` beside the file."""

    def run(config: Path) -> None:
        command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "1"]
        done = subprocess.run(
            [*command, "-m", "align.train", str(config), "name=done"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
