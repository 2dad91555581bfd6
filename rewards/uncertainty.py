"""How far to trust a reward: ensembles of rewards, disagreement of ranks, and weights made of an uncertainty.

An uncertainty is >= 0, and larger is less trustworthy; a weight is in (0, 1]. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rewards.combine import ranks

EnsembleObjective = Literal["mean", "wco", "uwo"]
Variance = Literal["population", "unbiased"]

STD_FLOOR = 1e-6
"""Least std of a member's scores that they are divided by."""
_QUANTILE_GAP = 1e-8


def aggregate(scores: Tensor, objective: EnsembleObjective, coefficient: float, variance: Variance) -> Tensor:
    """One score (B,) of the scores (k, B) of k rewards (arXiv 2310.02743).

    mean: (1/k) sum R_i. wco, worst case: min_i R_i. uwo: the mean less `coefficient` times the variance over the members.
    The variance divides by k (the paper's best-of-n) or by k - 1 (its PPO code), 0 of one member. In uwo the coefficient
    has the unit of 1 / reward, so members must share a unit.
    """
    mean = scores.mean(dim=0)
    if objective == "mean":
        return mean
    if objective == "wco":
        return scores.amin(dim=0)
    square = (scores - mean).square().sum(dim=0)
    members = len(scores) if variance == "population" else max(1, len(scores) - 1)
    return mean - coefficient * square / members


def spread(scores: Tensor) -> Tensor:
    """Population std (B,) over the members of scores (k, B); its gradient is 0 where they agree."""
    square = (scores - scores.mean(dim=0)).square().mean(dim=0)
    some = square > 0
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def reference_statistics(scores: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """key -> mean and population std of its scores (n,), without those that are NaN. Keys with no score are left out."""
    found = {}
    for key, values in scores.items():
        present = values[~values.isnan()].double()
        if len(present):
            found[key] = {"mean": float(present.mean()), "std": float(present.std(correction=0))}
    return found


def win_rates(scores: Tensor, groups: Tensor) -> Tensor:
    """Share (N,) of the others of its group that a sample beats, a tie counting half; NaN where it has no score.

    Args:
        scores: (N,), NaN where missing: such a sample is nobody's other.
        groups: (N,) integers. The only one of a group has 1/2.
    """
    return torch.where(scores.isnan(), torch.nan, (ranks(scores.unsqueeze(1), groups)[:, 0] + 1) / 2)


def rank_disagreement(main: Tensor, auxiliaries: Sequence[Tensor], groups: Tensor) -> Tensor:
    """w_main - mean_k w_k (N,) in [-1, 1]: how much better `main` ranks a sample than auxiliary rewards do (2512.24138).

    By the share of pairwise wins inside the group of a prompt. The released code takes the difference of ranks with 1 for
    the best, which finds the samples that `main` underrates: the opposite.

    Args:
        main: (N,) scores of what is optimised, NaN where missing.
        auxiliaries: one or more (N,); one that lacks a sample has no say in it.
        groups: (N,) integers.

    Returns:
        (N,) float64; NaN where `main` or all auxiliaries have no score.
    """
    return win_rates(main, groups) - torch.stack([win_rates(x, groups) for x in auxiliaries]).nanmean(dim=0)


def quantiles(uncertainty: Tensor) -> tuple[float, float] | None:
    """Median and 90 % quantile of an uncertainty (n,), without NaN; None of nothing."""
    present = uncertainty[~uncertainty.isnan()].double()
    if not len(present):
        return None
    middle, high = torch.quantile(present, torch.tensor([0.5, 0.9], dtype=torch.float64)).tolist()
    return middle, high


def normalised(uncertainty: Tensor, q50: float, q90: float, largest: float) -> Tensor:
    """clip((U - q50) / (q90 - q50), 0, largest): 0 for a usual image of the base model, 1 for one in ten (ours).

    A missing uncertainty is 0: what is not known to be doubtful is trusted.
    """
    return ((uncertainty - q50) / max(q90 - q50, _QUANTILE_GAP)).nan_to_num(nan=0.0).clamp(0.0, largest)


def trust(uncertainty: Tensor, kappa: float, w_min: float) -> Tensor:
    """max(exp(-kappa U), w_min) of a normalised uncertainty: the weight of Ctrl-U (arXiv 2410.11236) for a whole image."""
    return (-kappa * uncertainty).exp().clamp_min(w_min)


def step_trust(uncertainty: Tensor, kappa: float) -> Tensor:
    """exp(-kappa U) of a normalised uncertainty (N, S) by step, over its mean in the row: 1 on average in each sample."""
    weights = (-kappa * uncertainty).exp()
    return weights / weights.mean(dim=1, keepdim=True)


def most_suspicious(uncertainty: Tensor, fraction: float) -> Tensor:
    """(N,) bool: the floor(fraction N), but at least one, of largest uncertainty (N,) above 0; among equals the first."""
    number = max(1, int(fraction * len(uncertainty) + 1e-9))
    order = uncertainty.nan_to_num(nan=0.0).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(uncertainty), dtype=torch.bool)
    chosen[order[:number]] = True
    return chosen & (uncertainty > 0)


def next_fraction(
    fraction: float, level: float, past: Sequence[float], lowest: float = 0.02, highest: float = 0.2, step: float = 0.1
) -> float:
    """The share that is gated next: a step up if `level` is above all `past` ones, down if below all (2512.24138).

    level: mean of this iteration's positive uncertainties; past: those of up to 20 iterations before.
    """
    if past and level > max(past):
        fraction *= 1 + step
    elif past and level < min(past):
        fraction *= 1 - step
    return min(max(fraction, lowest), highest)
