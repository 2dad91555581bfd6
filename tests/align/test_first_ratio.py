"""With unchanged weights, scoring stored steps again gives ratio 1; the run stops where it does not."""

from __future__ import annotations

from collections.abc import Callable
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

SAMPLERS: dict[str, dict[str, Any]] = {
    "flow_sde": {"noise_level": 0.7},
    "cps": {"noise_level": 0.8},
    "dance_sde": {"noise_level": 0.3, "grid": "linspace_shift", "shared_noise": True},
}


@pytest.fixture
def begin(tmp_path, write_config, on_cpu) -> Callable[..., Run]:
    """begin(kernel, guidance) -> a run before its first iteration."""

    def make(kernel: str, guidance: float = 1.0) -> Run:
        sampler = {"kernel": kernel, "num_steps": 5, "guidance_scale": guidance, **SAMPLERS[kernel]}
        config = load_config(write_config(tmp_path, "flow_grpo", {"sampler": sampler}))
        return start(config, Console(quiet=True))

    return make


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kernel", list(SAMPLERS))
def test_first_ratio_is_one(begin, kernel, guidance):
    """Rollouts of three images, training batches of seven pairs of different times: only rounding may differ."""
    run = begin(kernel, guidance)
    samples = [5, 2, 7, 0, 3]
    batch = collect(run, _prompts(run, 0), samples, 0, 0, lambda *_: None, with_values=True)
    columns = len(batch.plan.stochastic)
    assert columns == 4
    advantages = torch.ones(len(samples), columns)
    worst, seen = 0.0, 0
    for pairs in micro_batches(range(len(samples)), columns, 7):
        assert len(set(pairs.columns.tolist())) > 1
        _, info, _ = clipped_ratio_pairs(run, batch, pairs, advantages, lagging=False)
        worst = max(worst, float((info["ratio"] - 1).abs().max()))
        seen += len(pairs.rows)
    assert seen == len(samples) * columns
    assert worst <= 1e-6


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


@pytest.mark.parametrize("kernel", list(SAMPLERS))
def test_weights_changed_between_rollout_and_update_stop_the_run(begin, kernel):
    run = begin(kernel)
    before = [p.detach().clone() + 0.05 for p in run.parameters]
    run.rewards["brightness"] = Meddling(run.parameters)
    with pytest.raises(UserError, match=r"the first probability ratio is off 1 by \d.*\(allowed 1e-06 in fp32\)"):
        run_iteration(run, lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))  # no update was made
