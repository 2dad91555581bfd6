import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.advantages import AdvantageConfig, group_advantages

# float32 output of values up to a few units: half an ulp of 5 is 2.4e-7.
TOL = 1e-6


def advantages(rewards, groups, valid=None, **options):
    rewards = torch.as_tensor(rewards)
    valid = torch.ones(rewards.shape[0], dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return group_advantages(rewards, valid, torch.as_tensor(groups), AdvantageConfig(**options))


@st.composite
def batches(draw):
    """Rewards (N, S) of 2-4 groups of 2-6 samples in random order, no group without spread."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(2, 7, size=rng.integers(2, 5))
    groups = rng.permutation(np.repeat(rng.choice(1000, len(sizes), replace=False), sizes))
    rewards = rng.normal(size=(len(groups), rng.integers(1, 4))) + rng.normal(size=(1000, 1))[groups]
    for group in np.unique(groups):
        rewards[np.flatnonzero(groups == group)[0]] += 3.0
    return torch.from_numpy(rewards), torch.from_numpy(groups)


scopes = st.sampled_from(["group", "global"])
quick = settings(max_examples=40, deadline=None)


def test_a_worked_example():
    # Groups (0, 1, 2) and (10, 14): means 1 and 12, population stds sqrt(2/3) and 2; the mean of all five is 5.4.
    rewards = [0.0, 10.0, 1.0, 14.0, 2.0]
    groups = [7, 3, 7, 3, 7]
    by_group, _ = advantages(rewards, groups, std="group", eps=1e-4)
    a, b = 1 / (math.sqrt(2 / 3) + 1e-4), 2 / (2 + 1e-4)
    assert by_group.tolist() == pytest.approx([-a, -b, 0, b, a], abs=TOL)
    by_all, stats = advantages(rewards, groups, std="global", eps=1e-4)
    std = float(np.std(rewards))
    assert by_all.tolist() == pytest.approx([x / (std + 1e-4) for x in (-1, -2, 0, 2, 1)], abs=TOL)
    assert by_all.dtype == torch.float32
    assert stats["reward_mean"] == pytest.approx(5.4)
    assert stats["reward_std"] == pytest.approx(std)
    assert stats["group_std"] == pytest.approx((math.sqrt(2 / 3) + 2) / 2)
    assert advantages(rewards, groups, min_valid=3)[1]["group_std"] == pytest.approx(math.sqrt(2 / 3))
    assert stats["valid_fraction"] == 1
    assert stats["zero_spread_fraction"] == 0
    assert stats["short_group_fraction"] == 0


@quick
@given(batches(), scopes)
def test_a_constant_per_group_and_step_changes_nothing(batch, scope):
    # The mean is always per group; a global std sees the differences between groups, so there one constant for all.
    rewards, groups = batch
    before, _ = advantages(rewards, groups, std=scope, clip=100.0)
    step = torch.arange(rewards.shape[1])
    shift = (groups.unsqueeze(1) % 7) * 3.0 - step if scope == "group" else 11.0 - 2.0 * step
    after, _ = advantages(rewards + shift, groups, std=scope, clip=100.0)
    assert torch.allclose(before, after, rtol=0, atol=TOL)


@quick
@given(batches(), scopes, st.randoms(use_true_random=False))
def test_permuting_and_relabelling_permutes(batch, scope, random):
    rewards, groups = batch
    before, stats = advantages(rewards, groups, std=scope)
    order = list(range(len(groups)))
    random.shuffle(order)
    after, stats_after = advantages(rewards[order], 5000 - groups[order], std=scope)
    assert torch.allclose(before[order], after, rtol=0, atol=TOL)
    assert stats == pytest.approx(stats_after)


@quick
@given(batches(), scopes, st.floats(0.01, 100.0))
def test_scaling_the_rewards_acts_through_eps_only(batch, scope, scale):
    rewards, groups = batch
    scaled, _ = advantages(rewards * scale, groups, std=scope, eps=1e-4, clip=100.0)
    rescaled, _ = advantages(rewards, groups, std=scope, eps=1e-4 / scale, clip=100.0)
    assert torch.allclose(scaled, rescaled, rtol=1e-6, atol=TOL)


@quick
@given(batches())
def test_group_mean_is_zero_and_std_is_std_over_std_plus_eps(batch):
    rewards, groups = batch
    result, _ = advantages(rewards, groups, std="group", eps=0.05, clip=100.0)
    for group in groups.unique():
        inside, raw = result[groups == group].double(), rewards[groups == group]
        std = raw.std(0, unbiased=False)
        assert torch.allclose(inside.mean(0), torch.zeros_like(std), atol=TOL)
        assert torch.allclose(inside.std(0, unbiased=False), std / (std + 0.05), rtol=0, atol=TOL)


@quick
@given(batches(), scopes)
def test_steps_are_normalised_one_by_one(batch, scope):
    rewards, groups = batch
    together, _ = advantages(rewards, groups, std=scope)
    for k in range(rewards.shape[1]):
        alone, _ = advantages(rewards[:, k], groups, std=scope)
        assert torch.equal(together[:, k], alone)


@quick
@given(batches(), scopes, st.sampled_from([float("nan"), float("inf"), 1e30, -3.0]))
def test_invalid_samples_get_zero_and_leave_the_others_as_if_absent(batch, scope, junk):
    rewards, groups = batch
    missing = torch.zeros(len(groups), dtype=torch.bool)
    missing[: len(groups) // 3] = True
    polluted = rewards.clone()
    polluted[missing] = junk
    result, _ = advantages(polluted, groups, valid=~missing, std=scope)
    without, _ = advantages(rewards[~missing], groups[~missing], std=scope)
    assert torch.equal(result[missing], torch.zeros_like(result[missing]))
    assert torch.allclose(result[~missing], without, rtol=0, atol=TOL)


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), -float("inf")])
def test_one_missing_step_of_a_sample_is_missing_at_that_step_only(missing):
    rewards = torch.tensor([[0.0, 1.0], [1.0, missing], [2.0, 3.0]])
    result, stats = advantages(rewards, [0, 0, 0], std="group")
    assert result[1, 1] == 0
    assert result[0, 1] == pytest.approx(-1, abs=2e-4)
    assert result[2, 0] > 1
    assert stats["valid_fraction"] == pytest.approx(5 / 6)
    assert stats["reward_mean"] == pytest.approx(7 / 5)


@pytest.mark.parametrize("scope", ["group", "global"])
def test_zero_spread_is_exactly_zero_and_stays_with_its_group_and_step(scope):
    # .1 three times does not average to .1 exactly in binary: the 0 has to be exact all the same.
    rewards = torch.tensor([[0.1, 0.1, 0.1, 0.3, 0.4, 0.8], [1, 2, 4, 5, 5, 5]], dtype=torch.float64).T
    result, stats = advantages(rewards, [0, 0, 0, 1, 1, 1], std=scope, eps=1e-12)
    assert torch.equal(result[:3, 0], torch.zeros(3))
    assert torch.equal(result[3:, 1], torch.zeros(3))
    assert (result[:3, 1].abs() > 0).all()
    assert (result[3:, 0].abs() > 0).all()
    assert stats["zero_spread_fraction"] == 0.5


@pytest.mark.parametrize("scope", ["group", "global"])
def test_all_rewards_equal_gives_zero_everywhere(scope):
    result, stats = advantages(torch.full((6,), 0.7), [0, 0, 0, 1, 1, 1], std=scope)
    assert torch.equal(result, torch.zeros(6))
    assert stats["zero_spread_fraction"] == 1
    assert stats["reward_std"] < 1e-12


def test_groups_with_too_few_scores_get_zero():
    rewards = [0.0, 1.0, 2.0, 5.0, float("nan"), float("nan")]
    groups = [0, 0, 0, 1, 1, 2]
    result, stats = advantages(rewards, groups, std="global")
    # The lone valid 5 has nobody to be compared with, but the spread of all valid rewards includes it.
    std = float(np.std([0.0, 1.0, 2.0, 5.0]))
    assert result.tolist() == pytest.approx([-1 / (std + 1e-4), 0, 1 / (std + 1e-4), 0, 0, 0], abs=TOL)
    assert stats["short_group_fraction"] == pytest.approx(2 / 3)
    assert stats["zero_spread_fraction"] == 0
    strict, _ = advantages(rewards, groups, std="global", min_valid=4)
    assert torch.equal(strict, torch.zeros(6))


@pytest.mark.parametrize("scope", ["group", "global"])
def test_std_floor_bounds_the_amplification(scope):
    rewards, groups = torch.tensor([0.0, 0.02, 0.5, 0.52]), [0, 0, 1, 1]
    floored, _ = advantages(rewards, groups, std=scope, std_floor=2.0, eps=1e-4)
    assert floored.tolist() == pytest.approx([-0.01 / 2.0001, 0.01 / 2.0001] * 2, abs=TOL)
    low, _ = advantages(rewards, groups, std=scope, std_floor=1e-3)
    none, _ = advantages(rewards, groups, std=scope)
    assert torch.equal(low, none)


def test_clip_bounds_and_is_reported():
    rewards = torch.zeros(101)
    rewards[0] = 1.0  # 100 equal ones and an outlier: (1 - 1/101) / std is 10 stds
    result, stats = advantages(rewards, torch.zeros(101, dtype=torch.long), std="group", clip=5.0)
    assert result[0] == 5
    assert stats["clipped_fraction"] == pytest.approx(1 / 101)


def test_a_large_offset_costs_no_precision():
    base = torch.tensor([0.0, 1e-3, 3e-3, 7e-3], dtype=torch.float64)
    plain, _ = advantages(base, [0, 0, 0, 0], std="group")
    # 1e6 + 1e-3 keeps 1e-10 of absolute precision in float64, 1e-7 of the spread.
    shifted, _ = advantages(base + 1e6, [0, 0, 0, 0], std="group")
    assert torch.allclose(plain, shifted, rtol=0, atol=1e-5)


def test_an_empty_iteration_is_no_error():
    result, stats = advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), valid=torch.zeros(0, dtype=torch.bool))
    assert result.shape == (0,)
    assert all(math.isfinite(value) for value in stats.values())


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="advantages: need rewards"):
        advantages(torch.zeros(3), [0, 0])


def test_config_reports_every_error_at_once():
    assert AdvantageConfig().validate() == []
    bad = AdvantageConfig(std="batch", eps=0.0, clip=-1.0, std_floor=float("nan"), min_valid=1)  # type: ignore[arg-type]
    assert [line.split()[0] for line in bad.validate()] == ["std", "eps", "clip", "std_floor", "min_valid"]
