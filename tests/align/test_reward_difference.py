"""Regression on pairs: golden numbers, the loss written out again in loops, its gradient and its invariances."""

import math
import runpy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from align.collect import Batch, collect, score_values
from align.config import load_config
from align.paired import PairedTrajectories
from align.policy_loop import _prompts, run_iteration
from align.reward_difference import reward_difference_loss, step_weights
from align.run import Run, start
from align.updates import micro_batches, stored_steps, weighted_pairs
from samplers.kernels import log_prob
from samplers.rollout import predict_transition

# Three trajectories of three steps: log_prob - log_prob_ref, log_prob - log_prob_old, rewards.
TO_REFERENCE = torch.tensor([[0.01, 0.02, 0.0], [0.0, -0.01, 0.01], [0.02, 0.0, 0.0]], dtype=torch.float64)
TO_OLD = torch.tensor([[0.002, 0.0, -0.001], [0.0, 0.003, 0.0], [0.0, -0.002, 0.001]], dtype=torch.float64)
REWARDS = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
ONE_GROUP = torch.zeros(3, dtype=torch.long)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=25, deadline=None)


def vector(step_clip, reduce_steps="mean"):
    log_prob = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)  # any: only differences count
    return reward_difference_loss(
        log_prob, log_prob - TO_OLD, log_prob - TO_REFERENCE, REWARDS, ONE_GROUP, 1.0, step_clip, reduce_steps
    )


