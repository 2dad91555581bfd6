"""D2-Align in two stages: the direction is found with the model as it is, and training leaves the direction as it is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import align.fit_direction
import rewards.directional
from align.cli import app
from align.config import load_config
from align.errors import UserError
from align.fit_direction import run_fit
from align.models.base import load_model
from align.runfolder import metric_rows
from rewards.base import RewardError

pytestmark = pytest.mark.e2e


def kept_results(monkeypatch, module, name: str) -> list:
    """The list that from here on also keeps what the function `name` of `module` returns."""
    function, kept = getattr(module, name), []

    def keeping(*args):
        kept.append(function(*args))
        return kept[-1]

    monkeypatch.setattr(module, name, keeping)
    return kept


def weights(model) -> dict[str, torch.Tensor]:
    parts = {n: part for n, part in model.pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{n}.{key}": value.cpu() for n, part in parts.items() for key, value in part.state_dict().items()}


@pytest.fixture
def config(write_config, tmp_path: Path) -> Path:
    direction = str(tmp_path / "found" / "direction.safetensors")
    guided = {"type": "d2align", "args": {"base": {"type": "proxy"}, "direction": direction}}
    changes = {
        "rewards": {"guided": guided, "proxy": {"type": "proxy", "weight": 0}},
        "train": {"iterations": 2, "group_size": 1},
        "backprop": {"cut_ratio": 0.7},
    }
    return write_config(tmp_path, "refl", changes)


def test_two_stages_with_the_published_commands(config, train_here, tmp_path: Path, monkeypatch):
    sampled_from = kept_results(monkeypatch, align.fit_direction, "load_model")
    with pytest.raises(RewardError, match="align fit-direction"):
        train_here(config)
    options = ["--prompts", "2", "--images", "3", "--steps", "50", "--norm", "0.1"]
    done = CliRunner().invoke(app, ["fit-direction", str(config), *options])
    assert done.exit_code == 0, done.output
    assert "6 images: guided score" in done.output
    file = tmp_path / "found" / "direction.safetensors"
    direction = load_file(file)["direction"]
    assert 0 < direction.norm() <= 0.1 + 1e-6
    found, untouched = weights(sampled_from[0]), weights(load_model(load_config(config).model))
    assert found.keys() == untouched.keys()
    assert all(torch.equal(found[key], untouched[key]) for key in untouched)
    trained_along = kept_results(monkeypatch, rewards.directional, "load_direction")
    assert train_here(config, "name=second") is not None
    assert trained_along
    assert all(torch.equal(b, direction) for b in trained_along)
    assert torch.equal(load_file(file)["direction"], direction)
    rows = [r for r in metric_rows(tmp_path / "second" / "metrics.jsonl")[0] if r["kind"] == "train"]
    assert all(r["train/adjoint_norm"] > 0 for r in rows)


def test_the_same_images_give_the_same_direction_and_a_long_search_forgets_the_prompt(config):
    settings = load_config(config)
    short = run_fit(settings, None, 2, 4, 0.02, 100, Console(quiet=True))
    first = load_file(short.path)["direction"]
    again = run_fit(settings, "guided", 2, 4, 0.02, 100, Console(quiet=True))
    assert torch.equal(load_file(again.path)["direction"], first)
    assert short.agreement > 0.9  # hardly moved, so images are ranked as without it
    assert short.images == 8
    long = run_fit(settings, None, 2, 4, math.inf, 1500, Console(quiet=True))
    assert long.norm > short.norm
    assert long.after > short.after
    assert long.agreement < short.agreement


@pytest.mark.parametrize(
    ("name", "words"), [("guide", "no reward 'guide' .did you mean 'guided'"), ("proxy", "d2align; add for example")]
)
def test_mistakes_are_told_before_anything_is_sampled(config, name, words):
    with pytest.raises(UserError, match=words):
        run_fit(load_config(config), name, 2, 2, 0.3, 5, Console(quiet=True))


def test_half_way_between_there_is_no_direction_to_find(config):
    settings = load_config(config, ["rewards.guided.args.omega=0.5"])
    with pytest.raises(UserError, match="omega: at 0.5"):
        run_fit(settings, None, 2, 2, 0.3, 5, Console(quiet=True))
