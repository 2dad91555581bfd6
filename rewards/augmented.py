"""A reward that is asked several times: its uncertainty is how much its score moves when the image hardly changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score
from rewards.preprocess import resize
from rewards.registry import RewardConfig, build_reward
from rewards.uncertainty import spread

CROP = 0.05
"""Largest part of height and width that a view leaves out."""
BRIGHTNESS = 0.03
"""By what part a view is brighter or darker."""


class AugmentedReward(Reward):
    """Another reward, with the std of its scores over the image and `views` mild changes of it as its uncertainty (ours).

    The score is that of the image itself. A view cuts off up to 5 % at two sides, is brought back to size, and is 3 %
    brighter or darker; with `flip` every other view is mirrored too, which breaks text and left-of relations. Crops may cut
    what is counted. The views are the same for every image, so scores stay repeatable. Costs `views` more calls.
    """

    name = "augmented"

    def __init__(self, type: str, args: dict[str, Any] | None = None, views: int = 4, flip: bool = False) -> None:
        """type and args: the reward, as in a configuration; views: at least 1."""
        if isinstance(views, bool) or not isinstance(views, int) or views < 1:
            raise RewardError(f"views must be a positive integer, got {views!r}")
        self.inner = build_reward(type, RewardConfig(type=type, args=dict(args or {})))
        if self.inner.needs_reference:
            raise RewardError(
                f"{type} waits for the run's base evaluation: put its members into augmented, each on its own"
            )
        self.views, self.flip = views, flip
        self.kind, self.differentiable = self.inner.kind, self.inner.differentiable
        self.max_batch = self.inner.max_batch
        self._describe()

    def _describe(self) -> None:
        self.uses_prompt, self.deterministic = self.inner.uses_prompt, self.inner.deterministic

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        self.inner.name = self.name  # so that its errors name the entry of the configuration
        self.inner.setup(device, dtype)
        self._describe()

    def enable_checkpointing(self) -> None:
        self.inner.enable_checkpointing()

    def score(self, batch: RewardBatch) -> RewardOutput:
        output = checked_score(self.inner, batch)
        scores = [output.scores]
        for number in range(self.views):
            seen = dataclasses.replace(batch, images=view(batch.images, number, self.flip))
            scores.append(checked_score(self.inner, seen).scores)
        table = torch.stack(scores)
        known = ~table.detach().isnan().any(dim=0)
        doubt = torch.where(known, spread(torch.where(known, table, 0.0)), torch.nan)
        return RewardOutput(output.scores, output.components, doubt, info=output.info)


def view(images: Tensor, number: int, flip: bool = False) -> Tensor:
    """The `number`th mild change of images (B, 3, H, W) in [0, 1], of the same shape.

    The corner it is cut towards goes round the four; the cut is CROP and half of it in turn, the brightness up and down.
    """
    height, width = images.shape[-2:]
    part = CROP if number // 4 % 2 == 0 else CROP / 2
    down, across = round(part * height), round(part * width)
    top, left = (down if number % 4 in (1, 2) else 0), (across if number % 4 in (1, 3) else 0)
    cut = images[..., top : top + height - down, left : left + width - across]
    changed = resize(cut, (height, width)) * (1 + (BRIGHTNESS if number % 2 == 0 else -BRIGHTNESS))
    changed = changed.clamp(0.0, 1.0)
    return changed.flip(-1) if flip and number % 2 else changed
