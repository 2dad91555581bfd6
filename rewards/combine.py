"""Several rewards as one number per sample: their weighted sum, their ranks, gates between them, and their shape."""

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


def ranks(scores: Tensor, groups: Tensor, min_valid: int = 2) -> Tensor:
    """(better than - worse than) / (present - 1) of each score in its group: the rank, brought to [-1, 1].

    2 (rank - 1) / (n - 1) - 1 with mean ranks for ties, which is also the share of pairwise wins less that of losses
    (the reward of Pref-GRPO, arXiv 2508.20751, on that scale). Only the order counts, not units or distances.

    Args:
        scores: (N, S), NaN where missing; columns are ranked each on its own.
        groups: (N,) integers, equal for the samples that are compared.
        min_valid: least number of scores of a group, at least 2.

    Returns:
        (N, S) float64; 0 where the score is missing or its group has too few.
    """
    found = torch.zeros(scores.shape, dtype=torch.float64)
    for group in torch.unique(groups):
        rows = (groups == group).nonzero().flatten()
        own, other = scores[rows, None], scores[None, rows]
        wins = (own > other).sum(1, dtype=torch.float64) - (own < other).sum(1, dtype=torch.float64)  # a NaN is neither
        present = (~scores[rows].isnan()).sum(0)
        found[rows] = torch.where(present >= min_valid, wins / (present - 1).clamp_min(1), 0.0)
    return found


def preference(scores: Tensor, references: Tensor, slope: float) -> Tensor:
    """mean_m sigmoid(slope (r - r_m)): how surely an image is preferred to reference images of its prompt (2502.18770).

    Bounded, so that a reward that runs away gains nothing more, and steepest where the image equals the references.

    Args:
        scores: (N, C), NaN where missing.
        references: (N, M) float64 scores of the references of each sample's prompt, NaN where missing.
        slope: per unit of the reward; 1 suits differences of about 1.

    Returns:
        (N, C) float32 in [0, 1], NaN where the score or all its references are missing.
    """
    differences = scores.double().unsqueeze(2) - references.unsqueeze(1)
    return (slope * differences).sigmoid().nanmean(dim=2).float()


def gated(
    parts: Mapping[str, Tensor], scores: Mapping[str, Tensor], gates: Mapping[str, float], groups: Tensor
) -> dict[str, Tensor]:
    """Parts of the advantage with what stands behind a closed gate cut to at most 0 (after G-RA, arXiv 2508.10548).

    A gate is open where its reward is above its threshold (not at it), or missing. It acts on every reward but itself
    and the gates before it. The paper drops the raw reward behind a closed gate; here the part keeps what is negative,
    so that the gates' own scale does not come to decide the group's mean. In a group with no sample through all gates
    of a part, that part is 0: the gates' own rewards are left to teach it.

    Args:
        parts: name -> (N, S) weighted advantages.
        scores: name -> (N,) float32 raw final scores of at least the gates, NaN where missing.
        gates: name -> threshold, highest priority first.
        groups: (N,) integers, equal for the samples that are compared.
    """
    _, group = torch.unique(groups, return_inverse=True)
    passed = {name: (scores[name] > threshold) | scores[name].isnan() for name, threshold in gates.items()}
    order = list(gates)
    found = {}
    for name, part in parts.items():
        before = order[: order.index(name)] if name in gates else order
        if not before:
            found[name] = part
            continue
        through = torch.stack([passed[gate] for gate in before]).all(dim=0)
        some = torch.zeros(int(group.max()) + 1).index_add(0, group, through.float())[group] > 0
        kept = torch.where(through.unsqueeze(1), part, part.clamp_max(0.0))
        found[name] = torch.where(some.unsqueeze(1), kept, torch.zeros_like(part))
    return found
