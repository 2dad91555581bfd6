"""The gradient of a loss on final images through a chain of sampling steps, one network call at a time.

`run_chain` samples without gradient and keeps the states before the active steps. `backward_chain` then takes the gradient
lam = dL / d(final) back by the discrete adjoint: with `x_{k+1} = a x_k + b v_k + noise`, a step adds `b (dv_k/dtheta)^T lam`
to the parameters' gradients, and lam becomes `a lam + b (dv_k/dx_k)^T lam`. Every kernel is linear in x and v, so a and b
are numbers. Only one network call's activations are alive at a time: a further active step costs one stored state.

A velocity is as in `samplers.rollout`; `cond` needs a method `take(rows)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.gradient_plan import GradientPlan
from samplers.kernels import KERNELS
from samplers.rollout import Velocity

Slope = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Steps:
    """The sampler of a chain: T steps."""

    grid: Tensor
    """(T+1,) float32, falling."""
    kernel: str
    stochastic: frozenset[int]
    """Steps drawn with the kernel; the others, and every jump, are Euler steps."""
    levels: Tensor
    """(T,) float64 noise level of the kernel."""

    def times(self, k: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """(t, t_next) (n,) of step k of chains whose last steps are `last` (n,)."""
        grid = self.grid
        return grid[k].expand(len(last)), torch.where(last.to(grid.device) == k, grid[-1], grid[k + 1])

    def kernel_of(self, k: int, jumps: bool) -> str:
        """Kernel of step k."""
        return self.kernel if k in self.stochastic and not jumps else "ode"

    def jumps(self, k: int, last: Tensor) -> Tensor:
        """(n,) bool: which chains leave the grid at step k, before its last step."""
        return (last == k) & (k < len(self.levels) - 1)

    def coefficients(self, k: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) (n,) float32 of `x_{k+1} = a x_k + b v_k + noise`."""
        t, t_next = self.times(k, last)
        one, zero = torch.ones(len(last), 1, device=t.device), torch.zeros(len(last), 1, device=t.device)
        jumps = self.jumps(k, last).to(t.device)
        found = []
        for x, v in ((one, zero), (zero, one)):
            regular, jump = (KERNELS[self.kernel_of(k, j)](x, v, t, t_next, self.levels[k]).mean for j in (False, True))
            found.append(torch.where(jumps, jump[:, 0], regular[:, 0]))
        return found[0], found[1]


@dataclass
class Chain:
    """What a run of B chains leaves behind."""

    final: Tensor
    """(B, ...) float32 states at the grid's end."""
    states: dict[int, tuple[Tensor, Tensor]]
    """step -> rows (n,) of the chains in which it is active, and their states before it (n, ...)."""
    nfe: int
    """Velocity evaluations, summed over the chains."""


@torch.no_grad()
def run_chain(
    velocity: Velocity, x: Tensor, cond: Any, steps: Steps, plan: GradientPlan, noise: Callable[[int], Tensor]
) -> Chain:
    """Sample B chains from the states x (B, ...) at grid[plan.first]; `noise(k)` gives step k's normal noise (B, ...).

    A chain without a cut takes exactly the steps of `samplers.rollout.rollout`.
    """
    x = x.float()
    states: dict[int, tuple[Tensor, Tensor]] = {}
    nfe = 0
    for k in range(plan.first, int(plan.last.max()) + 1 if len(plan) else 0):
        rows = (plan.last >= k).nonzero().flatten()
        everyone = len(rows) == len(plan)
        here, last = (x if everyone else x[rows]), plan.last[rows]
        kept = plan.active[rows, k].nonzero().flatten()
        if len(kept):
            states[k] = (rows[kept], here[kept])
        t, t_next = steps.times(k, last)
        v = velocity(here, t, cond if everyone else cond.take(rows)).float()
        nfe += len(rows)
        step = KERNELS[steps.kernel_of(k, False)](here, v, t, t_next, steps.levels[k])
        moved = step.mean
        if k in steps.stochastic:
            spread = step.std.view((-1,) + (1,) * (x.dim() - 1))
            moved = moved + spread * (noise(k) if everyone else noise(k)[rows]).float()
        cut = steps.jumps(k, last)
        if bool(cut.any()):
            jump = KERNELS["ode"](here, v, t, t_next, 0.0).mean
            moved = torch.where(cut.to(x.device).view((-1,) + (1,) * (x.dim() - 1)), jump, moved)
        if everyone:
            x = moved
        else:
            x = x.clone()
            x[rows] = moved
    return Chain(x, states, nfe)


