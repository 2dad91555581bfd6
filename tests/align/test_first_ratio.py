"""With unchanged weights, scoring stored steps again gives ratio 1; the run stops where it does not."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from align.collect import collect
from align.config import load_config
from align.errors import UserError
from align.policy_loop import _prompts, run_iteration
from align.run import Run, start
from align.updates import clipped_ratio_pairs, micro_batches
from rewards.base import Reward, RewardBatch, RewardOutput

UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
SAMPLERS: dict[str, dict[str, Any]] = {
    "flow_sde": {"kernel": "flow_sde", "noise_level": 0.7},
    "cps": {"kernel": "cps", "noise_level": 0.8},
    "dance_sde": {"kernel": "dance_sde", "noise_level": 0.3, "grid": "linspace_shift", "shared_noise": True},
    "ddim": {"kernel": "ddim", "noise_level": 1.0},
    "ddim branched": {"kernel": "ddim", "noise_level": 1.0, "plan": "branched", "branch": {"suffix_start": 4}},
    "cps branched": {"kernel": "cps", "noise_level": 0.8, "plan": "branched", "branch": {"suffix_start": 5}},
}
LATENT = 4 * 8 * 8
CLIP_RANGE = 1e-4 * 16384 / LATENT  # DDPO's for a latent of 16384 numbers, at equal width of the whole log-ratio


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return UNET["sd_pipeline"](tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture
def begin(tmp_path, write_config, on_cpu, sd15) -> Callable[..., Run]:
    """begin(sampler, guidance, precision) -> a run before its first iteration."""

    def make(sampler: str, guidance: float = 1.0, precision: str = "fp32") -> Run:
        settings = {"num_steps": 5, "guidance_scale": guidance, **SAMPLERS[sampler]}
        changes: dict[str, Any] = {"sampler": settings, "model": {"precision": precision}}
        if settings["kernel"] == "ddim":
            changes["model"]["path"] = str(sd15)
        changes["objective"] = {"clip_range": CLIP_RANGE, "kl_beta": 0.0}
        return start(load_config(write_config(tmp_path, "flow_grpo", changes)), Console(quiet=True))

    return make


def first_ratios(run: Run, samples: list[int], size: int) -> tuple[float, float]:
    """Largest distance of a ratio from 1, and the share of clipped pairs, over all stored steps of `samples`."""
    batch = collect(run, _prompts(run, 0), samples, 0, 0, lambda *_: None, with_values=True)
    columns = len(batch.plan.stochastic)
    assert columns == 4 + (run.kernel == "ddim" and batch.plan.split == 0)
    advantages = torch.ones(len(samples), columns)
    worst, clipped, seen = 0.0, 0.0, 0
    for pairs in micro_batches(range(len(samples)), columns, size):
        assert len(set(pairs.columns.tolist())) > 1
        _, info, _ = clipped_ratio_pairs(run, batch, pairs, advantages, lagging=False)
        worst = max(worst, float((info["ratio"] - 1).abs().max()))
        clipped += float(info["clipped"].sum())
        seen += len(pairs.rows)
    assert seen == len(samples) * columns
    return worst, clipped / seen


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_first_ratio_is_one(begin, sampler, guidance):
    """Rollouts of three images, training batches of seven pairs of different times: only rounding may differ."""
    worst, clipped = first_ratios(begin(sampler, guidance), [5, 2, 7, 0, 3], 7)
    assert worst <= 1e-6
    assert clipped == 0


@pytest.mark.parametrize("sampler", ["ddim", "cps branched"])
def test_first_ratio_in_half_precision_is_far_inside_the_clip(begin, sampler):
    worst, clipped = first_ratios(begin(sampler, 3.0, "bf16"), [5, 2, 7, 0, 3], 7)
    assert worst < 0.1 * CLIP_RANGE
    assert clipped == 0


class Meddling(Reward):
    """Brightness that changes the weights between rollout and update."""

    name = "meddling"

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters, self.calls = parameters, 0

    def score(self, batch: RewardBatch) -> RewardOutput:
        self.calls += 1
        for parameter in self.parameters if self.calls == 1 else []:
            parameter.data += 0.05
        return RewardOutput(batch.images.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_weights_changed_between_rollout_and_update_stop_the_run(begin, sampler):
    run = begin(sampler)
    before = [p.detach().clone() + 0.05 for p in run.parameters]
    run.rewards["brightness"] = Meddling(run.parameters)
    with pytest.raises(UserError, match=r"the first probability ratio is off 1 by \d.*\(allowed 1e-05 in fp32\)"):
        run_iteration(run, lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))  # no update was made
