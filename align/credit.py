"""Credit: turn the scores of finished images into one reward per (sample, step).

Every rule is a pure function that returns step rewards of shape (N, S), N samples by S trained steps in sampling
order; `align.advantages.group_advantages` normalises each step column on its own, so all rules share what follows.

The rules beyond `terminal` read values V (N, S+1): V[:, j] is the reward of the deterministic completion from the state
before trained step j, V[:, S] the reward of the final image, NaN where a score is missing. The gain of step j is
V[:, j+1] - V[:, j]. A missing value makes only those step rewards NaN that use it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["terminal", "value", "gain", "turning_point"]
BalanceScope = Literal["global", "group"]
BalanceKey = Literal["aggregate", "trend"]

NULL_WALKS = 200_000
"""Random walks behind `null_rates`; one standard error of a first-step rate is then 0.0011."""


@dataclass
class TurningPointConfig:
    """Which steps get the whole rest of the trajectory's gain (TP-GRPO, arXiv 2602.06422)."""

    consistent: bool = True
    """Ask also that what remains after the step keeps its direction; False is the paper's form without constraint."""
    first_step: bool = True
    """Select the first trained step, which has no predecessor, where its gain follows the trend V_T - V_0."""
    eta: float = 1.0
    """Factor on the reward of selected steps (released code); 1 is the paper."""
    balance: bool = True
    """Keep equally many positive and negative selected pairs; surplus ones get their gain (the paper's Appendix D)."""
    balance_scope: BalanceScope | int = "global"
    """What is balanced: "global" (the iteration), "group" (each prompt's samples), or so many samples in a row."""
    balance_key: BalanceKey = "aggregate"
    """Sign and rank of a selected pair: "aggregate" V_T - V_k, or "trend" V_T - V_0 as in the released code."""

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = []
        if not (math.isfinite(self.eta) and self.eta > 0):
            errors.append(f"eta must be finite and above 0, got {self.eta}")
        scope = self.balance_scope
        block = isinstance(scope, int) and not isinstance(scope, bool) and scope >= 1
        if not block and scope not in get_args(BalanceScope):
            errors.append(f"balance_scope must be global, group or a number of samples from 1, got {scope!r}")
        if self.balance_key not in get_args(BalanceKey):
            errors.append(f"balance_key must be one of {', '.join(get_args(BalanceKey))}, got {self.balance_key!r}")
        return errors