def case(seed, groups=3, size=4, steps=5, moved=1e-3):
    """Log-probs (N, S) of the trained, the sampling and the reference weights, rewards (N,) with a tie and a gap, groups."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(groups * size, steps, generator=g, dtype=torch.float64)
    log_prob = old + moved * torch.randn(old.shape, generator=g, dtype=torch.float64)
    reference = old + 5e-3 * torch.randn(old.shape, generator=g, dtype=torch.float64)
    rewards = torch.rand(len(old), generator=g, dtype=torch.float64)
    rewards[1], rewards[5] = rewards[0], math.nan
    owners = torch.arange(len(old)) % groups
    return log_prob, old, reference, rewards, owners


def by_hand(log_prob, old, reference, rewards, groups, beta, step_clip, reduce_steps="mean"):
    """The loss in loops over prompts, pairs and steps."""
    per_group = []
    for group in sorted(set(groups.tolist())):
        rows, pairs = (groups == group).nonzero().flatten().tolist(), []
        for a in rows:
            for b in rows:
                if rewards[a] > rewards[b]:
                    target = (rewards[a] - rewards[b]) / beta
                    plain = clipped = 0.0
                    for k in range(log_prob.shape[1]):
                        values = []
                        for i in (a, b):
                            ratio, ratio_old = (float(x[i, k] - reference[i, k]) for x in (log_prob, old))
                            values.append((ratio, min(max(ratio, ratio_old - step_clip), ratio_old + step_clip)))
                        plain += values[0][0] - values[1][0]
                        clipped += values[0][1] - values[1][1]
                    scale = 1 / log_prob.shape[1] if reduce_steps == "mean" else 1.0
                    pairs.append(max((scale * plain - target) ** 2, (scale * clipped - target) ** 2))
        if pairs:
            per_group.append(sum(pairs) / len(pairs))
    return float(sum(per_group) / len(per_group))


def test_golden_vector_in_both_forms():
    loss, stats = vector(1e-3)
    assert loss.item() == pytest.approx(0.018094963, abs=1e-9)
    assert vector(math.inf)[0].item() == pytest.approx(0.018051852, abs=1e-9)
    assert (stats["pairs"], stats["groups"]) == (3, 1)
    assert stats["abs_target"] == pytest.approx(0.4 / 3)
    means = TO_REFERENCE.mean(1)
    assert means.tolist() == pytest.approx([0.01, 0.0, 0.0066667], abs=1e-7)
    errors = [abs(float(means[a] - means[b] - (REWARDS[a] - REWARDS[b]))) for a, b in ((0, 1), (0, 2), (2, 1))]
    assert stats["abs_error"] == pytest.approx(sum(errors) / 3)


def test_golden_vector_has_the_clipped_means_of_the_appendix():
    """Against a trajectory at its reference, far off the target 1: the lower of both means counts, far off -1 the upper."""
    still = torch.zeros(3, dtype=torch.float64)
    found = []
    for row in range(3):
        log_prob = torch.stack([TO_REFERENCE[row], still])
        old = torch.stack([TO_REFERENCE[row] - TO_OLD[row], still])
        for rewards in ([1.0, 0.0], [0.0, 1.0]):
            settings_ = (torch.tensor(rewards, dtype=torch.float64), ONE_GROUP[:2], 1.0, 1e-3)
            loss, _ = reward_difference_loss(log_prob, old, torch.zeros_like(old), *settings_)
            found.append((loss.sqrt().item() - 1) * (1 - 2 * rewards[0]))
    lower, upper = found[::2], found[1::2]
    clipped, plain = [0.0096667, -0.00066667, 0.007], [0.01, 0.0, 0.0066667]
    assert lower == pytest.approx([min(pair) for pair in zip(clipped, plain, strict=True)], abs=1e-7)
    assert upper == pytest.approx([max(pair) for pair in zip(clipped, plain, strict=True)], abs=1e-7)


@quick
@given(seeds, st.sampled_from([0.02, 1.0]), st.sampled_from([3e-4, 1e-2]), st.sampled_from(["mean", "sum"]))
def test_loss_is_the_one_written_out_in_loops(seed, beta, step_clip, reduce_steps):
    settings_ = (beta, step_clip, reduce_steps)
    loss, stats = reward_difference_loss(*case(seed), *settings_)
    assert loss.item() == pytest.approx(by_hand(*case(seed), *settings_), rel=1e-10)
    assert stats["groups"] == 3


@quick
@given(seeds)
def test_ties_and_missing_rewards_are_in_no_pair(seed):
    log_prob, old, reference, rewards, groups = case(seed, groups=1, size=6)
    weights, _, stats = step_weights(log_prob, old, reference, rewards, groups, 1.0, 1.0)
    assert stats["pairs"] == 10 - 1  # of the five with a score, two are equal
    assert (weights[5] == 0).all()
    assert (weights[:5] != 0).any(1).all()


@quick
@given(seeds, st.integers(-5000, 5000))
def test_a_constant_per_prompt_added_to_all_rewards_changes_nothing(seed, constant):
    log_prob, old, reference, rewards, groups = case(seed)
    rewards = (rewards * 1024).round() / 1024  # exact sums: ties stay ties
    shift = constant / 1024 * (groups.double() - 1)
    plain = step_weights(log_prob, old, reference, rewards, groups, 0.1, 1e-3)
    shifted = step_weights(log_prob, old, reference, rewards + shift, groups, 0.1, 1e-3)
    assert torch.equal(plain[0], shifted[0])
    assert plain[1:] == shifted[1:]


@quick
@given(seeds)
def test_a_constant_per_prompt_added_to_all_log_ratios_changes_nothing(seed):
    """The partition function of the optimal policy, which differences remove."""
    log_prob, old, reference, rewards, groups = case(seed)
    shift = groups.double().unsqueeze(1) * 0.7
    loss, _ = reward_difference_loss(log_prob, old, reference, rewards, groups, 0.1, 1e-3)
    moved, _ = reward_difference_loss(log_prob, old, reference - shift, rewards, groups, 0.1, 1e-3)
    assert moved.item() == pytest.approx(loss.item(), rel=1e-9)


def test_the_loss_is_zero_exactly_at_log_ratios_of_reward_over_beta():
    beta, rewards, groups = 0.3, torch.tensor([0.1, 0.5, 0.9, 0.2], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    reference = torch.randn(4, 5, dtype=torch.float64)
    best = reference + (rewards / beta).unsqueeze(1) + groups.double().unsqueeze(1)
    assert reward_difference_loss(best, best, reference, rewards, groups, beta, 1e-4)[0].item() < 1e-24
    off = best.clone()
    off[0, 2] += 0.1
    assert reward_difference_loss(off, off, reference, rewards, groups, beta, 1e-4)[0].item() > 1e-4


def test_the_clipped_loss_is_never_below_the_plain_one():
    for seed in range(20):
        plain = reward_difference_loss(*case(seed), 0.05, math.inf)[0]
        assert reward_difference_loss(*case(seed), 0.05, 5e-4)[0] >= plain


@quick
@given(seeds)
def test_weights_are_the_analytic_gradient_where_nothing_is_clipped(seed):
    """2 / (groups P S) (sum of e over pairs that i wins - sum over pairs that it loses)."""
    log_prob, old, reference, rewards, groups = case(seed)
    weights, loss, stats = step_weights(log_prob, old, reference, rewards, groups, 0.2, 1.0)
    means = (log_prob - reference).mean(1)
    expected = torch.zeros(len(rewards), dtype=torch.float64)
    for group in range(3):
        rows = (groups == group).nonzero().flatten().tolist()
        pairs = [(a, b) for a in rows for b in rows if rewards[a] > rewards[b]]
        for a, b in pairs:
            error = means[a] - means[b] - (rewards[a] - rewards[b]) / 0.2
            expected[a] += 2 * error / len(pairs) / 3
            expected[b] -= 2 * error / len(pairs) / 3
    torch.testing.assert_close(weights, (expected / 5).unsqueeze(1).expand(-1, 5), atol=1e-12, rtol=1e-10)
    assert loss == pytest.approx(by_hand(log_prob, old, reference, rewards, groups, 0.2, 1.0))
    assert stats["clipped"] == 0


@quick
@given(seeds, st.sampled_from(["mean", "sum"]))
def test_weights_are_the_gradient_by_finite_differences(seed, reduce_steps):
    arguments = case(seed, groups=2, size=4, steps=3)
    settings_ = (0.1, 7e-4, reduce_steps)
    weights, _, stats = step_weights(*arguments, *settings_)
    assert 0 < stats["clipped"] < 1
    log_prob, h = arguments[0], 1e-8
    for i, k in ((0, 0), (3, 1), (7, 2)):
        up, down = log_prob.clone(), log_prob.clone()
        up[i, k] += h
        down[i, k] -= h
        high, low = (reward_difference_loss(x, *arguments[1:], *settings_)[0].item() for x in (up, down))
        # the loss is up to 100 and has 16 digits
        assert weights[i, k].item() == pytest.approx((high - low) / (2 * h), abs=1e-5, rel=1e-5)


def test_a_step_that_is_clipped_and_still_wrong_in_that_direction_has_no_weight():
    """Both have overshot towards the reward: the clipped error is larger, and its clip stops the step."""
    old = torch.zeros(2, 2, dtype=torch.float64)
    log_prob = torch.tensor([[0.5, 0.05], [-0.05, 0.0]], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    weights, _, stats = step_weights(log_prob, old, old, rewards, ONE_GROUP[:2], 0.1, 0.1)
    assert weights[0, 0] == 0
    assert weights[0, 1] < 0  # to be raised
    assert (weights[1] > 0).all()
    assert stats["clipped"] == 1 / 4
    # gone the wrong way, the plain error is larger, and the step is brought back
    weights, _, _ = step_weights(-log_prob, old, old, rewards, ONE_GROUP[:2], 0.1, 0.1)
    assert (weights[0] < 0).all()


def test_with_a_small_beta_it_is_a_policy_gradient_with_centred_rewards():
    """Weight -(2 B / (P beta)) (r - mean) / S where |difference of rewards / beta| is far above the log-ratios."""
    log_prob, old, reference, _, _ = case(0, groups=1, size=6, steps=5)
    rewards = torch.rand(6, dtype=torch.float64)
    beta, pairs = 1e-6, 15
    weights, _, stats = step_weights(log_prob, old, reference, rewards, torch.zeros(6), beta, 1.0)
    expected = -(2 * 6 / (pairs * beta)) * (rewards - rewards.mean()) / 5
    torch.testing.assert_close(weights, expected.unsqueeze(1).expand(-1, 5), atol=0.1, rtol=1e-6)
    assert stats["abs_target"] > 1e4


def test_equal_rewards_give_no_loss_and_no_gradient():
    log_prob, old, reference, _, groups = case(0)
    weights, loss, stats = step_weights(log_prob, old, reference, torch.ones(12).double(), groups, 1.0, 1e-3)
    assert (loss, stats["pairs"], stats["groups"]) == (0, 0, 0)
    assert (weights == 0).all()
    assert weights.shape == log_prob.shape
    # groups of equal rewards do not thin out the others
    rewards = torch.where(groups == 1, torch.rand(12, dtype=torch.float64), 0.5)
    rows = groups == 1
    alone, _ = reward_difference_loss(
        log_prob[rows], old[rows], reference[rows], rewards[rows], groups[rows], 1.0, 1e-3
    )
    assert reward_difference_loss(log_prob, old, reference, rewards, groups, 1.0, 1e-3)[0] == alone


# -- on real tiny models

UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
KERNELS: dict[str, dict[str, Any]] = {
    "flow": {"kernel": "cps", "noise_level": 0.7},
    "unet": {"kernel": "ddim", "noise_level": 1.0},
}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return UNET["sd_pipeline"](tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture
def begin(tmp_path, write_config, on_cpu, sd15) -> Callable[..., Run]:
    """begin(family, changes) -> a run of PRDP before its first iteration; two prompts of four images."""

    def make(family: str, changes: dict[str, Any]) -> Run:
        path = write_config(tmp_path, "prdp", changes)
        overrides = [f"sampler.{k}={v}" for k, v in KERNELS[family].items()]
        return start(load_config(path, overrides + [f"model.path={sd15}"] * (family == "unet")), Console(quiet=True))

    return make


def quiet(*_: object) -> None:
    pass


def collected(run: Run) -> Batch:
    return collect(run, _prompts(run, 0), list(range(8)), 0, 0, quiet)


def one_graph(
    run: Run, batch: Batch, rows: range, size: int, reference: Tensor, rewards: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of the trajectories at `rows`, all their steps in one graph, and its gradient as one vector."""
    columns = len(batch.plan.stochastic)
    scores = []
    for pairs in micro_batches(rows, columns, size):
        x, x_next, cond, (t, t_next, level) = stored_steps(run, batch, pairs)
        step, _ = predict_transition(run.model.velocity, x, cond, t, t_next, run.kernel, level)
        scores.append(log_prob(x_next, step.mean, step.std, "gaussian", torch.float64))
    settings = (run.config.objective.pair_beta, run.config.objective.step_clip, run.config.objective.reduce_steps)
    index, owners = torch.tensor(list(rows)), torch.tensor([batch.groups[j] for j in rows])
    table, old, reference = torch.cat(scores).view(-1, columns), batch.log_probs[index], reference[index]
    loss, _ = reward_difference_loss(table, old, reference, rewards[index], owners, *settings)
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, run.parameters)])


