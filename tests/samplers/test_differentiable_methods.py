"""Published methods as settings of the adjoint: DRTune, FlowBP-Sparse and DRaFT-LV against their own definitions."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from torch import Tensor

from samplers.differentiable import Chain, Steps, backward_chain, joined, run_chain
from samplers.gradient_plan import BackpropConfig, GradientPlan, draw_plan, last_step_plan

CASES = runpy.run_path(str(Path(__file__).with_name("test_differentiable.py")))
B, PLANS, SHAPE, T = (CASES[name] for name in ("B", "PLANS", "SHAPE", "T"))
Cond, Net = CASES["Cond"], CASES["Net"]
adjoint, case, distance, gradients, lam_of, loss_of, noise, normal, sampler = (
    CASES[name]
    for name in ("adjoint", "case", "distance", "gradients", "lam_of", "loss_of", "noise", "normal", "sampler")
)


def test_flowbp_with_every_step_is_drtune_with_every_step():
    grid = sampler("ode").grid
    late = draw_plan(BackpropConfig(steps="late_biased", k=T, grad_rescale=0.5, jacobian=False), grid, range(B), 0, 0)
    spread = draw_plan(BackpropConfig(steps="spread", k=T, jacobian=False), grid, range(B), 0, 0)
    ours, theirs = (adjoint(Net(), sampler("ode"), plan, jacobian=False)[0] for plan in (late, spread))
    assert torch.equal(ours, theirs)


def test_flowbp_sparse_is_the_gradient_of_its_composed_chain():
    """x = x_0 + sum dt v~, where v~ of an active step is v with g times its gradient and else the stored velocity."""
    net, steps = Net(), sampler("ode")
    x, cond = case()
    config = BackpropConfig(steps="late_biased", k=2, late_bias=1.0, grad_rescale=0.5, jacobian=False)
    plan = draw_plan(config, steps.grid, range(B), 0, 0)
    found, chain, _ = adjoint(net, steps, plan, jacobian=False)
    stored = run_chain(net.velocity, x, cond, steps, PLANS["all"], noise).states
    composed = x.double()
    for k in range(T):
        v = net.velocity(stored[k][1], steps.grid[k].expand(B), cond)
        on = (plan.active[:, k] * plan.weight).view(-1, 1, 1, 1)
        composed = composed + float(steps.grid[k + 1] - steps.grid[k]) * (v.detach() + on * (v - v.detach()))
    torch.testing.assert_close(composed.detach().float(), chain.final, rtol=0, atol=1e-5)
    loss_of(composed + (chain.final - composed).detach()).backward()
    assert (plan.weight > 1).all()
    assert distance(found, gradients(net)) < 1e-6


def test_draft_lv_adds_copies_that_know_nothing_of_the_sampled_latent():
    """The copies start from the final state as a constant: their gradient is that of one step each, and no more."""
    net, steps = Net(), sampler("ode")
    x, cond = case()
    t = steps.grid[-2]
    first = PLANS["last 1"]
    chain = run_chain(net.velocity, x, cond, steps, first, noise)
    again = last_step_plan(B, T)
    copies = []
    for draw in range(2):
        noised = (1 - t) * chain.final + t * normal(B, *SHAPE, seed=50 + draw)
        copies.append((run_chain(net.velocity, noised, cond, steps, again, noise), again))
        torch.testing.assert_close(
            copies[-1][0].final,
            (noised - t * net.velocity(noised, t.expand(B), cond).float()).detach(),
            rtol=0,
            atol=1e-6,
        )
    whole, plan = joined([(chain, first), *copies])
    assert (len(plan), whole.nfe) == (3 * B, B * (T + 1 + 1))
    lam = lam_of(whole.final)
    rows = torch.arange(B).repeat(3)
    backward_chain(net.velocity, whole, cond.take(rows), steps, plan, lam)
    found = gradients(net)

    def reference(held: bool) -> Tensor:
        """One graph of the last step and of the copies, whose start is held or not."""
        state = chain.states[T - 1][1]
        final = state - t * net.velocity(state, t.expand(B), cond).float()
        finals = [final]
        for draw in range(2):
            noised = (1 - t) * (final.detach() if held else final) + t * normal(B, *SHAPE, seed=50 + draw)
            finals.append(noised - t * net.velocity(noised, t.expand(B), cond).float())
        (torch.cat(finals) * lam).sum().backward()
        return gradients(net)

    assert distance(found, reference(held=True)) < 1e-6
    assert distance(found, reference(held=False)) > 0.01
    # without copies it is DRaFT-1
    same, only = joined([(chain, first)])
    backward_chain(net.velocity, same, cond, steps, only, lam[:B])
    assert torch.equal(gradients(net), _draft_1(net, chain, cond, steps, first, lam[:B]))


def _draft_1(net: Net, chain: Chain, cond: Cond, steps: Steps, plan: GradientPlan, lam: Tensor) -> Tensor:
    backward_chain(net.velocity, chain, cond, steps, plan, lam)
    return gradients(net)
