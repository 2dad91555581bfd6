"""Ensembles, disagreement of ranks and weights as pure functions: worked examples and invariants."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.uncertainty import (
    aggregate,
    most_suspicious,
    next_fraction,
    normalised,
    quantiles,
    rank_disagreement,
    reference_statistics,
    spread,
    step_trust,
    trust,
    win_rates,
)

NAN = float("nan")
FIVE = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
GROUP = torch.zeros(4, dtype=torch.long)
MAIN = torch.tensor([0.9, 0.1, 0.5, 0.7])
AUXILIARIES = [torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([0.2, 0.8, 0.4, 0.6])]


@pytest.mark.parametrize(
    ("objective", "coefficient", "variance", "expected"),
    [
        ("mean", 0.5, "population", 3.0),
        ("wco", 0.5, "population", 1.0),
        # squares about 3: 4 1 0 1 4, so the variance is 10/5 = 2, or 10/4 = 2.5
        ("uwo", 0.5, "population", 2.0),
        ("uwo", 0.1, "population", 2.8),
        ("uwo", 0.5, "unbiased", 1.75),
        ("uwo", 0.1, "unbiased", 2.75),
    ],
)
def test_five_members(objective, coefficient, variance, expected):
    found = aggregate(FIVE, objective, coefficient, variance)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    shifted = aggregate(FIVE + 7, objective, coefficient, variance)
    assert shifted.item() == pytest.approx(expected + 7, abs=1e-6)


def test_the_variance_has_the_unit_of_the_score_squared():
    assert aggregate(10 * FIVE, "uwo", 0.5, "population").item() == pytest.approx(30 - 0.5 * 200)


@pytest.mark.parametrize("variance", ["population", "unbiased"])
def test_one_member_is_its_own_ensemble_and_no_coefficient_is_the_mean(variance):
    one, several = torch.randn(1, 6), torch.randn(4, 6)
    for objective in ("mean", "wco", "uwo"):
        assert torch.equal(aggregate(one, objective, 3.0, variance), one[0])
    assert torch.equal(aggregate(several, "uwo", 0.0, variance), several.mean(0))


def test_members_have_no_order_and_pessimism_never_exceeds_the_mean():
    scores = torch.randn(5, 40)
    for objective in ("mean", "wco", "uwo"):
        found = aggregate(scores, objective, 0.5, "population")
        torch.testing.assert_close(aggregate(scores.flip(0), objective, 0.5, "population"), found)
        assert (found <= scores.mean(0) + 1e-6).all()
    # uwo may fall below the worst member: mean 5, variance 25
    assert aggregate(torch.tensor([[0.0], [10.0]]), "uwo", 0.5, "population").item() == -7.5


def test_members_that_agree_have_no_spread_and_a_finite_gradient():
    scores = torch.tensor([[1.0, 1.0], [1.0, 3.0]], requires_grad=True)
    found = spread(scores)
    assert found.tolist() == [0.0, 1.0]
    found.sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, -0.5], [0.0, 0.5]]))


def test_statistics_leave_out_what_is_missing():
    found = reference_statistics({"a": torch.tensor([1.0, NAN, 3.0]), "b": torch.tensor([NAN])})
    assert found == {"a": {"mean": 2.0, "std": 1.0}}


def test_the_sample_that_the_main_reward_overrates_is_the_suspicious_one():
    found = rank_disagreement(MAIN, AUXILIARIES, GROUP)
    # wins of 3: main 3 0 1 2, both auxiliaries 0 3 1 2
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64))
    assert most_suspicious(found, 0.25).tolist() == [True, False, False, False]
    # with rank 1 for the best, main less the others' mean is (1 4 3 2) - (4 1 3 2): it would gate sample 1
    assert found[0] > found[1]


def test_ties_count_half_and_a_missing_score_is_nobodys_other():
    assert win_rates(torch.ones(4), GROUP).tolist() == [0.5] * 4
    found = win_rates(torch.tensor([3.0, NAN, 1.0, 1.0]), GROUP)
    torch.testing.assert_close(found, torch.tensor([1.0, NAN, 0.25, 0.25], dtype=torch.float64), equal_nan=True)
    # an auxiliary with no score of a sample leaves it to the others, and a sample that none judges is unknown
    silent = [torch.full((4,), NAN), AUXILIARIES[0]]
    torch.testing.assert_close(rank_disagreement(MAIN, silent, GROUP), rank_disagreement(MAIN, silent[1:], GROUP))
    assert rank_disagreement(MAIN, silent[:1], GROUP).isnan().all()


def test_groups_are_ranked_apart():
    main, other = torch.cat([MAIN, MAIN + 100]), torch.cat([AUXILIARIES[0], AUXILIARIES[0] - 100])
    groups = torch.arange(8) // 4
    found = rank_disagreement(main, [other], groups)
    assert found.tolist() == [1.0, -1.0, 0.0, 0.0] * 2


def test_a_usual_image_has_no_uncertainty_and_one_in_ten_has_one():
    reference = torch.arange(101, dtype=torch.float64)
    low, high = quantiles(reference) or (0.0, 0.0)
    assert (low, high) == (50.0, 90.0)
    values = torch.tensor([0.0, 50.0, 70.0, 90.0, 1000.0, NAN], dtype=torch.float64)
    assert normalised(values, low, high, 5.0).tolist() == [0.0, 0.0, 0.5, 1.0, 5.0, 0.0]
    assert quantiles(torch.tensor([NAN])) is None


def test_weights_halve_with_each_ln_2():
    doubt = torch.tensor([0.0, math.log(2), math.log(4)], dtype=torch.float64)
    weights = trust(doubt, 1.0, 0.1)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    assert trust(doubt, 0.0, 0.1).tolist() == [1.0, 1.0, 1.0]
    assert trust(doubt, 1e6, 0.1).tolist() == [1.0, 0.1, 0.1]


def test_weights_by_step_are_one_on_average_in_every_sample():
    doubt = torch.tensor([[0.0, math.log(2), math.log(4)], [3.0, 3.0, 3.0]], dtype=torch.float64)
    found = step_trust(doubt, 1.0)
    torch.testing.assert_close(found[0], torch.tensor([12 / 7, 6 / 7, 3 / 7], dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.ones(3, dtype=torch.float64))
    assert torch.equal(step_trust(doubt, 0.0), torch.ones(2, 3, dtype=torch.float64))


def test_the_gate_takes_the_share_it_is_given_and_nobody_who_is_not_suspected():
    doubt = torch.tensor([0.3, 0.0, -1.0, 0.3, NAN, 0.9, 0.1, 0.0, 0.0, 0.0])
    assert most_suspicious(doubt, 0.2).nonzero().flatten().tolist() == [0, 5]
    assert most_suspicious(doubt, 0.01).nonzero().flatten().tolist() == [5]
    assert most_suspicious(doubt, 0.9).nonzero().flatten().tolist() == [0, 3, 5, 6]


def test_the_share_follows_the_uncertainty_within_its_bounds():
    assert next_fraction(0.1, 0.5, []) == 0.1
    assert next_fraction(0.1, 0.5, [0.3, 0.4]) == pytest.approx(0.11)
    assert next_fraction(0.1, 0.2, [0.3, 0.4]) == pytest.approx(0.09)
    assert next_fraction(0.1, 0.35, [0.3, 0.4]) == 0.1
    assert next_fraction(0.19, 0.5, [0.3]) == 0.2
    assert next_fraction(0.021, 0.1, [0.3]) == 0.02