def two_passes(run: Run, pairs: PairedTrajectories, rows: range, size: int) -> tuple[dict[str, float], Tensor]:
    """What is logged, and the gradient, made from micro-batches of `size`."""
    sums: dict[str, float] = defaultdict(float)
    weights = pairs.weights(rows, sums)
    assert weights is not None
    run.optimizer.zero_grad()
    for some in micro_batches(rows, weights.shape[1], size):
        loss, info, _ = weighted_pairs(run, pairs.batch, some, weights)
        loss.sum().backward()
        sums["worst"] = max(sums["worst"], float((info["ratio"] - 1).abs().max()))
    return sums, torch.cat([p.grad.flatten() for p in run.parameters])


def jolt(run: Run, size: float, seed: int) -> None:
    """Move all weights."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += size * torch.randn(parameter.shape, generator=g)


@pytest.mark.parametrize("family", list(KERNELS))
@pytest.mark.parametrize("reduce_steps", ["mean", "sum"])
def test_two_passes_have_the_gradient_of_the_whole_graph(begin, family, reduce_steps):
    objective = {"pair_beta": 0.2, "step_clip": 1e-3, "reduce_steps": reduce_steps}
    run = begin(family, {"objective": objective, "sampler": {"num_steps": 4, "guidance_scale": 2.0}})
    jolt(run, 0.05, seed=0)  # the reference differs
    batch = collected(run)
    assert batch.log_probs.dtype == torch.float64
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0))
    rewards[2] = float("nan")
    pairs = PairedTrajectories(run, batch, rewards)
    number = batch.log_probs.shape[1]
    assert pairs.forwards == 8 * number
    assert (pairs.reference - batch.log_probs).abs().min() > 0
    for moved in (False, True):
        if moved:
            jolt(run, 0.01, seed=1)
            run.counters.updates += 1  # as an update counts
        for rows, size in ((range(8), 3), (range(8), 64), (range(3, 8), 7)):
            loss, expected = one_graph(run, batch, rows, size, pairs.reference, rewards)
            found, gradient = two_passes(run, pairs, rows, size)
            assert found["pair_loss"] == pytest.approx(float(loss), rel=1e-6)
            # batches of three are cut as the first pass is; others round log-probs of float32 networks differently
            tolerance = 1e-6 if size == 3 else 1e-5
            assert (gradient - expected).norm() < tolerance * expected.norm()
            assert (found["worst"] > 1e-4) if moved else (found["worst"] < 1e-6)
            assert (0 < found["clipped_steps"] < 1) if moved else (found["clipped_steps"] == 0)
    # the first pass was free until the weights moved
    assert pairs.forwards == (8 + 8 + 8 + 5) * number


def test_pairs_at_the_start_are_off_by_their_whole_target(begin):
    """The adapter is zero: all log-ratios are, and the loss is the mean square of reward differences over beta."""
    run = begin("flow", {"objective": {"pair_beta": 0.01}, "train": {"updates_per_iteration": 1}})
    rows: list[int] = []
    run.model.network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    batch = collected(run)
    rewards = score_values(run, _prompts(run, 0), batch, 8, quiet).values["brightness"][:, -1].view(2, 4)
    targets = (rewards[:, :, None] - rewards[:, None, :]) / 0.01
    expected = targets[targets > 0].view(2, -1)
    rows.clear()
    metrics = run_iteration(run, quiet)
    assert metrics["train/loss"] == pytest.approx(float(expected.square().mean()), rel=1e-4)
    assert metrics["train/pair_target"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert metrics["train/pair_error"] == pytest.approx(metrics["train/pair_target"], rel=1e-5)
    assert metrics["train/clip_fraction"] == 0
    # sampling 3 steps, the reference and the second pass on the 2 trained ones; a backward counts twice
    assert sum(rows) == 8 * (3 + 2 + 2)
    assert run.counters.nfe == 8 * (3 + 2 + 3 * 2)
