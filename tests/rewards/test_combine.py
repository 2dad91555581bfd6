"""The weighted sum of rewards, their ranks, gates between them, and their shape."""

from __future__ import annotations

import pytest
import torch

from rewards import RewardError, combine
from rewards.combine import gated, preference, ranks

NAN = float("nan")


def masks(scores):
    return {name: ~torch.isnan(value) for name, value in scores.items()}


def test_the_total_is_the_weighted_sum_and_misses_where_a_part_misses():
    scores = {"a": torch.tensor([1.0, 2.0, NAN]), "b": torch.tensor([10.0, NAN, 30.0])}
    total, valid = combine(scores, masks(scores), {"a": 2.0, "b": -0.5})
    assert valid.tolist() == [True, False, False]
    assert total[0].item() == pytest.approx(2 * 1 - 0.5 * 10)
    assert torch.isnan(total[1:]).all()


def test_a_reward_of_weight_zero_is_watched_not_optimised():
    scores = {"a": torch.tensor([1.0, 2.0]), "watched": torch.tensor([NAN, 5.0])}
    total, valid = combine(scores, masks(scores), {"a": 1.0, "watched": 0.0})
    assert total.tolist() == [1.0, 2.0]
    assert valid.all()


def test_scores_that_differ_by_a_hundredth_stay_apart():
    # In bfloat16 the spacing at 22 is 0.125, so the difference would be lost.
    scores = {"pick": torch.tensor([22.0, 22.01])}
    total, _ = combine(scores, masks(scores), {"pick": 1.0})
    assert total.dtype is torch.float32
    assert (total[1] - total[0]).item() == pytest.approx(0.01, abs=1e-5)


def test_the_gradient_of_the_total_is_the_weight_and_skips_missing_samples():
    score = torch.tensor([1.0, 2.0], requires_grad=True)
    total, valid = combine({"a": score}, {"a": torch.tensor([True, False])}, {"a": 3.0})
    total[valid].sum().backward()
    assert score.grad.tolist() == [3.0, 0.0]


def test_no_weight_or_no_scores_of_a_weighted_reward_is_an_error():
    scores = {"clip": torch.ones(2)}
    with pytest.raises(RewardError, match="no reward has a weight other than 0"):
        combine(scores, masks(scores), {"clip": 0.0})
    with pytest.raises(RewardError, match="no reward has a weight other than 0"):
        combine({}, {}, {})
    with pytest.raises(RewardError, match="'clpi'; did you mean 'clip'"):
        combine(scores, masks(scores), {"clpi": 1.0})


def column(*values):
    return torch.tensor(values).unsqueeze(1)


def test_ranks_lie_evenly_in_minus_one_to_one_and_ties_share_theirs():
    group = torch.zeros(4, dtype=torch.long)
    assert ranks(column(0.1, 0.5, 0.5, 0.9), group).flatten().tolist() == [-1, 0, 0, 1]
    assert ranks(column(7.0, 7.0, 7.0, 7.0), group).flatten().tolist() == [0, 0, 0, 0]


def test_ranks_keep_under_any_increasing_transform_and_know_their_group_only():
    scores = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(12) % 3
    found = ranks(scores, groups)
    assert torch.equal(found, ranks((5 * scores).exp() - 40, groups))
    assert torch.equal(found[groups == 1], ranks(scores[groups == 1], groups[groups == 1]))


def test_a_missing_score_leaves_the_ranks_of_a_smaller_group():
    found = ranks(column(3.0, NAN, 1.0, 2.0, NAN, 9.0), torch.tensor([0, 0, 0, 0, 1, 1])).flatten()
    assert found.tolist() == [1, 0, -1, 0, 0, 0]
    assert not ranks(column(3.0, NAN, 1.0), torch.zeros(3), min_valid=3).any()


