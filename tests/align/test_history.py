"""Rewards against the prompt's own past: golden numbers, what is kept and for how long, what is missing."""

import json
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.advantages import AdvantageConfig
from align.history import HistoryConfig, history_advantages, remember

DDPO = HistoryConfig(entries=16, min_count=16)
B2 = HistoryConfig(entries=0, iterations=8, min_count=1, ddof=1)


def judged(rewards, prompts, config, past=None, iteration=0, eps=1e-6, clip=5.0, valid=None):
    """Advantages, stats and the history after one iteration."""
    values = torch.tensor(rewards)
    ok = ~values.isnan() if valid is None else torch.tensor(valid)
    past = remember(past or {}, values, ok, prompts, iteration, config)
    return *history_advantages(values, ok, prompts, past, config, eps, clip), past


def test_a_prompt_with_enough_rewards_is_judged_by_its_own():
    advantages, stats, _ = judged([1.0, 2.0, 3.0, 10.0, 20.0], [0, 0, 0, 1, 1], HistoryConfig(min_count=3))
    assert advantages[:3].tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449], abs=2e-6)
    assert stats["history_fraction"] == pytest.approx(3 / 5)
    # prompt 1 has too few: mean and population std of all five
    everything = np.array([1, 2, 3, 10, 20])
    expected = (np.array([10, 20]) - everything.mean()) / everything.std()
    assert advantages[3:].tolist() == pytest.approx(expected.tolist(), abs=2e-6)


def test_with_too_few_rewards_the_iteration_is_what_counts():
    advantages, stats, _ = judged([1.0, 2.0, 3.0, 10.0, 20.0], [0, 0, 0, 1, 1], HistoryConfig(min_count=4))
    everything = np.array([1, 2, 3, 10, 20])
    assert advantages.tolist() == pytest.approx(((everything - 7.2) / everything.std()).tolist(), abs=2e-6)
    assert stats["history_fraction"] == 0


def test_the_rewards_of_the_iteration_belong_to_the_history_that_judges_them():
    config = HistoryConfig(min_count=1)
    _, _, past = judged([0.0, 2.0], [7, 7], config)
    advantages, _, past = judged([4.0], [7], config, past, iteration=1)
    assert past == {7: [(0, 0.0), (0, 2.0), (1, 4.0)]}
    assert advantages.item() == pytest.approx((4 - 2) / np.std([0, 2, 4]), abs=1e-5)


def test_the_newest_entries_push_the_oldest_out():
    config, past = HistoryConfig(entries=3, min_count=3), {}
    for iteration, pair in enumerate(([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])):
        advantages, _, past = judged(pair, [0, 0], config, past, iteration)
    assert past == {0: [(1, 4.0), (2, 5.0), (2, 6.0)]}
    assert advantages.tolist() == pytest.approx([0.0, 1.2247449], abs=2e-6)


def test_past_iterations_are_forgotten_in_time_also_where_a_prompt_did_not_come_up():
    config, past = HistoryConfig(entries=0, iterations=2, min_count=1), {}
    prompts = [[0], [1], [0], [0], [1]]
    kept = []
    for iteration, (prompt,) in enumerate(prompts):
        _, _, past = judged([float(iteration)], [prompt], config, past, iteration)
        kept.append({p: [i for i, _ in entries] for p, entries in past.items()})
    assert kept == [{0: [0]}, {0: [0], 1: [1]}, {0: [0, 2], 1: [1]}, {0: [2, 3], 1: [1]}, {0: [2, 3], 1: [4]}]


@pytest.mark.parametrize(("ddof", "expected"), [(0, 1.2247449), (1, 1.0)])
def test_population_and_unbiased_std(ddof, expected):
    advantages, _, _ = judged([1.0, 2.0, 3.0], [0] * 3, HistoryConfig(min_count=1, ddof=ddof))
    assert advantages.tolist() == pytest.approx([-expected, 0.0, expected], abs=2e-6)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("min_count", [1, 2])
def test_a_single_reward_has_advantage_0(ddof, min_count):
    """Its unbiased std would be NaN, as its own history and as a whole iteration."""
    advantages, stats, _ = judged([3.0], [0], HistoryConfig(min_count=min_count, ddof=ddof))
    assert advantages.tolist() == [0.0]
    assert stats["zero_spread_fraction"] == 1