def joined(parts: Sequence[tuple[Chain, GradientPlan]]) -> tuple[Chain, GradientPlan]:
    """Chains of several runs as one, in their order, for one `backward_chain`."""
    states: dict[int, list[tuple[Tensor, Tensor]]] = {}
    count = 0
    for chain, _ in parts:
        for k, (rows, x) in chain.states.items():
            states.setdefault(k, []).append((rows + count, x))
        count += len(chain.final)
    merged = {k: (torch.cat([r for r, _ in some]), torch.cat([x for _, x in some])) for k, some in states.items()}
    plan = GradientPlan(
        min(plan.first for _, plan in parts),
        torch.cat([plan.last for _, plan in parts]),
        torch.cat([plan.active for _, plan in parts]),
        torch.cat([plan.weight for _, plan in parts]),
    )
    chain = Chain(torch.cat([chain.final for chain, _ in parts]), merged, sum(chain.nfe for chain, _ in parts))
    return chain, plan


@dataclass
class Backward:
    """What `backward_chain` reports."""

    pairs: int
    """(sample, step) pairs that were differentiated."""
    links: int
    """Those from which gradient ran on to an earlier step of the sample, through the network's input."""
    penalty: Tensor
    """(B,) float32: mean over a sample's active steps of mean((v - v_ref)^2); 0 without a reference."""
    growth: Tensor
    """(B,) float32: norm of lam at the end of a sample's earliest active step over that at the image; 1 without one."""


def backward_chain(
    velocity: Velocity,
    chain: Chain,
    cond: Any,
    steps: Steps,
    plan: GradientPlan,
    lam: Tensor,
    *,
    jacobian: bool = True,
    slope: Slope | None = None,
    micro_batch: int = 8,
    reference: Velocity | None = None,
    penalty: Tensor | None = None,
    clip: float = 0.0,
    scale: float = 1.0,
) -> Backward:
    """Add dL/dtheta of the active steps to the gradients of the parameters that `velocity` uses.

    lam: (B, ...) float32 dL/d(final). jacobian: let gradient run through the network's input to earlier active steps.
    slope(t): (n,) derivative of the velocity by x where the network's output is held, None for 0 (a network that predicts
    the velocity). micro_batch: most rows of one differentiated call; results do not depend on it. reference and penalty
    (B,): add `penalty mean((v - v_ref)^2)`, averaged over a sample's active steps, at the stored states, taken as given.
    clip: largest norm of lam as a multiple of its norm at the image, 0 for no limit. scale: factor of all parameter
    gradients (loss scaling); lam is kept free of it.
    """
    call = _Call(velocity, cond, steps, plan, slope, reference, penalty, scale)
    links = int((plan.active.sum(dim=1) - 1).clamp_min(0).sum()) if jacobian else 0
    with torch.enable_grad():
        growth = (call.sequential if links else call.independent)(chain, lam, micro_batch, clip)
    return Backward(call.pairs, links, call.distance / call.counts.to(lam.device), growth)


