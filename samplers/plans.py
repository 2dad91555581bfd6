"""Which steps of a trajectory are stochastic; only those have a log-prob and can be trained.

The last step T-1 is deterministic in every plan: Flow-SDE noise added there stays in the image, Dance-SDE blows up the
noise of the step before, and CPS has std 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from samplers.noise import PLAN_STREAM, keyed_generator


@dataclass(frozen=True)
class Plan:
    """T sampling steps and the increasing indices, in 0..T-2, of the stochastic ones; `Plan(T, ())` is a plain ODE."""

    num_steps: int
    stochastic: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"a plan needs at least 1 step, got {self.num_steps}")
        if list(self.stochastic) != sorted(set(self.stochastic)):
            raise ValueError(f"stochastic steps must increase strictly, got {self.stochastic}")
        if self.stochastic and self.stochastic[-1] == self.num_steps - 1:
            raise ValueError(f"the last step {self.num_steps - 1} must be deterministic; leave it out of the plan")
        if self.stochastic and not 0 <= self.stochastic[0] <= self.stochastic[-1] < self.num_steps:
            raise ValueError(f"stochastic steps must lie in 0..{self.num_steps - 2}, got {self.stochastic}")


def full_plan(num_steps: int) -> Plan:
    """Every step but the last is stochastic (Flow-GRPO, arXiv 2505.05470); needs num_steps >= 2."""
    if num_steps < 2:
        raise ValueError(f"a full plan needs at least 2 steps (the last one is deterministic), got {num_steps}")
    return Plan(num_steps, tuple(range(num_steps - 1)))


def window_plan(num_steps: int, start: int, size: int) -> Plan:
    """Steps start..start+size-1 are stochastic, the rest is ODE (Flow-GRPO-Fast, MixGRPO arXiv 2507.21802)."""
    if size < 1:
        raise ValueError(f"a window needs at least 1 step, got {size}")
    return Plan(num_steps, tuple(range(start, start + size)))


def draw_window(num_steps: int, size: int, lo: int, hi: int, seed: int, iteration: int) -> Plan:
    """Window of `size` steps inside [lo, hi), its start uniform over lo..hi-size.

    It depends on (seed, iteration) only: every rank draws the same window, so group statistics per step are over the
    whole group. Raises ValueError unless 0 <= lo, lo + size <= hi <= num_steps - 1.
    """
    errors = window_errors(num_steps, size, lo, hi)
    if errors:
        raise ValueError("; ".join(errors))
    generator = keyed_generator(seed=seed, iteration=iteration, stream=PLAN_STREAM)
    return window_plan(num_steps, int(generator.integers(lo, hi - size + 1)), size)


def sliding_window(num_steps: int, size: int, lo: int, hi: int, every: int, stride: int, iteration: int) -> Plan:
    """Window of `size` steps inside [lo, hi) that moves by `stride` every `every` iterations (MixGRPO, arXiv 2507.21802).

    It starts at lo, and again after its last whole place. Raises ValueError as `draw_window`.
    """
    errors = window_errors(num_steps, size, lo, hi)
    if errors or every < 1 or stride < 1:
        raise ValueError("; ".join(errors) or f"every and stride must be at least 1, got {every} and {stride}")
    places = (hi - size - lo) // stride + 1
    return window_plan(num_steps, lo + stride * ((iteration // every) % places), size)


def window_errors(num_steps: int, size: int, lo: int, hi: int) -> list[str]:
    """What is wrong with a window range, one line each; an empty list if nothing is."""
    errors = []
    if size < 1:
        errors.append(f"window_size must be at least 1, got {size}")
    if lo < 0 or hi < lo + max(size, 1):
        errors.append(f"window_range [{lo}, {hi}) must start at 0 or later and hold window_size = {size} steps")
    if hi > num_steps - 1:
        errors.append(
            f"window_range [{lo}, {hi}) must end at {num_steps - 1} or before: the last step is deterministic"
        )
    return errors
