"""Rewards to see learning within a few iterations, without any weights."""

from __future__ import annotations

from rewards.base import Reward, RewardBatch, RewardOutput


class BrightnessReward(Reward):
    """Mean of all pixels and channels, in [0, 1]; differentiable."""

    name = "brightness"
    differentiable = True
    uses_prompt = False

    def score(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(batch.images.float().mean(dim=(1, 2, 3)))