class _Call:
    """The differentiated network calls of one `backward_chain`."""

    def __init__(
        self,
        velocity: Velocity,
        cond: Any,
        steps: Steps,
        plan: GradientPlan,
        slope: Slope | None,
        reference: Velocity | None,
        penalty: Tensor | None,
        scale: float,
    ) -> None:
        self.velocity, self.cond, self.steps, self.plan = velocity, cond, steps, plan
        self.slope, self.reference, self.scale = slope, reference, scale
        self.counts = plan.active.sum(dim=1).clamp_min(1)
        self.penalty = penalty
        self.distance = torch.zeros(len(plan), device=steps.grid.device)
        self.pairs = 0

    def independent(self, chain: Chain, lam: Tensor, micro_batch: int, clip: float) -> Tensor:
        """No gradient runs from one call to another: calls of different steps share batches."""
        factors = torch.ones(len(self.plan), device=lam.device)
        growth = factors
        rows, states, times, cotangents = [], [], [], []
        for k in range(int(self.plan.last.max()) if len(self.plan) else -1, self.plan.first - 1, -1):
            a, b = self.steps.coefficients(k, self.plan.last)
            if k in chain.states:
                owners, x = chain.states[k]
                rows.append(owners)
                states.append(x)
                times.append(self.steps.grid[k].expand(len(owners)))
                cotangents.append((factors * b)[owners])
                growth = torch.where(self.plan.active[:, k].to(lam.device), factors.abs(), growth)
            factors = self._held(factors, a, b, k, clip)
        if not rows:
            return growth
        where, x, t, factor = (torch.cat(parts) for parts in (rows, states, times, cotangents))
        for some in torch.arange(len(where)).split(micro_batch):
            owners = where[some]
            cotangent = _spread(factor[some], lam) * lam[owners]
            self._backward(x[some], t[some], owners, cotangent, wanted=False)
        return growth

    def sequential(self, chain: Chain, lam: Tensor, micro_batch: int, clip: float) -> Tensor:
        """Step after step, from the image back to the earliest active step."""
        lam = lam.clone()
        whole = _norms(lam)
        growth = torch.ones_like(whole)
        earliest = self.plan.active.int().argmax(dim=1)
        active = self.plan.active.any(dim=1)
        for k in range(int(self.plan.last.max()), int(earliest.min()) - 1, -1):
            a, b = self.steps.coefficients(k, self.plan.last)
            held = self._held(torch.ones_like(a), a, b, k, 0.0)
            before = lam
            lam = _spread(held, lam) * lam
            owners, x = chain.states.get(k, (torch.zeros(0, dtype=torch.long), lam[:0]))
            for some in torch.arange(len(owners)).split(micro_batch) if len(owners) else ():
                who = owners[some]
                wanted = bool((earliest[who] < k).any())
                gradient = self._backward(
                    x[some], self.steps.grid[k].expand(len(who)), who, _spread(b[who], lam) * before[who], wanted
                )
                if gradient is not None:
                    lam[who] = _spread(a[who], lam) * before[who] + gradient
            if clip > 0:
                limit = (clip * whole / _norms(lam).clamp_min(1e-30)).clamp_max(1)
                lam = _spread(torch.where((self.plan.last >= k).to(lam.device), limit, 1.0), lam) * lam
            going = (active & (earliest < k)).to(lam.device) & (whole > 0)
            growth = torch.where(going, _norms(lam) / whole.clamp_min(1e-30), growth)
        return growth

    def _held(self, factors: Tensor, a: Tensor, b: Tensor, k: int, clip: float) -> Tensor:
        """Factors (B,) of lam once it has passed step k with the network's output held; a finished chain keeps its own."""
        slope = self.slope(self.steps.grid[k].expand(len(a))).to(a.device) if self.slope is not None else 0.0
        passed = factors * (a + b * slope)
        if clip > 0:
            passed = passed.clamp(-clip, clip)
        return torch.where((self.plan.last >= k).to(a.device), passed, factors)

    def _backward(self, x: Tensor, t: Tensor, rows: Tensor, cotangent: Tensor, wanted: bool) -> Tensor | None:
        """One differentiated call at x (n, ...), t (n,) of the chains `rows`: parameter gradients, and that of x if `wanted`."""
        cond = self.cond.take(rows)
        x = x.detach().requires_grad_(wanted)
        v = self.velocity(x, t, cond)
        weight = _spread(self.plan.weight[rows].to(x.device), x)
        onto, gradient = weight * cotangent, None
        if self.reference is not None and self.penalty is not None:
            with torch.no_grad():
                away = v.detach().float() - self.reference(x.detach(), t, cond).float()
            per_row = away.square().flatten(1).mean(dim=1)
            self.distance.index_add_(0, rows.to(self.distance.device), per_row)
            share = self.penalty.to(x.device)[rows] / self.counts.to(x.device)[rows]
            onto = onto + _spread(2 * share / away[0].numel(), x) * away
            if wanted:  # the penalty takes the state as given, so its gradient must not reach x
                (gradient,) = torch.autograd.grad(v, x, (self.scale * cotangent).to(v.dtype), retain_graph=True)
        torch.autograd.backward(v, (self.scale * onto).to(v.dtype))
        self.pairs += len(rows)
        if wanted and gradient is None:
            assert x.grad is not None
            gradient = x.grad / weight
        return gradient / self.scale if gradient is not None else None


def _spread(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view((-1,) + (1,) * (like.dim() - 1))


def _norms(lam: Tensor) -> Tensor:
    return lam.flatten(1).norm(dim=1)
