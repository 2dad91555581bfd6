"""The step-by-step adjoint against plain autograd on the whole chain, and what it may and may not touch or keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers.differentiable import Backward, Chain, Steps, backward_chain, run_chain
from samplers.gradient_plan import GradientPlan
from samplers.grids import linspace_shift_grid
from samplers.kernels import KERNELS
from samplers.plans import Plan
from samplers.rollout import rollout, solve
from samplers.vp import velocity_coefficients

T, B = 5, 3
SHAPE = (2, 4, 4)
LEVELS = {"ode": 0.0, "ddim": 1.0, "cps": 0.7, "flow_sde": 0.7}


@dataclass
class Cond:
    """One number a sample."""

    value: Tensor

    def take(self, rows: Tensor) -> Cond:
        return Cond(self.value[rows])


class Net(torch.nn.Module):
    """A small smooth network in float64, seen as a velocity; `prediction` is what its output stands for.

    States stay float32 as everywhere; in float64 the network adds nothing to the rounding of the adjoint itself.
    """

    def __init__(self, prediction: str = "velocity", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Conv2d(2, 6, 3, padding=1, dtype=torch.float64)
        self.second = torch.nn.Conv2d(6, 2, 3, padding=1, dtype=torch.float64)
        self.prediction = prediction

    def output(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        shift = (t.double() + cond.value).view(-1, 1, 1, 1)
        return self.second(torch.tanh(self.first(x.double()) + shift))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) factors of the output and of x in the velocity."""
        if self.prediction == "velocity":
            return torch.ones_like(t), torch.zeros_like(t)
        return velocity_coefficients(t, self.prediction)

    def slope(self, t: Tensor) -> Tensor:
        return self.coefficients(t)[1]

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.from_output(self.output(x, t, cond), x, t)

    def from_output(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        on_output, on_x = (c.view(-1, 1, 1, 1).double() for c in self.coefficients(t))
        return on_output * output + on_x * x.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise(k: int) -> Tensor:
    return normal(B, *SHAPE, seed=100 + k)


def sampler(kernel: str, num_steps: int = T) -> Steps:
    """Steps on a grid that ends at 0, or above it for ddim, whose last step is drawn too."""
    end = 0.03 if kernel == "ddim" else 0.0
    grid = torch.cat([torch.linspace(0.9, 0.15, num_steps), torch.tensor([end])])
    count = {"ode": 0, "ddim": num_steps}.get(kernel, num_steps - 1)
    levels = torch.full((num_steps,), LEVELS[kernel], dtype=torch.float64)
    return Steps(grid, kernel, frozenset(range(count)), levels)


def plan_of(active: list[list[int]], last: list[int] | None = None, first: int = 0, steps: int = T) -> GradientPlan:
    """A plan with the given active steps of every sample."""
    ends = torch.tensor(last or [steps - 1] * len(active))
    chosen = torch.zeros(len(active), steps, dtype=torch.bool)
    for row, some in enumerate(active):
        chosen[row, some] = True
    return GradientPlan(first, ends, chosen, torch.ones(len(active)))


PLANS = {
    "last 1": plan_of([[4]] * 3),
    "last 3": plan_of([[2, 3, 4]] * 3),
    "all": plan_of([[0, 1, 2, 3, 4]] * 3),
    "of its own length": plan_of([[4], [2, 3, 4], [0, 1, 2, 3, 4]]),
    "cut": plan_of([[0, 1], [2, 3], [3, 4]], last=[1, 3, 4]),
    "each by itself": plan_of([[0, 3], [], [1, 2, 4]]),
    "partial": plan_of([[3], [2, 4], [4]], last=[3, 4, 4], first=2),
}


def loss_of(final: Tensor) -> Tensor:
    """A curved loss, in float64."""
    return (normal(*final.shape, seed=7).double() * torch.sin(final.double())).sum()


def lam_of(final: Tensor) -> Tensor:
    leaf = final.detach().clone().requires_grad_()
    loss_of(leaf).backward()
    return leaf.grad


def case(seed: int = 1) -> tuple[Tensor, Cond]:
    return normal(B, *SHAPE, seed=seed), Cond(torch.linspace(-0.5, 0.5, B, dtype=torch.float64))


def gradients(net: torch.nn.Module) -> Tensor:
    """All gradients as one vector, which are then forgotten."""
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()])
    net.zero_grad(set_to_none=True)
    return found