@dataclass
class CreditConfig:
    """How scores become one reward per (sample, step)."""

    rule: Rule = "terminal"
    """terminal: the final score at every step (2505.05470). value: the value after the step. gain: what the step added
    (2601.20218). turning_point: the gain, at selected steps all that follows (2602.06422)."""
    turning_point: TurningPointConfig = field(default_factory=TurningPointConfig)
    """Settings of the rule turning_point; the other rules do not read them."""

    @property
    def needs_values(self) -> bool:
        """True if states before the last must be completed and scored."""
        return self.rule != "terminal"

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = []
        if self.rule not in get_args(Rule):
            errors.append(f"rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        return errors + [f"turning_point.{line}" for line in self.turning_point.validate()]


def terminal(scores: Tensor, num_steps: int) -> Tensor:
    """Give every trained step the score of the final image (Flow-GRPO, arXiv 2505.05470).

    Args:
        scores: (N,) reward of each finished image; NaN marks a missing score and stays NaN.
        num_steps: number S >= 1 of trained steps.

    Returns:
        (N, S) step rewards, every column equal to `scores`.

    Raises:
        ValueError: if `scores` is not one-dimensional or `num_steps` < 1.
    """
    if scores.ndim != 1:
        raise ValueError(f"credit: scores must have shape (N,), got {tuple(scores.shape)}")
    if num_steps < 1:
        raise ValueError(f"credit: num_steps must be at least 1, got {num_steps}")
    return scores.unsqueeze(1).repeat(1, num_steps)


def value(values: Tensor) -> Tensor:
    """V_{k+1}, the value after each step (N, S): the dense baseline of DenseGRPO (arXiv 2601.20218).

    Args:
        values: (N, S+1), S >= 1.

    Raises:
        ValueError: if the shape is another.
    """
    return _checked(values)[:, 1:]


def gain(values: Tensor) -> Tensor:
    """d_k = V_{k+1} - V_k, what each step added (N, S) (DenseGRPO, arXiv 2601.20218); a row sums to V_T - V_0.

    Args:
        values: (N, S+1), S >= 1.

    Raises:
        ValueError: if the shape is another.
    """
    return _checked(values).diff(dim=1)


def turning_points(values: Tensor, consistent: bool = True, first_step: bool = True) -> Tensor:
    """Steps where the gain turns to the trajectory's overall direction (TP-GRPO, arXiv 2602.06422).

    With d_k the gains and trend = V_T - V_0, step k >= 1 is selected if d_{k-1} and d_k have opposite signs and d_k has
    the sign of the trend (Definition 4.1); `consistent` asks also that V_T - V_{k+1} has that sign (Definition 5.1), so
    the last step never qualifies. Ties and missing values never select.

    Args:
        values: (N, S+1), S >= 1.
        consistent: the stricter definition.
        first_step: judge step 0 by the same conditions without the predecessor; if False it is never selected.

    Returns:
        (N, S) bool.

    Raises:
        ValueError: if the shape is another.
    """
    _checked(values)
    return _turns_upward(values, consistent, first_step) | _turns_upward(-values, consistent, first_step)


def _turns_upward(values: Tensor, consistent: bool, first_step: bool) -> Tensor:
    # Comparing values instead of the signs of differences makes every condition False where a value is NaN.
    before, after, final = values[:, :-1], values[:, 1:], values[:, -1:]
    selected = (after > before) & (final > values[:, :1])
    if consistent:
        selected &= final > after
    selected[:, 1:] &= (after < before)[:, :-1]
    if not first_step:
        selected[:, 0] = False
    return selected


def balanced(selected: Tensor, magnitude: Tensor, scope: Tensor) -> Tensor:
    """Keep equally many positive and negative selected pairs, the largest ones (TP-GRPO, arXiv 2602.06422, Appendix D).

    Within a scope the sign with more pairs loses those of least magnitude, among equals the later ones in row-major
    order. A scope that lacks one sign stays as it is; so do pairs whose magnitude is 0, which have no sign.

    Args:
        selected: (N, S) bool.
        magnitude: (N, S) signed size of each pair.
        scope: (N,) integers, equal for the samples that are balanced together.

    Returns:
        (N, S) bool, a subset of `selected`.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if selected.ndim != 2 or magnitude.shape != selected.shape or scope.shape != selected.shape[:1]:
        raise ValueError(
            "credit: need selected (N, S) with magnitude (N, S) and scope (N,), got "
            f"{tuple(selected.shape)}, {tuple(magnitude.shape)}, {tuple(scope.shape)}"
        )
    kept = selected.clone()
    row, column = ((magnitude > 0) | (magnitude < 0)).logical_and(selected).nonzero(as_tuple=True)
    size = magnitude[row, column]
    scopes, index = torch.unique(scope.to(selected.device), return_inverse=True)
    cell = 2 * index[row] + (size > 0)
    count = torch.bincount(cell, minlength=2 * len(scopes))
    order = size.abs().argsort(descending=True, stable=True)
    order = order[cell[order].argsort(stable=True)]
    rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[cell[order]]
    quota = count.view(-1, 2).amin(1)[cell[order] // 2]
    surplus = order[(quota > 0) & (rank >= quota)]
    kept[row[surplus], column[surplus]] = False
    return kept


def turning_point(values: Tensor, settings: TurningPointConfig, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """eta (V_T - V_k) at turning points, the gain at all other steps (TP-GRPO, arXiv 2602.06422).

    Args:
        values: (N, S+1), S >= 1, in the order of the samples' global indices if they are balanced in blocks.
        settings: see `TurningPointConfig`.
        group_ids: (N,) integers, equal for the samples of one prompt; read for balance_scope "group".

    Returns:
        rewards: (N, S) step rewards.
        selected: (N, S) bool, the turning points.
        kept: (N, S) bool, those of them that balancing left.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    gains = gain(values)
    if group_ids.shape != values.shape[:1]:
        raise ValueError(f"credit: need group_ids ({len(values)},), got {tuple(group_ids.shape)}")
    aggregate = values[:, -1:] - values[:, :-1]
    selected = turning_points(values, settings.consistent, settings.first_step)
    kept = selected
    if settings.balance:
        size = aggregate if settings.balance_key == "aggregate" else aggregate[:, :1].expand_as(aggregate)
        kept = balanced(selected, size, _balance_scopes(settings.balance_scope, group_ids))
    return torch.where(kept, settings.eta * aggregate, gains), selected, kept


def _balance_scopes(scope: BalanceScope | int, group_ids: Tensor) -> Tensor:
    if scope == "group":
        return group_ids
    if scope == "global":
        return torch.zeros_like(group_ids)
    return torch.arange(len(group_ids), device=group_ids.device) // scope


def step_rewards(
    values: Tensor, num_steps: int, config: CreditConfig, group_ids: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Step rewards by the configured rule.

    Args:
        values: (N, C); C is S+1 for the rules that need values, `terminal` reads the last column of any C >= 1.
        num_steps: number S >= 1 of trained steps.
        config: see `CreditConfig`.
        group_ids: (N,) integers, equal for the samples of one prompt.

    Returns:
        rewards: (N, S), NaN where a value they use is missing.
        stats: empty but for the rule turning_point, see `_turning_point_stats`.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if values.ndim != 2 or values.shape[1] < 1 or (config.needs_values and values.shape[1] != num_steps + 1):
        wanted = f"(N, {num_steps + 1})" if config.needs_values else "(N, C), C >= 1"
        raise ValueError(f"credit: rule {config.rule} needs values {wanted}, got {tuple(values.shape)}")
    if config.rule == "terminal":
        return terminal(values[:, -1], num_steps), {}
    if config.rule == "turning_point":
        rewards, selected, kept = turning_point(values, config.turning_point, group_ids)
        return rewards, _turning_point_stats(values, selected, kept, config.turning_point)
    rule: Callable[[Tensor], Tensor] = {"value": value, "gain": gain}[config.rule]
    return rule(values), {}


def _turning_point_stats(
    values: Tensor, selected: Tensor, kept: Tensor, settings: TurningPointConfig
) -> dict[str, float]:
    """Rates of selection before balancing beside those of pure noise, and the share that balancing kept.

    The rates are over samples without a missing value, as the null rates are; a rate of no pair is left out.
    """
    interior_null, first_null = null_rates(selected.shape[1], settings.consistent)
    complete = selected[values.isfinite().all(1)]
    stats = {"credit/kept_fraction": float(kept.sum() / selected.sum()) if selected.any() else 1.0}
    if complete[:, 1:].numel():
        stats["credit/turning_point_rate"] = float(complete[:, 1:].double().mean())
        stats["credit/turning_point_null"] = interior_null
    if settings.first_step and len(complete):
        stats["credit/first_step_rate"] = float(complete[:, 0].double().mean())
        stats["credit/first_step_null"] = first_null
    return stats


@cache
def null_rates(num_steps: int, consistent: bool) -> tuple[float, float]:
    """Rates at which turning points appear where values are a Gaussian random walk, so nothing turns but noise.

    Args:
        num_steps: number S >= 1 of trained steps.
        consistent: see `turning_points`.

    Returns:
        Share of selected pairs among the steps after the first (0 if there are none), and share of first steps.

    Raises:
        ValueError: if `num_steps` < 1.
    """
    if num_steps < 1:
        raise ValueError(f"credit: num_steps must be at least 1, got {num_steps}")
    steps = torch.randn(NULL_WALKS, num_steps, generator=torch.Generator().manual_seed(0))
    walks = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    selected = turning_points(walks, consistent).double()
    return float(selected[:, 1:].mean()) if num_steps > 1 else 0.0, float(selected[:, 0].mean())


def _checked(values: Tensor) -> Tensor:
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"credit: values must have shape (N, S+1) with S >= 1, got {tuple(values.shape)}")
    return values
