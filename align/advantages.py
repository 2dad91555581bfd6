"""Advantages: rewards compared within the group of samples that share a prompt.

    A = clip((R - mean_group) / (max(std, std_floor) + eps), -clip, clip)

as in Flow-GRPO (arXiv 2505.05470) and DiffusionNFT (arXiv 2509.16117): population statistics, the mean always per
group, the std per group or over all samples of the iteration. Step rewards (N, S) are normalised per absolute step,
column by column.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from align.history import HistoryConfig

StdScope = Literal["group", "global"]
Baseline = Literal["group", "history"]


@dataclass
class AdvantageConfig:
    """How rewards become advantages."""

    baseline: Baseline = "group"
    """What a reward is compared with: "group" (the samples of its group) or "history" (all of its prompt, past ones
    too; see `align.history`)."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """The baseline "history"."""
    std: StdScope = "global"
    """Whose std divides: "group" (one prompt's samples) or "global" (the whole iteration's; 2505.05470, 2509.16117)."""
    eps: float = 1e-4
    """Added to the std before dividing, in units of the reward (released code of arXiv 2505.05470)."""
    clip: float = 5.0
    """Advantages are clamped to [-clip, clip] (released code of arXiv 2505.05470)."""
    std_floor: float = 0.0
    """Least std divided by, in units of the reward; .1-.3 of the first std keeps late noise from being amplified."""
    min_valid: int = 2
    """A group with fewer valid scores than this at a step gets advantage 0 there; at least 2."""

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = [f"history.{line}" for line in self.history.validate()]
        if self.baseline not in get_args(Baseline):
            errors.append(f"baseline must be one of {', '.join(get_args(Baseline))}, got {self.baseline!r}")
        if self.std not in get_args(StdScope):
            errors.append(f"std must be one of {', '.join(get_args(StdScope))}, got {self.std!r}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            errors.append(f"eps must be finite and above 0, got {self.eps}")
        if not self.clip > 0:
            errors.append(f"clip must be above 0, got {self.clip}")
        if not (math.isfinite(self.std_floor) and self.std_floor >= 0):
            errors.append(f"std_floor must be finite and at least 0, got {self.std_floor}")
        if self.min_valid < 2:
            errors.append(f"min_valid must be at least 2, one sample cannot be compared, got {self.min_valid}")
        return errors


def group_advantages(
    rewards: Tensor,
    valid: Tensor,
    group_ids: Tensor,
    config: AdvantageConfig,
    weights: Tensor | None = None,
    doubt: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Normalise rewards within groups, per step.

    Statistics are in float64 on the CPU. Invalid or non-finite entries get advantage 0 and enter no statistic; a group
    whose valid rewards are all equal at a step gets exactly 0 there and leaves the other groups and steps as they are.
    With `weights` the mean is sum(w R) / sum(w) and the std that about it, so that sum(w A) is 0 in every group; with
    `doubt` a reward is first lowered by `doubt` standard deviations of its group.

    Args:
        rewards: (N,) or (N, S) rewards of all samples of the iteration, NaN where missing.
        valid: (N,) bool, False for samples without a usable score.
        group_ids: (N,) integers, equal for the samples that are compared with each other; any values, any order.
        config: see `AdvantageConfig`.
        weights: (N,) float64 above 0, how much each sample counts in the statistics; all equally without them.
        doubt: (N,) float64; see `align.uncertainty`.

    Returns:
        advantages: same shape and device as `rewards`, float32, in [-clip, clip].
        stats: `zero_spread_fraction` (share of groups whose valid rewards are all equal, among groups with enough of
            them, averaged over steps), `short_group_fraction` (share of groups with too few), `valid_fraction`,
            `reward_mean` and `reward_std` (over all valid entries), `group_std` (mean std within groups) and
            `clipped_fraction`. A share or mean of nothing is 0.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if rewards.ndim not in (1, 2) or valid.shape != rewards.shape[:1] or group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            "advantages: need rewards (N,) or (N, S) with valid (N,) and group_ids (N,), got "
            f"{tuple(rewards.shape)}, {tuple(valid.shape)}, {tuple(group_ids.shape)}"
        )
    values = rewards.detach().to("cpu", torch.float64)
    values = values.unsqueeze(1) if rewards.ndim == 1 else values
    present = valid.detach().cpu().bool().unsqueeze(1) & values.isfinite()
    values = values.where(present, 0.0)
    _, group = torch.unique(group_ids.detach().cpu(), return_inverse=True)
    num_groups = int(group.max()) + 1 if group.numel() else 0

    spread = _group_spread(values, present, group, num_groups)
    if doubt is not None:
        values = _lowered(values, present, group, num_groups, doubt)
    count, mean, group_std = group_moments(values, present, group, num_groups, weights)
    usable = count >= config.min_valid
    # Equal rewards can differ from their rounded mean by an ulp, so zero spread is decided by max - min.
    informative = usable & (spread > 0)
    std = group_std if config.std == "group" else _masked_std(values, present, weights).expand_as(group_std)
    scale = std.clamp_min(config.std_floor) + config.eps
    raw = (values - mean[group]) / scale[group]
    raw = raw.where(present & informative[group], 0.0)
    advantages = raw.clamp(-config.clip, config.clip)

    stats = {
        "zero_spread_fraction": _share((usable & (spread <= 0)).sum(), usable.sum()),
        "short_group_fraction": _share((~usable).sum(), usable.numel()),
        "valid_fraction": _share(present.sum(), present.numel()),
        "reward_mean": _share(values.sum(), present.sum()),
        "reward_std": float(_masked_std(values.reshape(-1, 1), present.reshape(-1, 1)).sum()),
        "group_std": _share(group_std[usable].sum(), usable.sum()),
        "clipped_fraction": _share((raw.abs() > config.clip).sum(), present.sum()),
    }
    return advantages.reshape(rewards.shape).to(rewards.device, torch.float32), stats


def weighted_centre(
    values: Tensor, present: Tensor, group_ids: Tensor, weights: Tensor | None, doubt: Tensor | None
) -> Tensor:
    """Values (N, S) lowered by `doubt` and less their weighted mean in the group, without dividing by a std.

    present: (N, S) bool; the others, and groups whose values are all equal, are 0. See `group_advantages`.
    """
    values = values.double().where(present, 0.0)
    _, group = torch.unique(group_ids, return_inverse=True)
    number = int(group.max()) + 1 if group.numel() else 0
    varied = (_group_spread(values, present, group, number) > 0)[group]
    if doubt is not None:
        values = _lowered(values, present, group, number, doubt)
    mean = group_moments(values, present, group, number, weights)[1]
    return (values - mean[group]).where(present & varied, 0.0)


def group_moments(
    values: Tensor, present: Tensor, group: Tensor, num_groups: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and population std (groups, S) of the present values (N, S), in two passes so that offsets cancel.

    weights: (N,) of the mean and of the squares about it; the count is of samples all the same.
    """
    zeros = values.new_zeros(num_groups, values.shape[1])
    count = zeros.index_add(0, group, present.double())
    if weights is None:
        total, weight = count.clamp_min(1), present.double()
    else:
        weight = weights.unsqueeze(1) * present
        total = zeros.index_add(0, group, weight)
        total = total.where(total > 0, 1.0)
    mean = zeros.index_add(0, group, weight * values) / total
    centred = (values - mean[group]).where(present, 0.0)
    std = (zeros.index_add(0, group, weight * centred.square()) / total).sqrt()
    return count, mean, std