def test_a_gate_is_closed_at_its_threshold_and_open_above_and_where_its_reward_is_missing():
    # 0.3 in float32 is above 0.3 in float64: the comparison must not see that.
    scores = {"gate": torch.tensor([0.3, 0.31, NAN, 0.1])}
    parts = {"gate": column(-0.5, 0.5, 0.0, -0.9), "dense": column(1.0, 1.0, 1.0, -2.0)}
    found = gated(parts, scores, {"gate": 0.3}, torch.zeros(4, dtype=torch.long))
    assert torch.equal(found["gate"], parts["gate"])
    assert found["dense"].flatten().tolist() == [0, 1, 1, -2]


def test_behind_a_gate_that_a_whole_group_fails_nothing_is_left():
    scores = {"gate": torch.tensor([0.0, 0.2, 0.0, 0.9])}
    dense = column(1.0, -1.0, 1.0, -1.0)
    groups = torch.tensor([4, 4, 7, 7])
    found = gated({"dense": dense}, scores, {"gate": 0.5}, groups)["dense"]
    assert found.flatten().tolist() == [0, 0, 0, -1]


def test_dense_rewards_count_only_above_the_threshold_of_the_outcome():
    outcome = torch.tensor([0.0, 0.5, 1.0])
    parts = {"outcome": outcome.unsqueeze(1), "a": torch.full((3, 1), 0.4), "b": torch.full((3, 1), 0.7)}
    found = gated(parts, {"outcome": outcome}, {"outcome": 0.5}, torch.zeros(3, dtype=torch.long))
    assert sum(found.values()).flatten().tolist() == pytest.approx([0.0, 0.5, 2.1])


def test_gates_are_a_ladder_in_the_order_given():
    scores = {"first": torch.tensor([0.0, 1.0, 1.0]), "second": torch.tensor([1.0, 0.0, 1.0])}
    parts = {name: torch.ones(3, 1) for name in ("dense", "second", "first")}
    found = gated(parts, scores, {"first": 0.5, "second": 0.5}, torch.zeros(3, dtype=torch.long))
    assert found["first"].flatten().tolist() == [1, 1, 1]
    assert found["second"].flatten().tolist() == [0, 1, 1]
    assert found["dense"].flatten().tolist() == [0, 0, 1]


def test_preference_is_the_mean_sigmoid_of_the_distances_to_the_references():
    scores = column(1.0)
    one = preference(scores, torch.tensor([[0.0]]).double(), 1.0)
    assert one.item() == pytest.approx(0.7310586, abs=1e-6)
    assert preference(scores, torch.tensor([[0.0, 2.0]]).double(), 1.0).item() == 0.5
    assert preference(scores, torch.tensor([[0.0, NAN]]).double(), 1.0).item() == one.item()
    # small units need a slope in these units: 0.02 apart is nothing at slope 1, and one std at 1 / 0.02
    near = torch.tensor([[0.98]]).double()
    assert preference(scores, near, 1.0).item() == pytest.approx(0.505, abs=1e-4)
    assert preference(scores, near, 1 / 0.02).item() == pytest.approx(0.7310586, abs=1e-5)


def test_preference_knows_differences_only_is_bounded_and_steepest_at_the_reference():
    scores = torch.tensor([[-500.0, 0.0, 1.0, 500.0]])
    references = torch.tensor([[0.25, 0.5]]).double()
    found = preference(scores, references, 2.0)
    torch.testing.assert_close(found, preference(scores + 8, references + 8, 2.0))
    assert ((found >= 0) & (found <= 1)).all()
    at = torch.tensor([[3.0]], requires_grad=True)
    preference(at, torch.tensor([[3.0]]).double(), 6.0).sum().backward()
    assert at.grad.item() == pytest.approx(6 / 4)


def test_preference_misses_where_the_score_or_all_references_miss():
    found = preference(column(NAN, 1.0), torch.tensor([[0.0], [NAN]]).double(), 1.0)
    assert found.isnan().all()