def one_graph(net: Net, x: Tensor, cond: Cond, steps: Steps, plan: GradientPlan, jacobian: bool = True) -> Tensor:
    """Final states of the same chains in one graph: outputs of inactive steps are held, inputs where there is no Jacobian."""
    finals = []
    for row in range(len(plan)):
        state, last, own = x[row : row + 1].float(), int(plan.last[row]), cond.take(torch.tensor([row]))
        for k in range(plan.first, last + 1):
            jumps = k == last and k < T - 1
            t = steps.grid[k].expand(1)
            t_next = steps.grid[-1 if k == last else k + 1].expand(1)
            active = bool(plan.active[row, k])
            output = net.output(state if jacobian and active else state.detach(), t, own)
            v = net.from_output(output if active else output.detach(), state, t).float()
            stochastic = k in steps.stochastic and not jumps
            step = KERNELS[steps.kernel if stochastic else "ode"](state, v, t, t_next, steps.levels[k])
            state = step.mean + step.std * noise(k)[row : row + 1] if stochastic else step.mean
        finals.append(state)
    return torch.cat(finals)


def adjoint(net: Net, steps: Steps, plan: GradientPlan, **settings: Any) -> tuple[Tensor, Chain, Backward]:
    """Gradients of the loss by the engine."""
    x, cond = case()
    chain = run_chain(net.velocity, x, cond, steps, plan, noise)
    slope = None if net.prediction == "velocity" else net.slope
    back = backward_chain(net.velocity, chain, cond, steps, plan, lam_of(chain.final), slope=slope, **settings)
    return gradients(net), chain, back


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error of a vector."""
    return float((found - expected).norm() / expected.norm())


# -- against autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kernel", LEVELS)
def test_the_adjoint_is_autograd_on_the_whole_chain(kernel, plan):
    """With and without gradient through the network's input, for outputs that are the velocity or the noise.

    Both go through the same float32 states. What differs is how lam is rounded to float32, 6e-8 a step: over five steps
    less than 1e-6 of the whole.
    """
    x, cond = case()
    steps = sampler(kernel)
    for prediction in ("velocity", "epsilon"):
        net = Net(prediction)
        for jacobian in (True, False):
            found, chain, back = adjoint(net, steps, plan, jacobian=jacobian, micro_batch=2)
            final = one_graph(net, x, cond, steps, plan, jacobian)
            torch.testing.assert_close(chain.final, final.detach(), rtol=0, atol=1e-5)
            loss_of(final).backward()
            assert distance(found, gradients(net)) < 1e-6
            assert back.pairs == int(plan.active.sum())


def test_the_jacobian_matters_here():
    """Otherwise the test above would not see it."""
    net = Net()
    with_it, without = (adjoint(net, sampler("ode"), PLANS["all"], jacobian=j)[0] for j in (True, False))
    assert distance(without, with_it) > 0.05


def test_the_full_gradient_is_the_finite_difference_of_the_loss():
    """Central differences over 2e-2: rounding of the float32 states is 1e-6 / 2e-2, curvature about 1e-4."""
    x, cond = case()
    net, steps = Net(), sampler("cps")
    found, _, _ = adjoint(net, steps, PLANS["all"])
    plan = PLANS["all"]
    for seed in range(3):
        direction = normal(len(found), seed=seed).double()
        direction /= direction.norm()
        losses = []
        for sign in (1, -1):
            moved = Net()
            with torch.no_grad():
                vector = torch.nn.utils.parameters_to_vector(moved.parameters()) + sign * 1e-2 * direction
            torch.nn.utils.vector_to_parameters(vector, moved.parameters())
            losses.append(float(loss_of(run_chain(moved.velocity, x, cond, steps, plan, noise).final)))
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx(float(found @ direction), abs=1e-3 * float(found.norm()))


# -- golden numbers ------------------------------------------------------------------------------------------------


class Growth(torch.nn.Module):
    """v = theta x."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.theta * x


