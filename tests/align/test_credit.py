import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.advantages import AdvantageConfig, group_advantages
from align.credit import (
    CreditConfig,
    TurningPointConfig,
    balanced,
    gain,
    null_rates,
    step_rewards,
    terminal,
    turning_point,
    turning_points,
    value,
)
from align.schema import build

NAN = float("nan")
# Nine trained steps and the final image, worked by hand. The rise of RISING is 1.9, the fall of FALLING -1.3.
RISING = [20.0, 20.6, 20.3, 20.9, 21.4, 21.1, 20.8, 21.6, 22.0, 21.9]
FALLING = [22.0, 21.6, 21.9, 21.2, 21.5, 21.3, 21.6, 20.9, 21.0, 20.7]
BOTH = torch.tensor([RISING, FALLING], dtype=torch.float64)
GAINS = [[0.6, -0.3, 0.6, 0.5, -0.3, -0.3, 0.8, 0.4, -0.1], [-0.4, 0.3, -0.7, 0.3, -0.2, 0.3, -0.7, 0.1, -0.3]]
RULES = ["terminal", "value", "gain", "turning_point"]
quick = settings(max_examples=60, deadline=None)


@st.composite
def trajectories(draw):
    """Values (N, S+1) in eighths, so that ties are common and differences exact."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 8)), draw(st.integers(2, 11)))
    return torch.from_numpy(rng.integers(-8, 9, size=shape) / 8)


def groups_of(rows, size=4):
    return torch.arange(rows) // size


def columns(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def advantages(rewards, group_ids, **options):
    valid = torch.ones(len(rewards), dtype=torch.bool)
    options = {"std": "group", "clip": 100.0} | options
    return group_advantages(rewards, valid, group_ids, AdvantageConfig(**options))[0]


def random_values(rows, steps, seed=0):
    return torch.randn(rows, steps + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(1)


def test_terminal_gives_every_step_the_final_score_and_keeps_missing_ones_missing():
    scores = torch.tensor([0.25, NAN, -1.0])
    rewards = terminal(scores, 4)
    assert rewards.shape == (3, 4)
    assert torch.equal(rewards[0], torch.full((4,), 0.25))
    assert torch.equal(rewards[2], torch.full((4,), -1.0))
    assert rewards[1].isnan().all()


def test_terminal_step_advantages_equal_the_advantages_of_the_scores():
    scores, groups = torch.rand(12, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    valid = torch.ones(12, dtype=torch.bool)
    per_step, _ = group_advantages(terminal(scores, 3), valid, groups, AdvantageConfig())
    per_image, _ = group_advantages(scores, valid, groups, AdvantageConfig())
    assert torch.equal(per_step, per_image.unsqueeze(1).expand(12, 3))


@pytest.mark.parametrize(("shape", "steps"), [((2, 3), 2), ((2,), 0)])
def test_terminal_refuses_wrong_shapes(shape, steps):
    with pytest.raises(ValueError, match="credit: "):
        terminal(torch.zeros(shape), steps)


def test_value_and_gain_of_the_worked_examples():
    assert value(BOTH).tolist() == [RISING[1:], FALLING[1:]]
    assert gain(BOTH).flatten().tolist() == pytest.approx(sum(GAINS, []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gains_telescope_to_the_total_rise(dtype):
    values = random_values(16, 9).to(dtype)
    rise = values[:, -1] - values[:, 0]
    bound = 1e-5 * values.abs().amax(1).clamp_min(1)
    assert ((gain(values).sum(1) - rise).abs() <= bound).all()


@pytest.mark.parametrize(
    ("consistent", "first_step", "expected"),
    [
        (False, True, [[0, 2, 6], [0, 2, 4, 6, 8]]),
        (True, True, [[0, 2, 6], [0, 2, 4, 6]]),
        (False, False, [[2, 6], [2, 4, 6, 8]]),
        (True, False, [[2, 6], [2, 4, 6]]),
    ],
)
def test_turning_points_of_the_worked_examples(consistent, first_step, expected):
    assert columns(turning_points(BOTH, consistent, first_step)) == expected


@pytest.mark.parametrize("consistent", [False, True])
def test_rewards_of_the_worked_examples(consistent):
    options = TurningPointConfig(consistent=consistent, balance=False)
    rewards, selected, kept = turning_point(BOTH, options, torch.tensor([0, 0]))
    assert torch.equal(selected, kept)
    expected = [list(row) for row in GAINS]
    expected[0][0], expected[0][2], expected[0][6] = 1.9, 1.6, 1.1
    # The last step of the second example is a turning point only without the constraint: -0.3 is its gain either way.
    expected[1][0], expected[1][2], expected[1][4], expected[1][6] = -1.3, -1.2, -0.8, -0.9
    assert rewards.flatten().tolist() == pytest.approx(sum(expected, []))
    doubled, _, _ = turning_point(BOTH, TurningPointConfig(consistent, balance=False, eta=2.0), torch.tensor([0, 0]))
    assert torch.allclose(doubled, torch.where(kept, 2 * rewards, rewards))


@quick
@given(trajectories(), st.booleans())
def test_selected_steps_go_the_way_of_the_trend(values, first_step):
    gains, trend = gain(values), (values[:, -1:] - values[:, :1]).expand(-1, values.shape[1] - 1)
    aggregate = values[:, -1:] - values[:, :-1]
    plain, strict = (turning_points(values, consistent, first_step) for consistent in (False, True))
    assert (plain | ~strict).all()
    assert torch.equal(gains.sign()[plain], trend.sign()[plain])
    assert (gains[plain] != 0).all()
    assert torch.equal(gains[:, :-1].sign()[plain[:, 1:]], -gains[:, 1:].sign()[plain[:, 1:]])
    assert torch.equal(aggregate.sign()[strict], gains.sign()[strict])
    assert (aggregate.abs()[strict] > gains.abs()[strict]).all()
    assert not strict[:, -1].any()


@quick
@given(trajectories(), st.booleans())
def test_the_definition_by_signs_selects_the_same(values, consistent):
    sign, trend = gain(values).sign(), (values[:, -1:] - values[:, :1]).sign()
    rest = (values[:, -1:] - values[:, 1:]).sign()
    expected = (sign == trend) & (sign != 0)
    expected[:, 1:] &= sign[:, :-1] == -sign[:, 1:]
    if consistent:
        expected &= sign == rest
    assert torch.equal(turning_points(values, consistent), expected)


@quick
@given(trajectories(), st.booleans())
def test_turning_points_ignore_offset_and_follow_the_direction(values, consistent):
    selected = turning_points(values, consistent)
    assert torch.equal(turning_points(values * 2 + 3, consistent), selected)
    assert torch.equal(turning_points(-values, consistent), selected)


def test_ties_and_missing_values_select_nothing():
    flat = torch.tensor([[0.0, 0.0, 1.0, 2.0], [1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 2.0, 1.0]])
    # A flat first step, then no reversal; a flat step before the rise; no trend.
    assert not turning_points(flat, consistent=False).any()
    assert columns(turning_points(BOTH[:1], consistent=False)) == [[0, 2, 6]]
    expected = {0: [], 1: [6], 2: [0, 6], 3: [0, 6], 4: [0, 2, 6], 5: [0, 2], 6: [0, 2], 9: []}
    for column, left in expected.items():
        broken = BOTH[:1].clone()
        broken[:, column] = NAN
        assert columns(turning_points(broken, consistent=False)) == [left], column


@pytest.mark.parametrize("rule", RULES)
def test_a_missing_value_makes_only_the_rewards_missing_that_use_it(rule):
    values = BOTH.clone()
    values[0, 4] = NAN
    rewards, _ = step_rewards(values, 9, CreditConfig(rule), torch.tensor([0, 0]))
    missing = {"terminal": [], "value": [3], "gain": [3, 4], "turning_point": [3, 4]}[rule]
    assert columns(rewards.isnan()) == [missing, []]


def test_a_missing_final_score_makes_every_terminal_reward_missing_and_one_gain():
    values = BOTH.clone()
    values[0, -1] = NAN
    rewards = {rule: step_rewards(values, 9, CreditConfig(rule), torch.tensor([0, 0]))[0] for rule in RULES}
    assert columns(rewards["terminal"].isnan()) == [list(range(9)), []]
    assert columns(rewards["gain"].isnan()) == [[8], []]
    assert columns(rewards["turning_point"].isnan()) == [[8], []]


def test_the_null_rates_of_nine_steps():
    # Among two neighbouring gains of opposite sign the trend is as likely to agree with either: a quarter. The first
    # gain and the sum of nine correlate by 1/3, and agree with probability 1/2 + asin(1/3)/pi. With the constraint the
    # first gain and the independent rest agree half of the time; 0.166 is a simulation with other numbers.
    interior, first = null_rates(9, consistent=False)
    assert interior == pytest.approx(0.25, abs=0.005)
    assert first == pytest.approx(0.5 + math.asin(1 / 3) / math.pi, abs=0.005)
    interior, first = null_rates(9, consistent=True)
    assert interior == pytest.approx(0.166, abs=0.005)
    assert first == pytest.approx(0.5, abs=0.005)


def test_null_rates_of_short_walks():
    assert null_rates(1, consistent=False) == (0.0, 1.0)
    assert null_rates(1, consistent=True) == (0.0, 0.0)
    assert null_rates(2, consistent=True)[0] == 0
    with pytest.raises(ValueError, match="num_steps"):
        null_rates(0, consistent=True)


def test_balancing_keeps_the_largest_of_the_commoner_sign():
    # Three positive pairs against four negative (five without the constraint): the smallest negative ones are dropped.
    for consistent, surplus in ((True, [4]), (False, [4, 8])):
        rewards, selected, kept = turning_point(BOTH, TurningPointConfig(consistent), torch.tensor([0, 1]))
        assert columns(kept) == [[0, 2, 6], [0, 2, 6]]
        dropped = selected & ~kept
        assert columns(dropped) == [[], surplus]
        assert torch.equal(rewards[dropped], gain(BOTH)[dropped])


def test_balancing_by_the_trend_ranks_by_the_total_and_drops_the_latest_among_equals():
    options = TurningPointConfig(balance_key="trend")
    _, _, kept = turning_point(BOTH, options, torch.tensor([0, 1]))
    assert columns(kept) == [[0, 2, 6], [0, 2, 4]]


@pytest.mark.parametrize(
    ("scope", "kept_second"),
    [("global", [0, 2, 6]), ("group", [0, 2, 4, 6]), (1, [0, 2, 4, 6]), (2, [0, 2, 6]), (9, [0, 2, 6])],
)
def test_balancing_scopes(scope, kept_second):
    # Alone neither example has both signs, so nothing is dropped.
    _, _, kept = turning_point(BOTH, TurningPointConfig(balance_scope=scope), torch.tensor([5, 3]))
    assert columns(kept) == [[0, 2, 6], kept_second]


def test_blocks_are_consecutive_samples():
    values = BOTH[[0, 1, 1, 0, 1]]
    _, _, kept = turning_point(values, TurningPointConfig(balance_scope=3), torch.zeros(5, dtype=torch.long))
    # 3 positive against 8 negative, then 3 against 4.
    assert columns(kept) == [[0, 2, 6], [0, 2], [0], [0, 2, 6], [0, 2, 6]]


@quick
@given(trajectories(), st.integers(0, 2**32 - 1))
def test_balanced_pairs_are_equal_in_number_and_the_largest(magnitude, seed):
    rng = np.random.default_rng(seed)
    selected = torch.from_numpy(rng.random(magnitude.shape) < 0.7)
    scope = torch.from_numpy(rng.integers(0, 3, size=len(magnitude))) * 7
    kept = balanced(selected, magnitude, scope)
    assert (selected | ~kept).all()
    assert torch.equal(kept[magnitude == 0], selected[magnitude == 0])
    for label in scope.unique():
        inside = (scope == label).unsqueeze(1)
        chosen = {sign: selected & inside & (magnitude.sign() == sign) for sign in (1, -1)}
        least = min(int(mask.sum()) for mask in chosen.values())
        for mask in chosen.values():
            if least == 0:
                assert torch.equal(kept & mask, mask)
                continue
            assert int((kept & mask).sum()) == least
            dropped = magnitude[mask & ~kept].abs()
            assert dropped.numel() == 0 or dropped.max() <= magnitude[mask & kept].abs().min()


def test_stats_of_the_worked_examples():
    config = CreditConfig("turning_point", TurningPointConfig(consistent=False))
    _, stats = step_rewards(BOTH, 9, config, torch.tensor([0, 0]))
    interior, first = null_rates(9, consistent=False)
    assert stats == {
        "credit/turning_point_rate": 6 / 16,
        "credit/turning_point_null": interior,
        "credit/first_step_rate": 1.0,
        "credit/first_step_null": first,
        "credit/kept_fraction": 0.75,
    }
    config.turning_point.first_step = False
    _, stats = step_rewards(BOTH, 9, config, torch.tensor([0, 0]))
    assert "credit/first_step_rate" not in stats
    assert stats["credit/kept_fraction"] == pytest.approx(4 / 6)
    _, stats = step_rewards(torch.zeros(2, 10), 9, config, torch.tensor([0, 0]))
    assert stats["credit/turning_point_rate"] == 0
    assert stats["credit/kept_fraction"] == 1


def test_rates_leave_out_samples_with_a_missing_value():
    values = BOTH.clone()
    values[1, 5] = NAN
    config = CreditConfig("turning_point")
    _, stats = step_rewards(values, 9, config, torch.tensor([0, 0]))
    assert stats["credit/turning_point_rate"] == 2 / 8
    _, stats = step_rewards(torch.full((2, 10), NAN), 9, config, torch.tensor([0, 0]))
    assert stats == {"credit/kept_fraction": 1.0}


def test_observed_rates_of_noise_equal_the_null_rates():
    # 20000 walks of 4 steps: a standard error of a rate is below 0.0036.
    values = random_values(20000, 4, seed=1)
    for consistent in (False, True):
        config = CreditConfig("turning_point", TurningPointConfig(consistent))
        _, stats = step_rewards(values, 4, config, groups_of(20000))
        for name in ("turning_point", "first_step"):
            assert stats[f"credit/{name}_rate"] == pytest.approx(stats[f"credit/{name}_null"], abs=0.015)


def test_a_constant_per_group_and_step_added_to_the_gains_changes_no_advantage():
    values, group_ids = random_values(12, 5), groups_of(12)
    shift = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[group_ids]
    before, after = advantages(gain(values), group_ids), advantages(gain(values) + shift, group_ids)
    assert (before - after).abs().max() <= 1e-6


def test_a_shared_first_value_does_not_matter_to_the_first_gain():
    values, group_ids = random_values(12, 5), groups_of(12)
    values[:, 0] = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[group_ids]
    without = values.clone()
    without[:, 0] = 0
    before, after = advantages(gain(values), group_ids), advantages(gain(without), group_ids)
    assert (before - after).abs().max() <= 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_scaling_and_permuting_the_values(rule):
    values, group_ids = random_values(12, 5), groups_of(12)
    config = CreditConfig(rule)
    rewards, _ = step_rewards(values, 5, config, group_ids)
    scaled, _ = step_rewards(values * 26, 5, config, group_ids)
    scale_moves_eps = advantages(rewards, group_ids, eps=1e-3 / 26)
    assert (advantages(scaled, group_ids, eps=1e-3) - scale_moves_eps).abs().max() <= 1e-6
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    moved, _ = step_rewards(values[order], 5, config, group_ids[order])
    assert torch.equal(moved, rewards[order])


@pytest.mark.parametrize("std", ["group", "global"])
def test_constant_rewards_teach_nothing(std):
    # A saturated reward: 0.1 + 0.7 is 0.7999999999999999, and every sample has the same.
    values, group_ids = torch.full((8, 10), 0.1 + 0.7), groups_of(8)
    for rule in RULES:
        rewards, _ = step_rewards(values, 9, CreditConfig(rule), group_ids)
        assert torch.equal(advantages(rewards, group_ids, std=std), torch.zeros(8, 9))


def test_a_group_of_equal_gains_at_one_step_keeps_its_other_steps():
    values, group_ids = random_values(8, 4), groups_of(8)
    values[:4, 2] = values[:4, 1]
    gains = gain(values)
    result = advantages(gains, group_ids, eps=0.05)
    assert torch.equal(result[:4, 1], torch.zeros(4))
    assert (result[:4, [0, 2, 3]] != 0).all()
    std = gains.unflatten(0, (2, 4)).std(1, correction=0)
    assert torch.allclose(result.double().unflatten(0, (2, 4)).mean(1), torch.zeros(2, 4).double(), atol=1e-6)
    spread = result.double().unflatten(0, (2, 4)).std(1, correction=0)
    assert torch.allclose(spread, std / (std + 0.05), rtol=0, atol=1e-6)


def test_a_missing_pair_gets_no_advantage_and_the_rest_as_if_it_were_absent():
    values, group_ids = random_values(8, 4), groups_of(8)
    whole = advantages(gain(values), group_ids)
    values[0, 2] = NAN
    result = advantages(gain(values), group_ids)
    assert torch.equal(result[0, 1:3], torch.zeros(2))
    assert torch.equal(result[:, [0, 3]], whole[:, [0, 3]])
    assert torch.equal(result[4:], whole[4:])
    alone = advantages(gain(values)[1:4], torch.zeros(3, dtype=torch.long))
    assert torch.allclose(result[1:4, 1:3], alone[:, 1:3], atol=1e-6)


def test_step_rewards_of_each_rule():
    group_ids = torch.tensor([0, 1])
    for rule, expected in (("value", value(BOTH)), ("gain", gain(BOTH)), ("terminal", terminal(BOTH[:, -1], 9))):
        rewards, stats = step_rewards(BOTH, 9, CreditConfig(rule), group_ids)
        assert torch.equal(rewards, expected)
        assert stats == {}
    final_only, _ = step_rewards(BOTH[:, -1:], 9, CreditConfig("terminal"), group_ids)
    assert torch.equal(final_only, terminal(BOTH[:, -1], 9))
    rewards, _ = step_rewards(BOTH, 9, CreditConfig("turning_point"), group_ids)
    assert torch.equal(rewards, turning_point(BOTH, TurningPointConfig(), group_ids)[0])


def test_wrong_shapes_are_refused():
    group_ids = torch.tensor([0, 1])
    for rule in (value, gain, turning_points):
        for shape in ((3,), (3, 1), (2, 3, 4)):
            with pytest.raises(ValueError, match="credit: values"):
                rule(torch.zeros(shape))
    with pytest.raises(ValueError, match="group_ids"):
        turning_point(BOTH, TurningPointConfig(), torch.tensor([0]))
    for name in RULES[1:]:
        with pytest.raises(ValueError, match=rf"rule {name} needs values \(N, 9\)"):
            step_rewards(BOTH, 8, CreditConfig(name), group_ids)
    with pytest.raises(ValueError, match="terminal needs values"):
        step_rewards(BOTH[:, 0], 9, CreditConfig("terminal"), group_ids)
    selected = torch.ones(2, 9, dtype=torch.bool)
    for magnitude, scope in ((torch.zeros(2, 8), group_ids), (torch.zeros(2, 9), torch.zeros(3))):
        with pytest.raises(ValueError, match="credit: need selected"):
            balanced(selected, magnitude, scope)


def test_config_reads_from_plain_data_and_reports_every_error_at_once():
    assert CreditConfig().validate() == []
    assert not CreditConfig().needs_values
    assert all(CreditConfig(rule).needs_values for rule in RULES[1:])
    errors: list[str] = []
    config = build(CreditConfig, {"rule": "turning_point", "turning_point": {"balance_scope": 9}}, errors=errors)
    assert config.turning_point.balance_scope == 9
    assert config.validate() == errors == []
    wrong = TurningPointConfig(eta=0.0, balance_scope=0, balance_key="delta")  # type: ignore[arg-type]
    bad = CreditConfig("dense", wrong)  # type: ignore[arg-type]
    assert [line.split()[0] for line in bad.validate()] == [
        "rule",
        "turning_point.eta",
        "turning_point.balance_scope",
        "turning_point.balance_key",
    ]
    assert TurningPointConfig(balance_scope=True).validate() != []
