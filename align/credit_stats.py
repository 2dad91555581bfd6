"""What the values of intermediate states say: numbers for the training rows, none of them trained on.

Everything is computed in float64 on the CPU. NaN marks a missing score and enters no number; a number of nothing is
left out of the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def value_stats(values: Tensor, steps: Sequence[int], group_ids: Tensor) -> dict[str, float]:
    """Level, rank correlation with the final reward and direction of the gain, per trained step.

    Args:
        values: (N, S+1); column j is the reward of the completion from the state before trained step j, the last one
            the reward of the final image.
        steps: S absolute step indices, the <k> of the names, written with two digits.
        group_ids: (N,) integers, equal for the samples of one prompt; any values, any order.

    Returns:
        `values/step_<k>`: mean value before step k.
        `values/rank_corr_<k>`: Spearman correlation within a group of the value before step k with the final reward,
            averaged over the groups; tied values share their mean rank, groups without spread in either are left out.
        `gain/up_<k>`, `gain/down_<k>`: share of samples that step k raised or lowered; one that it left exactly as it
            was is in neither.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if values.ndim != 2 or values.shape[1] != len(steps) + 1 or group_ids.shape != values.shape[:1]:
        raise ValueError(
            f"credit: need values (N, {len(steps) + 1}) for {len(steps)} steps with group_ids (N,), got "
            f"{tuple(values.shape)}, {tuple(group_ids.shape)}"
        )
    values, group_ids = values.detach().to("cpu", torch.float64), group_ids.detach().cpu()
    stats = {}
    for column, step in enumerate(steps):
        before, after, final = values[:, column], values[:, column + 1], values[:, -1]
        present = before.isfinite()
        if present.any():
            stats[f"values/step_{step:02d}"] = float(before[present].mean())
        correlation = mean_rank_correlation(before, final, group_ids)
        if correlation is not None:
            stats[f"values/rank_corr_{step:02d}"] = correlation
        present = present & after.isfinite()
        if present.any():
            stats[f"gain/up_{step:02d}"] = float((after > before)[present].double().mean())
            stats[f"gain/down_{step:02d}"] = float((after < before)[present].double().mean())
    return stats


def zero_spread(rewards: Tensor, steps: Sequence[int], group_ids: Tensor) -> dict[str, float]:
    """`gain/zero_spread_<k>`: share of groups whose step rewards at k are all equal, so that they teach nothing there.

    Groups with fewer than two rewards at a step do not count at it.

    Args:
        rewards: (N, S) step rewards, NaN where missing.
        steps: S absolute step indices, the <k> of the names, written with two digits.
        group_ids: (N,) integers, equal for the samples of one prompt; any values, any order.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if rewards.ndim != 2 or rewards.shape[1] != len(steps) or group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"credit: need rewards (N, {len(steps)}) for {len(steps)} steps with group_ids (N,), got "
            f"{tuple(rewards.shape)}, {tuple(group_ids.shape)}"
        )
    rewards = rewards.detach().to("cpu", torch.float64)
    present = rewards.isfinite()
    groups, group = torch.unique(group_ids.detach().cpu(), return_inverse=True)
    index, shape = group.unsqueeze(1).expand_as(rewards), (len(groups), rewards.shape[1])
    least = torch.full(shape, torch.inf, dtype=torch.float64)
    least = least.scatter_reduce(0, index, rewards.where(present, torch.inf), "amin")
    most = torch.full(shape, -torch.inf, dtype=torch.float64)
    most = most.scatter_reduce(0, index, rewards.where(present, -torch.inf), "amax")
    counted = torch.zeros(shape, dtype=torch.long).index_add(0, group, present.long()) >= 2
    equal = (counted & (most == least)).sum(0)
    return {
        f"gain/zero_spread_{step:02d}": float(equal[j] / counted[:, j].sum())
        for j, step in enumerate(steps)
        if counted[:, j].any()
    }


def mean_rank_correlation(first: Tensor, second: Tensor, group_ids: Tensor) -> float | None:
    """Spearman correlation (N,) with (N,) within groups, averaged over those with spread; None if there is no such."""
    present = first.isfinite() & second.isfinite()
    groups, group = torch.unique(group_ids[present], return_inverse=True)
    zeros = torch.zeros(len(groups), dtype=torch.float64)
    count = zeros.index_add(0, group, torch.ones_like(first[present]))

    def centred_ranks(values: Tensor) -> Tensor:
        ranks = _ranks(values, group)
        return ranks - (zeros.index_add(0, group, ranks) / count)[group]

    a, b = centred_ranks(first[present]), centred_ranks(second[present])
    # Ranks are multiples of one half, so a group without spread has a norm of exactly 0.
    norm = (zeros.index_add(0, group, a * a) * zeros.index_add(0, group, b * b)).sqrt()
    spread = norm > 0
    return float((zeros.index_add(0, group, a * b)[spread] / norm[spread]).mean()) if spread.any() else None


def _ranks(values: Tensor, group: Tensor) -> Tensor:
    """Ranks (N,) within groups up to one offset per group; equal values of a group share the mean of their ranks."""
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sorted_values, sorted_group = values[order], group[order]
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = (sorted_values[1:] != sorted_values[:-1]) | (sorted_group[1:] != sorted_group[:-1])
    run = starts.cumsum(0) - 1
    length = torch.bincount(run).double()
    shared = (length.cumsum(0) - (length + 1) / 2)[run]
    return torch.empty_like(values).scatter(0, order, shared)
