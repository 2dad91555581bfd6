"""Which steps of a trajectory are stochastic, and which it shares with its group; only stochastic steps are trained.

The last step T-1 is deterministic: Flow-SDE noise added there stays in the image, Dance-SDE blows up the noise of the
step before, and CPS has std 0. Only DDIM on a grid that ends above 0 keeps noise there, as DDPO does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from samplers.noise import PLAN_STREAM, keyed_generator


@dataclass(frozen=True)
class Plan:
    """T sampling steps and the increasing indices of the stochastic, trained ones; `Plan(T, ())` is a plain ODE.

    noisy_end: the last step may be stochastic. split: number of first steps that are taken apart from the rest, by a
    group together if shared; noisy_prefix: they are drawn by the kernel too, though never trained.
    """

    num_steps: int
    stochastic: tuple[int, ...]
    noisy_end: bool = False
    split: int = 0
    noisy_prefix: bool = False
    shared: bool = True

    def __post_init__(self) -> None:
        last = self.num_steps - 1
        if self.num_steps < 1:
            raise ValueError(f"a plan needs at least 1 step, got {self.num_steps}")
        if list(self.stochastic) != sorted(set(self.stochastic)):
            raise ValueError(f"stochastic steps must increase strictly, got {self.stochastic}")
        if self.stochastic and self.stochastic[-1] == last and not self.noisy_end:
            raise ValueError(f"the last step {last} must be deterministic; leave it out of the plan")
        if self.stochastic and not 0 <= self.stochastic[0] <= self.stochastic[-1] < self.num_steps:
            raise ValueError(f"stochastic steps must lie in 0..{last - (not self.noisy_end)}, got {self.stochastic}")
        if not 0 <= self.split <= (self.stochastic[0] if self.stochastic else 0):
            raise ValueError(f"a group splits before its first stochastic step, got {self.split} and {self.stochastic}")

    def prefix(self) -> Plan:
        """The steps before the split, as a plan of their own."""
        return Plan(self.split, tuple(range(self.split)) if self.noisy_prefix else (), noisy_end=True)

    def suffix(self) -> Plan:
        """The steps from the split on, as a plan of their own."""
        return Plan(self.num_steps - self.split, tuple(k - self.split for k in self.stochastic), self.noisy_end)


def full_plan(num_steps: int, noisy_end: bool = False) -> Plan:
    """Every step is stochastic, the last one only with noisy_end (DDPO 2305.13301; without, Flow-GRPO 2505.05470)."""
    least = 2 - noisy_end
    if num_steps < least:
        raise ValueError(f"a full plan needs at least {least} steps (the last one is deterministic), got {num_steps}")
    return Plan(num_steps, tuple(range(num_steps - (not noisy_end))), noisy_end)


def suffix_length(stage: int, start: int, end: int, stages: int) -> int:
    """Backward progressive curriculum `start + floor(m (end - start + 1) / stages)` (B2-DiffuRL, arXiv 2503.11240).

    Number of last steps trained at `stage` m >= 0, growing from start to end over `stages`, then staying there.
    """
    return end if stage >= stages else start + stage * (end - start + 1) // stages


def branched_plan(
    num_steps: int, suffix: int, noisy_end: bool = False, noisy_prefix: bool = False, shared: bool = True
) -> Plan:
    """A shared prefix, then `suffix` steps that each member of a group takes on its own (B2-DiffuRL, 2503.11240)."""
    least = 2 - noisy_end
    if not least <= suffix <= num_steps:
        raise ValueError(f"a branched plan of {num_steps} steps needs a suffix of {least}..{num_steps}, got {suffix}")
    split = num_steps - suffix
    return Plan(num_steps, tuple(range(split, num_steps - (not noisy_end))), noisy_end, split, noisy_prefix, shared)


def window_plan(num_steps: int, start: int, size: int, noisy_end: bool = False) -> Plan:
    """Steps start..start+size-1 are stochastic, the rest is ODE (Flow-GRPO-Fast, MixGRPO arXiv 2507.21802)."""
    if size < 1:
        raise ValueError(f"a window needs at least 1 step, got {size}")
    return Plan(num_steps, tuple(range(start, start + size)), noisy_end)


def draw_window(
    num_steps: int, size: int, lo: int, hi: int, seed: int, iteration: int, noisy_end: bool = False
) -> Plan:
    """Window of `size` steps inside [lo, hi), its start uniform over lo..hi-size.

    It depends on (seed, iteration) only: every rank draws the same window, so group statistics per step are over the
    whole group. Raises ValueError unless 0 <= lo, lo + size <= hi <= num_steps - 1 (num_steps with noisy_end).
    """
    errors = window_errors(num_steps, size, lo, hi, noisy_end)
    if errors:
        raise ValueError("; ".join(errors))
    generator = keyed_generator(seed=seed, iteration=iteration, stream=PLAN_STREAM)
    return window_plan(num_steps, int(generator.integers(lo, hi - size + 1)), size, noisy_end)


def sliding_window(
    num_steps: int, size: int, lo: int, hi: int, every: int, stride: int, iteration: int, noisy_end: bool = False
) -> Plan:
    """Window of `size` steps inside [lo, hi) that moves by `stride` every `every` iterations (MixGRPO, arXiv 2507.21802).

    It starts at lo, and again after its last whole place. Raises ValueError as `draw_window`.
    """
    errors = window_errors(num_steps, size, lo, hi, noisy_end)
    if errors or every < 1 or stride < 1:
        raise ValueError("; ".join(errors) or f"every and stride must be at least 1, got {every} and {stride}")
    places = (hi - size - lo) // stride + 1
    return window_plan(num_steps, lo + stride * ((iteration // every) % places), size, noisy_end)


def window_errors(num_steps: int, size: int, lo: int, hi: int, noisy_end: bool = False) -> list[str]:
    """What is wrong with a window range, one line each; an empty list if nothing is."""
    errors = []
    if size < 1:
        errors.append(f"window_size must be at least 1, got {size}")
    if lo < 0 or hi < lo + max(size, 1):
        errors.append(f"window_range [{lo}, {hi}) must start at 0 or later and hold window_size = {size} steps")
    end = num_steps - (not noisy_end)
    if hi > end:
        reason = "" if noisy_end else ": the last step is deterministic"
        errors.append(f"window_range [{lo}, {hi}) must end at {end} or before{reason}")
    return errors


@dataclass
class BranchConfig:
    """The branched plan (B2-DiffuRL, arXiv 2503.11240): a group shares its first steps, then branches."""

    suffix_start: int | None = None
    """Steps after the split, the trained ones, at the first iteration; null: 70 % of num_steps, rounded up."""
    suffix_end: int | None = None
    """Steps after the split in the end; null: num_steps. Equal to suffix_start: no curriculum."""
    stages: int = 100
    """Iterations over which the suffix grows from suffix_start to suffix_end; then it stays."""
    prefix: str = "auto"
    """The steps before the split: ode, stochastic, or auto (stochastic with ddim as published, ode with flow kernels)."""
    shared: bool = True
    """False: no branches, every sample has its own noise and prefix; what is left is the curriculum."""

    def lengths(self, num_steps: int) -> tuple[int, int]:
        """First and last length of the suffix, with the defaults filled in."""
        start = math.ceil(0.7 * num_steps) if self.suffix_start is None else self.suffix_start
        return start, num_steps if self.suffix_end is None else self.suffix_end

    def plan(self, num_steps: int, iteration: int, kernel: str) -> Plan:
        """The plan of an iteration."""
        noisy_prefix = self.prefix == "stochastic" or (self.prefix == "auto" and kernel == "ddim")
        suffix = suffix_length(iteration, *self.lengths(num_steps), self.stages)
        return branched_plan(num_steps, suffix, kernel == "ddim", noisy_prefix, self.shared)

    def validate(self, num_steps: int, kernel: str) -> list[str]:
        """Every error, one line each; an empty list if the settings can work."""
        errors = []
        (start, end), least = self.lengths(num_steps), 1 if kernel == "ddim" else 2
        if not least <= start <= end <= num_steps:
            errors.append(
                f"branch: need {least} <= suffix_start <= suffix_end <= num_steps = {num_steps}, got {start} and {end}"
            )
        if self.stages < 1:
            errors.append(f"branch.stages must be at least 1, got {self.stages}")
        if self.prefix not in ("auto", "ode", "stochastic"):
            errors.append(f"branch.prefix must be auto, ode or stochastic, got {self.prefix!r}")
        return errors
