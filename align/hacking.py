"""Whether the optimised reward was hacked: it rises while rewards that only watch fall, and from which iteration on.

Everything is in one unit, the standard deviation of the base model's held-out scores, and counted from the base. The
thresholds are a quarter of it, for the rise as for the fall; a smaller rise counts too if it is more than what chance makes
of as many evaluations, since a reward near its ceiling cannot rise by much and is hacked all the same. The fall is counted
from the held-out rewards' own best evaluation, the base's included: a proxy that first helps and then hurts is past its best
long before the held-out rewards are back below the base. A best among many is partly luck, so a fall must also be larger
than what chance makes of as many evaluations.

Evaluations are compared prompt by prompt where scores by prompt are known, over the prompts that have both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np

RISE = 0.25
LEAST_RISE = 0.05
"""Of a rise that counts although it is below RISE; less is no change that matters, however sure."""
FALL = 0.25
FALSE_ALARM = 0.05
"""Most that the probability of an alarm may be in a whole run whose held-out rewards do not change; of a rise below RISE
that counts, in one whose optimised reward does not."""


@dataclass(frozen=True)
class Point:
    """One evaluation of a run."""

    iteration: int
    """Iterations done; 0 is the base."""
    means: Mapping[str, float]
    """Reward -> mean over the evaluation prompts, in raw units."""
    half_widths: Mapping[str, float] = field(default_factory=dict)
    """Reward -> half width of the 95 % interval of that mean over prompts."""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Reward -> score of each prompt, NaN where missing; empty where a run kept none."""


@dataclass(frozen=True)
class Curve:
    """One reward, or the mean of several, over the evaluations: change since the base in std of the base's scores."""

    names: tuple[str, ...]
    changes: np.ndarray
    """(E,) float64, 0 for the base, NaN where no score is known."""
    by_prompt: np.ndarray | None
    """(K, E, n) each reward's share of it by prompt, NaN where missing; None where an evaluation kept no scores by prompt."""
    errors: np.ndarray
    """(E,) standard error of the level over prompts, NaN where unknown."""
    prompts: int
    """Prompts of an evaluation; 0 where unknown."""

    def error(self, first: int, second: int) -> float:
        """Standard error of the change between two evaluations; NaN where it is not known."""
        return self.between(first, second)[1]

    def between(self, first: int, second: int) -> tuple[float, float, int]:
        """Change from one evaluation to another, its standard error, and the prompts behind it (0 where unknown).

        From the differences by prompt, which come from the same noise; a reward that is silent on some prompts counts by
        the others. Without them from the two intervals as if other prompts had been drawn, which is wider.
        """
        if self.by_prompt is None:
            error = math.hypot(self.errors[first], self.errors[second]) if first != second else 0.0
            return float(self.changes[second] - self.changes[first]), error, 0
        delta = self.by_prompt[:, second] - self.by_prompt[:, first]
        known = np.isfinite(delta)
        counts = known.sum(1)
        fewest = int(counts.min())
        if fewest < 2:
            return math.nan, math.nan, fewest
        means = np.where(known, delta, 0).sum(1) / counts
        # what each prompt adds to the sum of the means: rewards may speak of the same prompts or of different ones
        pulls = (np.where(known, delta - means[:, None], 0) / counts[:, None]).sum(0)
        return float(means.sum()), math.sqrt(float((pulls**2).sum()) * fewest / (fewest - 1)), fewest


@dataclass(frozen=True)
class Parting:
    """Where the optimised and the held-out rewards part, as positions among the evaluations."""

    best: int
    """The held-out rewards' best evaluation: from here on they fall. The advised weights."""
    alarm: int
    """The first evaluation after it at which the fall and the rise are beyond doubt."""