UNIFORM = Steps(linspace_shift_grid(4, 1.0), "ode", frozenset(), torch.zeros(4, dtype=torch.float64))


def toy(active: list[int], theta: float = 0.4, count: int = 1, **settings: Any) -> tuple[float, Chain, Backward]:
    """dL / dtheta of L = x_N from x_0 = 2 on four uniform steps."""
    net, x = Growth(theta), torch.full((count, 1), 2.0)
    plan, cond = plan_of([active] * count, steps=4), Cond(torch.zeros(count))
    chain = run_chain(net, x, cond, UNIFORM, plan, lambda k: torch.zeros_like(x))
    back = backward_chain(net, chain, cond, UNIFORM, plan, torch.ones_like(x), **settings)
    return float(net.theta.grad), chain, back


@pytest.mark.parametrize(
    ("active", "jacobian", "gradient"),
    [
        ([0, 1, 2, 3], True, -1.458),
        ([3], True, -0.3645),
        ([2, 3], True, -0.7290),
        ([0, 1, 2, 3], False, -1.7195),
        ([0, 2], False, -0.9050),
    ],
)
def test_a_growing_number_has_the_gradients_of_the_spec(active, jacobian, gradient):
    found, chain, _ = toy(active, jacobian=jacobian)
    assert float(chain.final) == pytest.approx(1.3122, abs=1e-5)
    assert found == pytest.approx(gradient, abs=1e-4)


def test_the_adjoint_is_clipped_step_by_step_and_image_by_image():
    """theta = -4 doubles x and lam each step: x = 2 4 8 16, lam = 8 4 2 1 from the first step to the image; at most 3."""
    unclipped, _, back = toy([0, 1, 2, 3], theta=-4.0)
    assert unclipped == pytest.approx(-0.25 * (16 * 1 + 8 * 2 + 4 * 4 + 2 * 8))
    assert back.growth.tolist() == pytest.approx([8])  # where the first step uses it
    clipped, _, back = toy([0, 1, 2, 3], theta=-4.0, count=2, clip=3.0)
    assert clipped == pytest.approx(2 * -0.25 * (16 * 1 + 8 * 2 + 4 * 3 + 2 * 3))
    assert back.growth.tolist() == pytest.approx([3, 3])
    assert toy([0, 1, 2, 3], theta=-4.0, clip=8.0)[0] == pytest.approx(unclipped)
    # in its own units: a loss of other size is clipped alike
    net, x = Growth(-4.0), torch.full((2, 1), 2.0)
    plan, cond = plan_of([[0, 1, 2, 3]] * 2, steps=4), Cond(torch.zeros(2))
    chain = run_chain(net, x, cond, UNIFORM, plan, lambda k: torch.zeros_like(x))
    backward_chain(net, chain, cond, UNIFORM, plan, torch.tensor([[0.01], [0.0]]), clip=3.0)
    assert float(net.theta.grad) == pytest.approx(0.01 * clipped / 2)


def test_a_clip_reaches_a_sample_whether_its_batch_joins_steps_or_not():
    """Steps whose output is held change lam too, where the network predicts the noise. One chain alone, then beside two
    others, one of which has two active steps, so that lam goes from step to step."""
    net, steps = Net("epsilon"), sampler("ode")
    x, cond = case()
    whole = plan_of([[1], [2, 4], [0, 3]], last=[4, 4, 3])
    unclipped = torch.zeros(())
    for clip in (0.0, 0.1, 2.0):
        chain = run_chain(net.velocity, x, cond, steps, whole, noise)
        lam = lam_of(chain.final)
        lam[1] = 0
        backward_chain(net.velocity, chain, cond, steps, whole, lam, slope=net.slope, clip=clip)
        together, apart = gradients(net), torch.zeros(())
        for row in (0, 2):
            rows = torch.tensor([row])
            alone = run_chain(net.velocity, x[rows], cond.take(rows), steps, whole.take(rows), noise)
            own = (cond.take(rows), steps, whole.take(rows), lam[rows])
            backward_chain(net.velocity, alone, *own, slope=net.slope, clip=clip)
            apart = apart + gradients(net)
        assert distance(together, apart) < 1e-6
        if clip:
            assert distance(together, unclipped) > 1e-3
        else:
            unclipped = together


