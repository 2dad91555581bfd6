"""Clean images from the states of a trajectory: the deterministic finish whose reward is the value of the state.

The value of state x_k is the reward of its completion, the ODE from t_k to 0 on the training grid (DenseGRPO, arXiv
2601.20218; TP-GRPO, arXiv 2602.06422). All completions under way advance with the live trajectory, one batched velocity
call per time (`Wavefront`): T sequential calls instead of T (T + 3) / 2, and the first step of each is the velocity that
the trajectory has just computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from samplers.kernels import ode
from samplers.plans import Plan

OdeSteps = int | Literal["all"]


@dataclass
class CompletionConfig:
    """How the states of a trajectory are completed to images; only where the credit rule needs values."""

    ode_steps: OdeSteps = "all"
    """Euler steps of a completion: all that remain on the grid, or at most n (arXiv 2601.20218: 1 harms, 2 is between)."""
    chunk: int | Literal["auto"] = "auto"
    """Most rows in one network call; auto: by free memory on a GPU, 128 on a CPU. Results do not depend on it."""
    guidance_scale: float | None = None
    """Guidance of the completions; null: that of the sampler, which lets them reuse the trajectory's velocities."""

    def validate(self, num_steps: int) -> list[str]:
        """Every error, one line each, for trajectories of `num_steps` steps."""
        errors = []
        if self.ode_steps != "all" and not 1 <= self.ode_steps <= num_steps:
            errors.append(
                f"ode_steps must be all or between 1 and sampler.num_steps = {num_steps}, got {self.ode_steps}"
            )
        if self.chunk != "auto" and self.chunk < 1:
            errors.append(f"chunk must be auto or at least 1, got {self.chunk}")
        if self.guidance_scale is not None and not self.guidance_scale >= 0:
            errors.append(f"guidance_scale must be at least 0, got {self.guidance_scale}; use 1 for no guidance")
        return errors


@dataclass(frozen=True)
class CompletionPlan:
    """What a rollout of B images completes: the state before each stochastic step.

    velocity: the completions' own velocity (another guidance); None reuses the trajectory's.
    same_start (B,): images with equal entries start from the same noise and condition, so one completion of the state
    before the first stochastic step serves them all; None if all differ.
    """

    ode_steps: OdeSteps = "all"
    velocity: Any = None
    same_start: Sequence[int] | None = None


def completion_indices(start: int, num_steps: int, ode_steps: OdeSteps = "all") -> tuple[int, ...]:
    """Grid indices, `start` to `num_steps`, of a completion from state `start` (arXiv 2601.20218).

    With m = num_steps - start steps remaining and n = min(m, ode_steps), index j has floor(m (n - j) / n) remaining.
    """
    if not 0 <= start < num_steps:
        raise ValueError(f"a completion starts at step 0..{num_steps - 1}, got {start}")
    if ode_steps != "all" and ode_steps < 1:
        raise ValueError(f"ode_steps must be all or at least 1, got {ode_steps}")
    remaining = num_steps - start
    count = remaining if ode_steps == "all" else min(remaining, ode_steps)
    return tuple(num_steps - remaining * (count - j) // count for j in range(count + 1))


class Wavefront:
    """Completions under way, keyed by the step they started at. States are rounded like the live ones."""

    def __init__(self, plan: Plan, completions: CompletionPlan, grid: Tensor, batch: int, dtype: torch.dtype) -> None:
        self.reuse = completions.velocity is None
        self._grid, self._dtype = grid, dtype
        self._next: dict[int, dict[int, int]] = {}
        for k in plan.stochastic:
            path = completion_indices(k, plan.num_steps, completions.ode_steps)
            self._next[k] = dict(pairwise(path))
        self._states: dict[int, Tensor] = {}
        self._first = min(plan.stochastic, default=0)
        self._rows = dict.fromkeys(plan.stochastic, torch.arange(batch))
        self._owner = torch.arange(batch)
        if completions.same_start is not None:
            self._rows[self._first], self._owner = _representatives(completions.same_start)

    def start(self, k: int, x: Tensor, v: Tensor | None) -> None:
        """Begin at state x (B, ...) of step k, if it is completed; v: its velocity, where that is reused."""
        if k in self._next:
            rows = self._rows[k].to(x.device)
            self._states[k] = x[rows]
            if v is not None:
                self.advance(k, {k: v[rows]})

    def due(self, k: int) -> list[int]:
        """Starts of the completions that wait for a velocity at index k of the grid."""
        return [start for start in self._states if k in self._next[start] and (start < k or not self.reuse)]

    def pending(self, starts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Present states of these completions, each with the images (rows) it belongs to."""
        return [(self._states[start], self._rows[start]) for start in starts]

    def advance(self, k: int, velocities: Mapping[int, Tensor]) -> None:
        """One Euler step from index k for each start in `velocities`."""
        for start, v in velocities.items():
            x = self._states[start]
            t, t_next = (self._grid[i].expand(x.shape[0]) for i in (k, self._next[start][k]))
            self._states[start] = ode(x.float(), v, t, t_next).mean.to(self._dtype)

    def finished(self) -> list[Tensor]:
        """The clean latents (B, ...), one tensor per start in sampling order."""
        done = [self._states[start] for start in sorted(self._states)]
        return [x[self._owner.to(x.device)] if i == 0 else x for i, x in enumerate(done)]


def _representatives(labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Index of the first element of each label, and for each element the position of its label among them."""
    first: dict[int, int] = {}
    for row, label in enumerate(labels):
        first.setdefault(label, row)
    position = {label: i for i, label in enumerate(first)}
    return torch.tensor(list(first.values())), torch.tensor([position[label] for label in labels])
