"""Noise level per step, as high as gains and losses of the reward stay balanced (DenseGRPO, arXiv 2601.20218).

A table psi holds one level per step, raised where about as many samples gain as lose by that step's noise and lowered
where they do not. It counts either the diffusion sigma itself or a multiplier of the Flow-SDE's `sqrt(t / (1 - t))`.
Tables are float64 CPU tensors (T,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["fraction", "literal"]
Parameter = Literal["multiplier", "sigma"]

SETTLED_OVER = 10
"""Iterations that the table must keep still before the search ends, and that the result is the mean of."""
SETTLED_STEPS = 3
"""How far, in steps, an entry may be from where it was that many iterations before."""
HARDLY_MEASURED = 0.05
"""Share of samples with a gain other than 0 below which the level of a step says little."""


@dataclass
class CalibrationConfig:
    """How the noise level of each step is found before training (arXiv 2601.20218); read with `sampler.psi`."""

    rule: Rule = "fraction"
    """fraction: raise a step while |up - down| <= tolerance (up + down). literal: the published |up - down| <
    count_tolerance, which drifts to no noise for more than a few samples, balanced or not."""
    tolerance: float = 0.2
    """fraction: imbalance that still raises a step; 0.2 is a split of 60 to 40."""
    count_tolerance: int = 2
    """literal: difference of the two counts below which a step is raised."""
    step: float = 0.01
    """How far one iteration moves each entry."""
    param: Parameter = "multiplier"
    """What moves: the multiplier of sqrt(t / (1 - t)), for which one step means the same at every t, or sigma."""
    init: float = 0.7
    """Noise level a of the Flow-SDE that the search starts from."""
    samples: int = 128
    """Images per iteration; at least 64, or chance decides the rule fraction."""
    iterations: int = 100
    """Most iterations; fewer if the table settles before."""
    psi_min: float = 0.02
    """Lowest entry, in units of `param`, or the initial entry if that is lower."""
    psi_max_factor: float = 2.0
    """Highest entry as a multiple of the initial one."""
    seed: int = 4321
    """Seed of prompts and noise; they differ from those of training even if the seeds are equal."""

    def validate(self) -> list[str]:
        """Every error, one line each, naming the field."""
        errors = []
        for name, choices in (("rule", get_args(Rule)), ("param", get_args(Parameter))):
            if getattr(self, name) not in choices:
                errors.append(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("step", "init", "psi_min"):
            if not 0 < getattr(self, name) < float("inf"):
                errors.append(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("count_tolerance", "samples", "iterations"):
            if getattr(self, name) < 1:
                errors.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.tolerance < 1:
            errors.append(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if not 1 <= self.psi_max_factor < float("inf"):
            errors.append(f"psi_max_factor must be at least 1, got {self.psi_max_factor}")
        if self.seed < 0:
            errors.append(f"seed must not be negative, got {self.seed}")
        return errors


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found: T steps, of which S were searched, in I iterations.

    history: (I+1, T) sigmas, the first row the initial ones. up, down: (I, S) share of samples whose gain was > 0 or
    < 0 under the table of that iteration (exact zeros in neither, missing gains left out). settled: stopped before
    the last iteration because the table kept still.
    """

    sigmas: Tensor
    multipliers: Tensor
    history: Tensor
    up: Tensor
    down: Tensor
    settled: bool

    @property
    def iterations(self) -> int:
        """Iterations done."""
        return len(self.up)

    def hardly_measured(self) -> Tensor:
        """Whether, over the last 10 iterations, almost no sample gained or lost at each of the S steps: (S,) bool."""
        return (self.up + self.down)[-SETTLED_OVER:].mean(dim=0) < HARDLY_MEASURED


def flow_sde_sigmas(grid: Tensor, level: float) -> Tensor:
    """Diffusion `a sqrt(t / (1 - t))` of each step of a grid (T+1,) -> (T,) float64 (Flow-GRPO, arXiv 2505.05470).

    At t = 1 the next time stands for t in 1 - t, as in the kernel flow_sde.
    """
    times = grid.detach().cpu().double()
    t, t_next = times[:-1], times[1:]
    return level * torch.sqrt(t / torch.where(t == 1, 1 - t_next, 1 - t))


def multipliers_to_sigmas(multipliers: Tensor, grid: Tensor) -> Tensor:
    """Diffusion of each step for Flow-SDE levels that differ by step: (T,) and grid (T+1,) -> (T,) float64."""
    return multipliers.double() * flow_sde_sigmas(grid, 1.0)