# -- the sampler is the sampler ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", LEVELS)
def test_an_uncut_chain_is_the_rollout_bit_for_bit(kernel):
    net, steps = Net(), sampler(kernel)
    x, cond = case()
    plan = Plan(T, tuple(sorted(steps.stochastic)), noisy_end=kernel == "ddim")
    expected = rollout(net.velocity, x, cond, steps.grid, plan, kernel, steps.levels, noise)
    found = run_chain(net.velocity, x, cond, steps, PLANS["each by itself"], noise)
    assert torch.equal(found.final, expected.final)
    assert found.nfe == expected.nfe == B * T
    if kernel == "ode":
        assert torch.equal(found.final, solve(net.velocity, x, cond, steps.grid))
    assert not found.final.requires_grad
    for k, (rows, states) in found.states.items():
        assert rows.tolist() == PLANS["each by itself"].active[:, k].nonzero().flatten().tolist()
        assert expected.states[k] is None or torch.equal(states, expected.states[k][rows])
    assert sorted(found.states) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kernel", ["ode", "flow_sde"])
def test_a_chain_that_is_cut_jumps_by_the_clean_estimate(kernel):
    """x - t v, from the state that the uncut chain has there, and the others go on as if alone."""
    net, steps = Net(), sampler(kernel)
    x, cond = case()
    whole = run_chain(net.velocity, x, cond, steps, PLANS["all"], noise)
    found = run_chain(net.velocity, x, cond, steps, PLANS["cut"], noise)
    for row, k in ((0, 1), (1, 3)):
        state, t = whole.states[k][1][row : row + 1], steps.grid[k]
        v = net.velocity(state, t.expand(1), cond.take(torch.tensor([row]))).float()
        torch.testing.assert_close(found.final[row : row + 1], (state - t * v).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.final[2], whole.final[2], rtol=0, atol=1e-6)
    assert found.nfe == 2 + 4 + 5


# -- what is called, and what does not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", [True, False])
def test_only_active_steps_are_called_with_gradient_and_each_once(jacobian):
    net, steps, plan = Net(), sampler("cps"), PLANS["each by itself"]
    x = case()[0]
    calls: Counter[tuple[int, int]] = Counter()

    def watched(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if torch.is_grad_enabled():
            calls.update(
                (int(row), steps.grid.tolist().index(float(time))) for row, time in zip(cond.value, t, strict=True)
            )
        return net.velocity(x, t, cond)

    names = Cond(torch.arange(B, dtype=torch.float64))
    chain = run_chain(watched, x, names, steps, plan, noise)
    assert not calls
    backward_chain(watched, chain, names, steps, plan, lam_of(chain.final), jacobian=jacobian, micro_batch=2)
    assert calls == Counter((row, k) for row, k in plan.active.nonzero().tolist())


def test_no_call_is_made_at_steps_that_are_active_in_no_sample():
    """Attention kernels need not accept a batch of no image."""
    net, rows = Net(), []
    net.first.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])) if torch.is_grad_enabled() else None)
    adjoint(net, sampler("ode"), plan_of([[0, 1, 4]] * 3))
    assert rows == [3, 3, 3]


@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("plan", ["of its own length", "cut"])
def test_the_cut_into_micro_batches_does_not_matter(plan, jacobian):
    net = Net("epsilon")
    one, two, all_at_once = (
        adjoint(net, sampler("flow_sde"), PLANS[plan], jacobian=jacobian, micro_batch=n)[0] for n in (1, 2, 64)
    )
    assert distance(one, all_at_once) < 1e-6
    assert distance(two, all_at_once) < 1e-6


def test_nothing_is_differentiated_without_active_steps():
    found, _, back = adjoint(Net(), sampler("ode"), plan_of([[]] * 3))
    assert not found.any()
    assert (back.pairs, back.growth.tolist(), back.penalty.tolist()) == (0, [1] * 3, [0] * 3)


