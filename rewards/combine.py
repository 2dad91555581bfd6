"""Several rewards as one number per sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rewards.base import RewardError, nearest


def combine(
    scores: Mapping[str, Tensor], valid: Mapping[str, Tensor], weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Weighted sum  sum_j w_j s_j  of raw scores.

    scores and valid: name -> (N,). Returns total (N,) float32 and its mask (N,) bool. A sample is invalid, and its
    total NaN, if any reward of non-zero weight is missing for it; a reward of weight 0 is watched, not optimised.
    Raises RewardError if a weighted reward has no scores or no weight differs from 0.
    """
    used = {name: float(weight) for name, weight in weights.items() if weight != 0}
    if not used:
        raise RewardError("no reward has a weight other than 0: give at least one reward a weight")
    for name in used:
        if name not in scores or name not in valid:
            raise RewardError(f"there are no scores of the weighted reward '{name}'{nearest(name, scores)}")
    mask = torch.stack([valid[name].bool() for name in used]).all(dim=0)
    total = torch.stack([weight * scores[name].float() for name, weight in used.items()]).sum(dim=0)
    return torch.where(mask, total, torch.nan), mask
