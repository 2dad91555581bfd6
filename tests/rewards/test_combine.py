"""The weighted sum of rewards."""

from __future__ import annotations

import pytest
import torch

from rewards import RewardError, combine

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