def sigmas_to_multipliers(sigmas: Tensor, grid: Tensor) -> Tensor:
    """Inverse of `multipliers_to_sigmas`."""
    return sigmas.double() / flow_sde_sigmas(grid, 1.0)


def balanced(up: Tensor, down: Tensor, config: CalibrationConfig) -> Tensor:
    """Whether counts of gains > 0 and < 0 (any equal shapes) count as balanced; so they do if both are 0."""
    up, down = up.double(), down.double()
    if config.rule == "literal":
        return (up - down).abs() < config.count_tolerance
    return (up - down).abs() <= config.tolerance * (up + down)


def update_table(
    psi: Tensor, up: Tensor, down: Tensor, config: CalibrationConfig, initial: Tensor, trained: Tensor
) -> Tensor:
    """One step up for balanced steps and down for others, within the bounds (arXiv 2601.20218); all arguments (T,).

    up, down: how many samples gained and lost at each step. trained: bool, False keeps the entry as it is.
    """
    low = initial.clamp(max=config.psi_min)
    moved = psi + torch.where(balanced(up, down, config), config.step, -config.step)
    return torch.where(trained, moved.clamp(low, config.psi_max_factor * initial), psi)


def settled(history: Sequence[Tensor], step: float) -> bool:
    """Whether no entry of the last table (T,) is more than 3 steps from where it was 10 iterations before."""
    if len(history) <= SETTLED_OVER:
        return False
    distance = (history[-1] - history[-1 - SETTLED_OVER]).abs()
    # each table is a sum of many steps: a hair more than 3 of them is 3
    return bool((distance <= SETTLED_STEPS * step * (1 + 1e-6)).all())


def calibrate_table(
    gains: Callable[[Tensor, int], Tensor],
    grid: Tensor,
    plan_steps: Sequence[int],
    config: CalibrationConfig,
    report: Callable[[str, int, int], None] | None = None,
    done: Sequence[Tensor] = (),
    keep: Callable[[Tensor], None] | None = None,
) -> CalibrationResult:
    """Search the table of a grid (T+1,), starting from the Flow-SDE of level `config.init` (arXiv 2601.20218).

    `gains(sigmas (T,), iteration)` samples with these noise levels and returns the gains (N, S) at the S `plan_steps`,
    NaN where one is missing. Steps outside the plan keep their initial entry. The result is the mean of the last 10
    tables, or of all that were made if fewer. An iteration is no more than three counts of samples for each step: who
    gained, who lost, who has a gain at all. `keep` gets them, (3, S) int64, and a search that is given them again as
    `done` takes them for its first iterations and goes on from there exactly. Raises ValueError if the gains do not have
    S columns.
    """
    steps, factor = list(plan_steps), flow_sde_sigmas(grid, 1.0)
    unit = factor if config.param == "multiplier" else torch.ones_like(factor)
    initial = config.init * factor / unit
    trained = torch.zeros(len(factor), dtype=torch.bool)
    trained[steps] = True
    history, shares, still = [initial], [], False
    for iteration in range(config.iterations):
        if iteration < len(done):
            counted = done[iteration]
        else:
            if report is not None:
                report("calibrating", iteration, config.iterations)
            counted = _count(gains(history[-1] * unit, iteration), len(steps))
            if keep is not None:
                keep(counted)
        counts = torch.zeros(2, len(factor))
        counts[:, steps] = counted[:2].float()
        shares.append(counted[:2] / counted[2].clamp(min=1))
        history.append(update_table(history[-1], counts[0], counts[1], config, initial, trained))
        still = settled(history, config.step)
        if still:
            break
    if report is not None:
        report("calibrating", len(shares), len(shares))
    sigmas = torch.stack(history[1:][-SETTLED_OVER:]).mean(dim=0) * unit
    sigmas = torch.where(trained, sigmas, initial * unit)
    up, down = torch.stack(shares).unbind(dim=1)
    return CalibrationResult(sigmas, sigmas / factor, torch.stack(history) * unit, up, down, still)


def _count(gains: Tensor, steps: int) -> Tensor:
    # (N, S) gains -> (3, S) int64: how many are above 0, below 0, and there at all
    if gains.dim() != 2 or gains.shape[1] != steps:
        raise ValueError(f"gains must have a column for each of {steps} steps, got {tuple(gains.shape)}")
    return torch.stack([(gains > 0).sum(dim=0), (gains < 0).sum(dim=0), (~gains.isnan()).sum(dim=0)]).cpu()
