import pytest
import torch

from align.advantages import AdvantageConfig, group_advantages
from align.credit_stats import value_stats, zero_spread

NAN = float("nan")


def random_values(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_worked_example():
    # Group 4: values before step 3 rank (1, 2, 3) against the final (1, 3, 2): 1 - 6 * 2 / (3 * 8) = 0.5.
    # Group 2: ranks (1, 2) against (2, 1): -1. The value before step 5 equals the final reward in group 4, and has no
    # spread in group 2.
    values = torch.tensor([[0.0, 1.0, 1.0], [1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [5.0, 6.0, 7.0], [8.0, 6.0, 4.0]])
    stats = value_stats(values, [3, 5], torch.tensor([4, 4, 4, 2, 2]))
    assert stats == pytest.approx(
        {
            "values/step_03": 3.2,
            "values/rank_corr_03": (0.5 - 1.0) / 2,
            "gain/up_03": 3 / 5,
            "gain/down_03": 1 / 5,
            "values/step_05": 3.6,
            "values/rank_corr_05": 1.0,
            "gain/up_05": 1 / 5,
            "gain/down_05": 1 / 5,
        }
    )


def test_names_carry_the_absolute_step():
    stats = value_stats(random_values(4, 3), [9, 10], torch.zeros(4, dtype=torch.long))
    names = ("values/step", "values/rank_corr", "gain/up", "gain/down")
    assert set(stats) == {f"{name}_{step}" for name in names for step in ("09", "10")}
    assert set(zero_spread(random_values(4, 1), [7], torch.zeros(4, dtype=torch.long))) == {"gain/zero_spread_07"}


def test_tied_values_share_their_mean_rank():
    # Ranks (1, 2.5, 2.5, 4) against (1, 2, 3, 4): covariance 4.5, sums of squares 4.5 and 5.
    values = torch.tensor([[0.0, 1.0], [1.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    stats = value_stats(values, [0], torch.zeros(4, dtype=torch.long))
    assert stats["values/rank_corr_00"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    # Equal values of different groups are no tie: the largest of the first group is the smallest of the second.
    values = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [2.0, 0.0], [3.0, 1.0], [4.0, 2.0]])
    stats = value_stats(values, [0], torch.tensor([0, 0, 0, 1, 1, 1]))
    assert stats["values/rank_corr_00"] == pytest.approx(1.0)


def test_rank_correlation_equals_a_count_of_pairs():
    # Without ties ranks are counts of smaller values; the classic formula is 1 - 6 sum d^2 / (n (n^2 - 1)).
    values = random_values(24, 5)
    group_ids = torch.arange(24) % 4
    stats = value_stats(values, [0, 1, 2, 3], group_ids)
    for column in range(4):
        expected = []
        for group in range(4):
            inside = values[group_ids == group]
            ranks = (inside[:, None, :] > inside[None, :, :]).double().sum(1)
            distance = (ranks[:, column] - ranks[:, -1]).square().sum()
            expected.append(1 - 6 * distance / (6 * (6**2 - 1)))
        assert stats[f"values/rank_corr_{column:02d}"] == pytest.approx(float(torch.stack(expected).mean()))


def test_rank_correlation_sees_only_the_order_within_groups():
    values, group_ids = random_values(12, 3).abs() + 0.1, torch.arange(12) // 4
    offset = torch.tensor([0.0, 50.0, -7.0], dtype=torch.float64)[group_ids].unsqueeze(1)
    before = value_stats(values, [0, 1], group_ids)
    after = value_stats(values.log() * 3 + offset, [0, 1], group_ids)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = value_stats(values[order], [0, 1], 100 - group_ids[order])
    for step in ("00", "01"):
        assert after[f"values/rank_corr_{step}"] == pytest.approx(before[f"values/rank_corr_{step}"])
        assert moved[f"values/rank_corr_{step}"] == pytest.approx(before[f"values/rank_corr_{step}"])
    same = value_stats(torch.stack([values[:, 0], values[:, 0]], dim=1), [0], group_ids)
    assert same["values/rank_corr_00"] == pytest.approx(1.0)


def test_missing_scores_enter_nothing():
    values = random_values(8, 4)
    group_ids = torch.arange(8) // 4
    # A sample with no score at all is as good as absent.
    padded = torch.cat([values, torch.full((2, 4), NAN, dtype=torch.float64)])
    assert value_stats(padded, [0, 1, 2], torch.cat([group_ids, torch.tensor([0, 9])])) == pytest.approx(
        value_stats(values, [0, 1, 2], group_ids)
    )
    # One value leaves its own column and the two gains it is part of.
    broken = values.clone()
    broken[0, 1] = NAN
    whole, part = value_stats(values, [0, 1, 2], group_ids), value_stats(broken, [0, 1, 2], group_ids)
    assert part["values/step_01"] == pytest.approx(float(values[1:, 1].mean()))
    assert part["gain/up_00"] == pytest.approx(float((values[1:, 1] > values[1:, 0]).double().mean()))
    assert part["gain/down_01"] == pytest.approx(float((values[1:, 2] < values[1:, 1]).double().mean()))
    assert part["values/rank_corr_01"] == pytest.approx(
        value_stats(values[1:], [0, 1, 2], group_ids[1:])["values/rank_corr_01"]
    )
    for name in ("values/step_00", "values/rank_corr_00", "values/step_02", "gain/up_02", "values/rank_corr_02"):
        assert part[name] == whole[name]
    # Without its final score a sample ranks nowhere, but its values and its other gains stay.
    broken = values.clone()
    broken[0, -1] = NAN
    part = value_stats(broken, [0, 1, 2], group_ids)
    rest = value_stats(values[1:], [0, 1, 2], group_ids[1:])
    for step in ("00", "01", "02"):
        assert part[f"values/rank_corr_{step}"] == pytest.approx(rest[f"values/rank_corr_{step}"])
        assert part[f"values/step_{step}"] == whole[f"values/step_{step}"]
    assert part["gain/up_01"] == whole["gain/up_01"]
    assert part["gain/up_02"] == rest["gain/up_02"]


def test_a_number_of_nothing_is_left_out():
    values = torch.tensor([[NAN, 1.0, 2.0], [NAN, 1.0, 3.0]])
    stats = value_stats(values, [0, 1], torch.tensor([0, 0]))
    # The value before step 1 has no spread, so it ranks nothing.
    assert stats == {"values/step_01": 1.0, "gain/up_01": 1.0, "gain/down_01": 0.0}
    assert value_stats(torch.zeros(0, 2), [0], torch.zeros(0, dtype=torch.long)) == {}
    assert zero_spread(torch.zeros(0, 2), [0, 1], torch.zeros(0, dtype=torch.long)) == {}


def test_zero_spread_counts_groups_with_two_rewards_or_more():
    # At step 2 group 0 is level and group 1 is not; at step 3 group 0 has one reward left and group 1 is level.
    rewards = torch.tensor([[0.1, NAN], [0.1, 2.0], [0.3, 5.0], [0.4, 5.0], [9.0, 9.0]])
    stats = zero_spread(rewards, [2, 3], torch.tensor([0, 0, 1, 1, 2]))
    assert stats == {"gain/zero_spread_02": 0.5, "gain/zero_spread_03": 1.0}
    assert zero_spread(rewards[4:], [2, 3], torch.tensor([2])) == {}


def test_zero_spread_averages_to_what_the_advantages_report():
    rewards = random_values(48, 6).round()
    group_ids = torch.arange(48) // 2
    mine = zero_spread(rewards, range(6), group_ids)
    _, stats = group_advantages(rewards, torch.ones(48, dtype=torch.bool), group_ids, AdvantageConfig())
    assert 0.2 < stats["zero_spread_fraction"] < 0.8
    assert sum(mine.values()) / 6 == pytest.approx(stats["zero_spread_fraction"])


def test_wrong_shapes_are_refused():
    group_ids = torch.zeros(4, dtype=torch.long)
    for shape in ((4,), (4, 2), (3, 3)):
        with pytest.raises(ValueError, match="credit: need values"):
            value_stats(torch.zeros(shape), [0, 1], group_ids)
    for shape in ((4,), (4, 3), (3, 2)):
        with pytest.raises(ValueError, match="credit: need rewards"):
            zero_spread(torch.zeros(shape), [0, 1], group_ids)
