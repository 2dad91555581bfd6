"""Trajectories with their log-probs (`rollout`) and plain deterministic sampling (`solve`).

A velocity is a function `velocity(x (B, ...) float32, t (B,) float32 in [0, 1], cond) -> (B, ...)`. Use the same one,
and `predict_transition`, for rollout and for training: then the first probability ratio is 1 by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.completions import CompletionPlan, Wavefront
from samplers.kernels import KERNEL_LOG_PROB, KERNELS, NoiseLevel, Transition, log_prob, ode
from samplers.plans import Plan

Velocity = Callable[[Tensor, Tensor, Any], Tensor]

SOLVERS = ("euler", "dpm2m")


@dataclass
class Trajectory:
    """What one rollout leaves behind; B images, T steps, S stochastic ones.

    states: T+1 tensors (B, ...) in the stored dtype, None where no stochastic step starts or ends; the last one, the
    sample, is always there.
    log_probs: (B, S) float32, or the dtype asked for; columns in the order of `plan.stochastic`. grid: (T+1,) float32.
    completions: S clean samples (B, ...), from the state before each stochastic step; empty if none were asked for.
    nfe: velocity evaluations, summed over images and completions (guidance that runs the network twice counts once here).
    calls: batched velocity calls, one after the other, if `chunk` never splits one.
    """

    states: list[Tensor | None]
    log_probs: Tensor
    grid: Tensor
    plan: Plan
    completions: list[Tensor]
    nfe: int
    calls: int

    @property
    def final(self) -> Tensor:
        """The sample x_T, (B, ...)."""
        final = self.states[-1]
        assert final is not None
        return final


def predict_transition(
    velocity: Velocity, x: Tensor, cond: Any, t: Tensor, t_next: Tensor, kernel: str, noise_level: NoiseLevel
) -> tuple[Transition, Tensor]:
    """Transition of one step from x (B, ...) at per-element times t, t_next (B,), and the velocity (B, ...) float32."""
    x = x.float()
    v = velocity(x, t, cond).float()
    return KERNELS[kernel](x, v, t, t_next, noise_level), v


@torch.no_grad()
def rollout(
    velocity: Velocity,
    x0: Tensor,
    cond: Any,
    grid: Tensor,
    plan: Plan,
    kernel: str,
    noise_level: NoiseLevel,
    noise: Callable[[int], Tensor],
    store_dtype: torch.dtype = torch.float32,
    log_prob_form: str | None = None,
    log_prob_dtype: torch.dtype = torch.float32,
    completions: CompletionPlan | None = None,
    chunk: int | None = None,
) -> Trajectory:
    """Sample from the state x0 (B, ...) at grid[0]: `kernel` at the plan's stochastic steps, Euler at the others.

    The plan's split is not looked at: a branched trajectory is a rollout of its prefix and one of its suffix.

    grid is (T+1,) float32, noise_level a number or one per step (T,), `noise(k)` gives step k's standard normal noise
    (B, ...). Every state is rounded to `store_dtype` before it is scored or fed on, so scoring the stored states again
    gives the same log-probs. `log_prob_form` defaults to the kernel's own.
    completions: also finish the state before each stochastic step deterministically; then `cond` needs a method
    `take(rows)`. chunk: most rows in one velocity call (all at once if None).
    Raises ValueError if grid, plan and kernel do not fit together.
    """
    _check(grid, plan, kernel)
    form = log_prob_form or KERNEL_LOG_PROB.get(kernel, "gaussian")
    levels = torch.as_tensor(noise_level, dtype=torch.float64).cpu().expand(plan.num_steps)
    stochastic = set(plan.stochastic)
    kept = stochastic | {k + 1 for k in stochastic} | {plan.num_steps}
    grid = grid.to(x0.device)
    x = x0.to(store_dtype)
    front = None if completions is None else Wavefront(plan, completions, grid, x.shape[0], store_dtype)
    evaluator = _Evaluator(velocity, completions, cond, chunk)
    states: list[Tensor | None] = [x if 0 in kept else None]
    log_probs: list[Tensor] = []
    for k in range(plan.num_steps):
        v = evaluator(x, k, grid, front)
        t, t_next = grid[k].expand(x.shape[0]), grid[k + 1].expand(x.shape[0])
        step = KERNELS[kernel if k in stochastic else "ode"](x.float(), v, t, t_next, levels[k])
        if k in stochastic:
            x = _add_noise(step, noise(k)).to(store_dtype)
            log_probs.append(log_prob(x, step.mean, step.std, form, log_prob_dtype))
        else:
            x = step.mean.to(store_dtype)
        states.append(x if k + 1 in kept else None)
    empty = torch.zeros(x.shape[0], 0, dtype=log_prob_dtype, device=x.device)
    scores = torch.stack(log_probs, dim=1) if log_probs else empty
    clean = front.finished() if front is not None else []
    return Trajectory(states, scores, grid, plan, clean, evaluator.nfe, evaluator.calls)


class _Evaluator:
    """Velocity calls of one rollout, counted: the live states, and with them every completion that waits at this time."""

    def __init__(self, velocity: Velocity, completions: CompletionPlan | None, cond: Any, chunk: int | None) -> None:
        self.velocity, self.cond, self.chunk = velocity, cond, chunk
        self.other: Velocity | None = completions.velocity if completions is not None else None
        self.nfe = self.calls = 0

    def __call__(self, x: Tensor, k: int, grid: Tensor, front: Wavefront | None) -> Tensor:
        """Velocity (B, ...) float32 of the live states x at step k; the completions make their step on the way."""
        rows = torch.arange(x.shape[0])
        if front is None:
            return self._evaluate(self.velocity, [(x, rows)], grid[k])[0]
        if self.other is None:
            due = front.due(k)
            v, *others = self._evaluate(self.velocity, [(x, rows), *front.pending(due)], grid[k])
            front.advance(k, dict(zip(due, others, strict=True)))
            front.start(k, x, v)
            return v
        front.start(k, x, None)
        due = front.due(k)
        if due:
            others = self._evaluate(self.other, front.pending(due), grid[k])
            front.advance(k, dict(zip(due, others, strict=True)))
        return self._evaluate(self.velocity, [(x, rows)], grid[k])[0]

    def _evaluate(self, velocity: Velocity, parts: list[tuple[Tensor, Tensor]], t: Tensor) -> list[Tensor]:
        x, rows = torch.cat([p[0] for p in parts]).float(), torch.cat([p[1] for p in parts])
        size = self.chunk or len(rows)
        pieces = []
        for chunk, owners in zip(x.split(size), rows.split(size), strict=True):
            whole = len(parts) == 1 and len(owners) == len(rows) and self.other is None
            cond = self.cond if whole else self.cond.take(owners)
            pieces.append(velocity(chunk, t.expand(len(chunk)), cond).float())
        self.nfe += len(rows)
        self.calls += 1
        return list(torch.cat(pieces).split([len(p[0]) for p in parts]))


@torch.no_grad()
def solve(velocity: Velocity, x0: Tensor, cond: Any, grid: Tensor, solver: str = "euler") -> Tensor:
    """Deterministic sample x_T (B, ...) float32 from the initial noise x0 (B, ...); one velocity call per step.

    "euler", or "dpm2m": DPM-Solver++(2M) on the clean estimate (arXiv 2211.01095), as DiffusionNFT
    collects its images (arXiv 2509.16117). Its first step is Euler, and so is its last on grids that end at 0.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    times = [float(t) for t in grid]
    grid = grid.to(x0.device)
    x = x0.float()
    previous = x
    for k in range(len(times) - 1):
        t, t_next = grid[k].expand(x.shape[0]), grid[k + 1].expand(x.shape[0])
        v = velocity(x, t, cond).float()
        clean = x - times[k] * v
        x = ode(x, v, t, t_next).mean
        if solver == "dpm2m":
            # Order 1 in this solver is the Euler step; order 2 extrapolates the clean estimate along log-SNR.
            x = x + (1 - times[k + 1] / times[k]) * _extrapolation(times, k) * (clean - previous)
        previous = clean
    return x