def curve(points: Sequence[Point], units: Mapping[str, float], weights: Mapping[str, float]) -> Curve:
    """The weighted mean of rewards over `points`, the base's first: sum_k w_k d_k / sum_k |w_k|, d_k in `units`.

    Args:
        points: evaluations in ascending order, the first with means of all rewards named.
        units: reward -> std of the base model's held-out scores, above 0.
        weights: reward -> weight, not 0; a negative weight turns the reward's change round, as in training.
    """
    names = [name for name in weights if name in units]
    total = sum(abs(weights[name]) for name in names)
    share = {name: weights[name] / total for name in names}
    changes = np.zeros(len(points))
    errors = np.zeros(len(points))
    for name in names:
        level = np.array([p.means.get(name, math.nan) for p in points])
        changes += share[name] * (level - level[0]) / units[name]
        # as if all rewards erred together: their correlation over prompts is not known from intervals
        half = np.array([p.half_widths.get(name, math.nan) for p in points])
        errors += abs(share[name]) * half / (1.96 * units[name])
    counts = {len(p.scores.get(name, ())) for p in points for name in names}
    count = min(counts, default=0)  # a continued run may evaluate on more prompts or fewer: the first are shared
    if count < 2:
        return Curve(tuple(names), changes, None, errors, 0)
    tables = np.array([[p.scores[name][:count] for p in points] for name in names], dtype=np.float64)
    factors = np.array([share[name] / units[name] for name in names])
    whole = Curve(tuple(names), changes, factors[:, None, None] * (tables - tables[:, :1]), errors, count)
    return replace(whole, changes=np.array([whole.between(0, i)[0] for i in range(len(points))]))


def parting(optimised: Curve, held_out: Curve) -> Parting | None:
    """Where the two part; None where they do not, or not beyond doubt.

    An evaluation after the held-out rewards' best raises the alarm if
    - the optimised reward `rose` above the base, and has not `diverged` since that best;
    - the held-out rewards are at least FALL below their best;
    - that fall exceeds what chance makes of the largest among all pairs of evaluations (Bonferroni, one-sided), with
      prompts enough to tell (n prompts that all fell the same way do so by chance once in 2^n).
    Only the best of all evaluations counts, and a fall that lasts: an alarm is void once the held-out rewards climb above
    where they fell from, or are back within FALL / 2 of it at the last evaluation, or the optimised reward is by then no
    longer above the base.
    """
    held, risen = held_out.changes, optimised.changes
    known = [i for i in range(len(held)) if math.isfinite(held[i]) and math.isfinite(risen[i])]
    if len(known) < 2:
        return None
    best = max(known, key=lambda i: held[i])
    if held[best] - held[known[-1]] < FALL / 2 or risen[known[-1]] <= 0:
        return None
    level = FALSE_ALARM / (len(known) * (len(known) - 1) / 2)
    for i in known:
        if i <= best or not rose(optimised, i, len(known) - 1) or diverged(optimised, best, i):
            continue
        change, error, prompts = held_out.between(best, i)
        if -change < FALL or (held_out.prompts and 0.5**prompts > level):
            continue
        if -change > _quantile(1 - level, prompts - 1) * error:  # False where the error is not known
            return Parting(best, i)
    return None


def rose(optimised: Curve, position: int, tries: int) -> bool:
    """Whether a curve is at least RISE above the base at an evaluation, or by less but more than chance makes of the largest
    rise of `tries` evaluations (Bonferroni, one-sided)."""
    change, error, prompts = optimised.between(0, position)
    if optimised.changes[position] >= RISE:
        return True
    level = FALSE_ALARM / tries
    if not change >= LEAST_RISE or (optimised.prompts and 0.5**prompts > level):
        return False
    return bool(change > _quantile(1 - level, prompts - 1) * error)


def diverged(optimised: Curve, best: int, position: int) -> bool:
    """Whether the optimised reward is itself down: not above the base, or since the evaluation `best` it lost FALL or as much
    as is left of its rise. Then the run diverges, which is another illness than a hacked reward."""
    left = float(optimised.changes[position])
    return left <= 0 or float(optimised.changes[best]) - left >= min(FALL, left)


def _quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion around the normal one (exact to 2 % for 0.5^(freedom + 1) <= 1 - p, as here);
    the normal one where the degrees are not known (below 1)."""
    z = NormalDist().inv_cdf(p)
    if freedom < 1:
        return z
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