def test_growth_is_the_norm_at_the_earliest_active_step_whoever_shares_the_batch():
    """One with two active steps, one with a single one, one without any, on a sampler that changes lam at every step."""
    net, steps = Net("epsilon"), sampler("ode")
    together = adjoint(net, steps, plan_of([[1, 4], [1], []]))[2].growth
    apart = adjoint(net, steps, plan_of([[1], [1], []]))[2].growth
    held = float((1 - steps.grid[-1]) / (1 - steps.grid[2]))  # noise predictions: (1 - t_next) / (1 - t), multiplied up
    assert together[1:].tolist() == pytest.approx([held, 1])
    assert apart.tolist() == pytest.approx([held, held, 1])
    assert float(together[0]) != pytest.approx(held, abs=1e-3)


@pytest.mark.parametrize("jacobian", [True, False])
def test_loss_scaling_multiplies_the_parameters_gradients_and_nothing_else(jacobian):
    """By a power of two, so that every number keeps its digits: bit for bit."""
    net, other = Net("epsilon"), Net("epsilon", seed=5)
    settings = {
        "jacobian": jacobian,
        "reference": other.velocity,
        "penalty": torch.tensor([0.1, 0.0, 0.3]),
        "clip": 2.0,
    }
    plain, _, before = adjoint(net, sampler("ddim"), PLANS["last 3"], **settings)
    scaled, _, after = adjoint(net, sampler("ddim"), PLANS["last 3"], **settings, scale=1024.0)
    assert torch.equal(scaled, 1024 * plain)
    assert torch.equal(before.growth, after.growth)
    assert torch.equal(before.penalty, after.penalty)


@pytest.mark.parametrize("jacobian", [True, False])
def test_weights_multiply_what_a_sample_s_steps_add_but_not_lam(jacobian):
    net, steps = Net("epsilon"), sampler("ode")
    x, cond = case()
    weights = torch.tensor([1.0, 2.5, 0.7])
    base = PLANS["each by itself"]
    plan = GradientPlan(base.first, base.last, base.active, weights)
    found, chain, _ = adjoint(net, steps, plan, jacobian=jacobian)
    expected = torch.zeros_like(found)
    for row in range(B):
        lam = lam_of(chain.final)
        lam[torch.arange(B) != row] = 0
        backward_chain(net.velocity, chain, cond, steps, base, lam, jacobian=jacobian, slope=net.slope)
        expected += float(weights[row]) * gradients(net)
    assert distance(found, expected) < 1e-6


# -- the penalty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jacobian", [True, False])
def test_the_penalty_adds_its_gradient_at_the_given_states_and_leaves_lam_alone(jacobian):
    """Averaged over a sample's active steps; weights of the reward's gradient do not reach it."""
    net, other, steps = Net("epsilon"), Net("epsilon", seed=5), sampler("ode")
    _, cond = case()
    base = PLANS["each by itself"]
    plan = GradientPlan(base.first, base.last, base.active, torch.tensor([2.0, 1.0, 1.5]))
    penalty = torch.tensor([0.3, 4.0, 0.7])
    plain, chain, before = adjoint(net, steps, plan, jacobian=jacobian)
    settings = {"jacobian": jacobian, "reference": other.velocity, "penalty": penalty}
    found, _, back = adjoint(net, steps, plan, **settings, micro_batch=2)
    total, means = torch.zeros((), dtype=torch.float64), torch.zeros(B)
    for k, (rows, states) in chain.states.items():
        t, own = steps.grid[k].expand(len(rows)), cond.take(rows)
        gap = (net.velocity(states, t, own) - other.velocity(states, t, own).detach()).square().mean(dim=(1, 2, 3))
        counts = plan.active.sum(dim=1)[rows]
        total = total + (penalty[rows] * gap / counts).sum()
        means[rows] += (gap / counts).detach().float()
    total.backward()
    assert distance(found - plain, gradients(net)) < 1e-6
    torch.testing.assert_close(back.penalty, means)
    assert means[1] == 0  # no active step
    torch.testing.assert_close(back.growth, before.growth)