def _lowered(values: Tensor, present: Tensor, group: Tensor, num_groups: int, doubt: Tensor) -> Tensor:
    """Values (N, S) less `doubt` (N,) in standard deviations of their group, 0 where not present.

    By how far the doubt is from its group's mean: what all of a group share cancels in its advantages, and would only
    widen the std of the whole iteration.
    """
    std = group_moments(values, present, group, num_groups)[2]
    std = std.where(_group_spread(values, present, group, num_groups) > 0, 0.0)
    shared = doubt.unsqueeze(1).expand_as(values).where(present, 0.0)
    apart = shared - group_moments(shared, present, group, num_groups)[1][group]
    return (values - apart * std[group]).where(present, 0.0)


def _group_spread(values: Tensor, present: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Largest minus smallest present value (groups, S); -inf where a group has none."""
    index = group.unsqueeze(1).expand_as(values)
    empty = values.new_full((num_groups, values.shape[1]), -math.inf)
    largest = empty.scatter_reduce(0, index, values.where(present, -math.inf), "amax")
    smallest = -empty.scatter_reduce(0, index, (-values).where(present, -math.inf), "amax")
    return largest - smallest


def _masked_std(values: Tensor, present: Tensor, weights: Tensor | None = None) -> Tensor:
    """Population std (S,) over the present values of each column, of which each counts by its weight (N,)."""
    weight = present.double() if weights is None else weights.unsqueeze(1) * present
    total = weight.sum(0)
    total = total.where(total > 0, 1.0)
    centred = (values - (weight * values).sum(0) / total).where(present, 0.0)
    return ((weight * centred.square()).sum(0) / total).sqrt()


def _share(part: Tensor, whole: Tensor | int) -> float:
    return float(part) / float(whole) if float(whole) else 0.0
