"""PRDP: regress differences of log-ratios onto differences of rewards (arXiv 2402.08714).

A policy that maximises reward minus beta KL has log-ratios to the reference that differ, between two trajectories of one
prompt, by exactly their reward difference over beta. Notation: N trajectories of S stored steps; log-probs are means over
the latent dimensions, as the published clip ranges suppose.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StepReduction = Literal["mean", "sum"]


def reward_difference_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    log_prob_ref: Tensor,
    rewards: Tensor,
    groups: Tensor,
    beta: float,
    step_clip: float,
    reduce_steps: StepReduction = "mean",
) -> tuple[Tensor, dict[str, float]]:
    """mean over prompts and pairs r_a > r_b of max(e^2, e_clip^2), e = (u_a - u_b) - (r_a - r_b) / beta (2402.08714).

    u is the mean (the paper's appendix; its equations sum) over steps of log_prob - log_prob_ref; for e_clip each step's
    value is first clamped to +- step_clip around that of the weights that sampled.

    Args:
        log_prob, log_prob_old, log_prob_ref: (N, S) float64 of the trained weights, of those that sampled, and of the
            reference.
        rewards: (N,), NaN where missing: such a trajectory is in no pair.
        groups: (N,) integers, equal for the trajectories of one prompt.
        beta: weight of the KL, above 0, in units of the reward.
        step_clip: half width, above 0.
        reduce_steps: "mean" or "sum".

    Returns:
        loss: scalar; 0, without gradient, if no group has two different rewards.
        stats: `pairs` (their number), `groups` (with a pair); sums over groups of means over pairs: `abs_error` |e|,
            `abs_target` |r_a - r_b| / beta.
    """
    ratio, ratio_old = log_prob - log_prob_ref, log_prob_old - log_prob_ref
    clipped = torch.minimum(torch.maximum(ratio, ratio_old - step_clip), ratio_old + step_clip)
    reduce = torch.mean if reduce_steps == "mean" else torch.sum
    total, total_clipped = reduce(ratio, dim=1), reduce(clipped, dim=1)
    losses, stats = [], {"pairs": 0.0, "groups": 0.0, "abs_error": 0.0, "abs_target": 0.0}
    for group in torch.unique(groups):
        rows = (groups == group).nonzero().flatten()
        difference = rewards[rows, None] - rewards[None, rows]
        a, b = (difference > 0).nonzero(as_tuple=True)  # each pair once; neither ties nor missing rewards
        if not len(a):
            continue
        target = difference[a, b].to(total.dtype) / beta
        error = total[rows[a]] - total[rows[b]] - target
        error_clipped = total_clipped[rows[a]] - total_clipped[rows[b]] - target
        losses.append(torch.maximum(error.square(), error_clipped.square()).mean())
        stats["pairs"] += len(a)
        stats["groups"] += 1
        stats["abs_error"] += float(error.detach().abs().mean())
        stats["abs_target"] += float(target.abs().mean())
    return torch.stack(losses).mean() if losses else ratio.new_zeros(()), stats


def step_weights(
    log_prob: Tensor,
    log_prob_old: Tensor,
    log_prob_ref: Tensor,
    rewards: Tensor,
    groups: Tensor,
    beta: float,
    step_clip: float,
    reduce_steps: StepReduction = "mean",
) -> tuple[Tensor, float, dict[str, float]]:
    """d loss / d log_prob, (N, S): all that a backward pass through single steps needs.

    With it the sum over (sample, step) of weight x log_prob has the loss's own gradient, step by step: memory is that of
    one micro-batch, whatever the number of pairs and steps. Also returns the loss and the stats of
    `reward_difference_loss`, with `clipped`, the share of steps outside the clip range.
    """
    leaf = log_prob.detach().requires_grad_()
    settings = (log_prob_old, log_prob_ref, rewards, groups, beta, step_clip, reduce_steps)
    loss, stats = reward_difference_loss(leaf, *settings)
    outside = (log_prob - log_prob_old).abs() > step_clip
    stats["clipped"] = float(outside.double().mean()) if outside.numel() else 0.0
    if not loss.requires_grad:
        return torch.zeros_like(log_prob), float(loss), stats
    return torch.autograd.grad(loss, leaf)[0], float(loss.detach()), stats