def test_equal_rewards_have_advantage_exactly_0():
    # the mean of three times float32's .1 is not that number
    advantages, stats, _ = judged([0.1, 0.1, 0.1, 0.5, 0.7], [0, 0, 0, 1, 1], HistoryConfig(min_count=1), eps=1e-20)
    assert advantages[:3].tolist() == [0.0] * 3
    assert advantages[3:].tolist() == pytest.approx([-1.0, 1.0])
    assert stats["zero_spread_fraction"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("min_count", [1, 4])
def test_a_missing_reward_is_judged_0_and_remembered_nowhere(min_count):
    config = HistoryConfig(min_count=min_count, ddof=1)
    prompts = [0, 0, 0, 1, 1]
    whole, _, _ = judged([1.0, 3.0, 5.0, 7.0], [0, 0, 1, 1], config)
    rewards = [1.0, float("nan"), 3.0, 5.0, 7.0]
    advantages, stats, past = judged(rewards, prompts, config)
    assert advantages[1] == 0
    assert torch.equal(advantages[[0, 2, 3, 4]], whole)
    assert past == {0: [(0, 1.0), (0, 3.0)], 1: [(0, 5.0), (0, 7.0)]}
    assert stats["history_fraction"] == (min_count == 1)
    marked, _, _ = judged([1.0, 99.0, 3.0, 5.0, 7.0], prompts, config, valid=[True, False, True, True, True])
    assert torch.equal(marked, advantages)


def test_a_prompt_without_any_score_changes_nothing():
    advantages, stats, past = judged([float("nan"), 1.0, 2.0], [5, 0, 0], HistoryConfig(min_count=1))
    assert advantages.tolist() == pytest.approx([0.0, -1.0, 1.0], abs=1e-5)
    assert 5 not in past
    assert stats == {"history_fraction": 1.0, "zero_spread_fraction": 0.0}


def test_advantages_are_clamped():
    advantages, _, _ = judged([0.0] * 99 + [1.0], [0] * 100, HistoryConfig(entries=100, min_count=1), clip=5.0)
    assert advantages[-1] == 5.0  # 9.9 before


def test_remember_leaves_the_past_alone_and_survives_json():
    past = {3: [(0, 0.1)]}
    rewards = torch.rand(6, generator=torch.Generator().manual_seed(0))
    updated = remember(past, rewards, torch.ones(6, dtype=torch.bool), [3, 4, 3, 4, 3, 4], 1, DDPO)
    assert past == {3: [(0, 0.1)]}
    read = {int(p): [(i, r) for i, r in rows] for p, rows in json.loads(json.dumps(updated)).items()}
    assert read == updated
    assert torch.equal(torch.tensor([r for _, r in updated[4]]), rewards[[1, 3, 5]])  # float32, bit for bit


def test_many_iterations_agree_with_a_queue_per_prompt():
    """DDPO's statistics written out again: a queue of 5 per prompt, of use from 4 rewards on, else the iteration."""
    config, past = HistoryConfig(entries=5, min_count=4), {}
    queues = defaultdict(lambda: deque(maxlen=5))
    draw = np.random.default_rng(0)
    used = []
    for iteration in range(12):
        prompts = draw.integers(0, 6, size=7).tolist()
        rewards = draw.normal(size=7).astype(np.float32)
        advantages, _, past = judged(rewards.tolist(), prompts, config, past, iteration)
        for prompt, reward in zip(prompts, rewards, strict=True):
            queues[prompt].append(reward)
        for prompt, reward, got in zip(prompts, rewards, advantages.tolist(), strict=True):
            used.append(len(queues[prompt]) >= 4)
            compared = np.array(queues[prompt] if used[-1] else rewards, dtype=np.float64)
            assert got == pytest.approx((reward - compared.mean()) / (compared.std() + 1e-6), abs=1e-6)
    assert 0.1 < np.mean(used) < 0.9


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    slope=st.floats(0.25, 40.0),
    offset=st.floats(-3.0, 3.0),
    config=st.sampled_from([DDPO, B2]),
)
def test_advantages_do_not_change_under_a_rising_affine_map_of_all_rewards(seed, slope, offset, config):
    draw = np.random.default_rng(seed)
    histories, found = [{}, {}], [[], []]
    for iteration in range(3):
        prompts, rewards = draw.integers(0, 3, size=8).tolist(), draw.normal(size=8)
        for k, mapped in enumerate((rewards, slope * rewards + offset)):
            advantages, _, histories[k] = judged(mapped.tolist(), prompts, config, histories[k], iteration, eps=1e-12)
            found[k].append(advantages)
    # rewards are float32: near 50, one part in 10^7 of the spread, and spreads of a few rewards may be far below 1
    torch.testing.assert_close(torch.cat(found[0]), torch.cat(found[1]), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": -1}, "entries must be at least 0, got -1"),
        ({"iterations": -1}, "iterations must be at least 0, got -1"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"entries": 8}, "min_count 16 is never reached with 8 entries"),
        ({"ddof": 2}, "ddof must be 0 (population) or 1 (unbiased), got 2"),
        ({"entries": 0}, "an endless history would never follow the policy"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    (error,) = HistoryConfig(**changes).validate()
    assert message in error
    (error,) = AdvantageConfig(baseline="history", history=HistoryConfig(**changes)).validate()
    assert error.startswith("history.")


def test_the_settings_of_both_papers_are_valid():
    assert DDPO.validate() == B2.validate() == []