def _extrapolation(times: list[float], k: int) -> float:
    """Half the ratio of step k's length to the one before, in log-SNR; 0 where either is infinite (t = 1 or t = 0)."""
    if k == 0 or times[k - 1] >= 1 or times[k + 1] <= 0:
        return 0.0
    before, here, after = (math.log((1 - t) / t) for t in times[k - 1 : k + 2])
    return (after - here) / (2 * (here - before))


def _add_noise(step: Transition, noise: Tensor) -> Tensor:
    if noise.shape != step.mean.shape:
        raise ValueError(f"noise must have the shape of the latents {tuple(step.mean.shape)}, got {tuple(noise.shape)}")
    return step.mean + step.std.view((-1,) + (1,) * (noise.dim() - 1)) * noise.float()


def _check(grid: Tensor, plan: Plan, kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of {', '.join(KERNELS)}")
    if grid.shape != (plan.num_steps + 1,):
        raise ValueError(f"a plan of {plan.num_steps} steps needs {plan.num_steps + 1} times, got {tuple(grid.shape)}")
    if plan.stochastic and plan.stochastic[-1] == plan.num_steps - 1 and not grid[-1] > 0:
        raise ValueError("a stochastic last step needs a grid that ends above 0: its noise would have std 0")
    if kernel == "ode" and plan.stochastic:
        raise ValueError("kernel ode is deterministic and has no log-prob; use Plan(T, ()) or a stochastic kernel")
