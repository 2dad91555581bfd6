"""The search for a noise level per step: where it ends for gains whose balance is known, and its bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.calibration import (
    CalibrationConfig,
    balanced,
    calibrate_table,
    flow_sde_sigmas,
    multipliers_to_sigmas,
    settled,
    sigmas_to_multipliers,
    update_table,
)
from samplers.grids import linspace_shift_grid
from samplers.kernels import KERNEL_LOG_PROB, dance_sde, flow_sde, noise_interval, psi_sde

SD3_10 = torch.tensor(
    [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0.0]
)
FRACTION, LITERAL = CalibrationConfig(), CalibrationConfig(rule="literal")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def toy_gains(level, samples, generator):
    """Gain `psi z - 0.6 psi^2`: noise that may help or hurt, and a loss that grows with it; columns independent."""
    return level * torch.randn(samples, len(level), generator=generator) - 0.6 * level**2


def moves(up, down, config):
    """+1 or -1 per step: the direction in which counts (T,) move a table."""
    psi = torch.full((len(up),), 0.5, dtype=torch.float64)
    moved = update_table(psi, up, down, config, psi, torch.ones(len(up), dtype=torch.bool))
    return torch.sign(moved - psi).tolist()


# -- the kernel ---------------------------------------------------------------------------------------------------


def test_psi_step_is_the_reverse_sde_with_its_noise_level_as_diffusion():
    # by hand: t .6 -> .45, x 1, v -.5, sigma .3 per element 0 and .8 per element 1; noise estimate x + .4 v = .8
    x, v = torch.ones(2, 1), torch.full((2, 1), -0.5)
    t, t_next = torch.full((2,), 0.6), torch.full((2,), 0.45)
    step = psi_sde(x, v, t, t_next, torch.tensor([0.3, 0.8]))
    pull = [s**2 * 0.15 / (2 * 0.6) * 0.8 for s in (0.3, 0.8)]
    assert step.mean.flatten().tolist() == pytest.approx([1.075 - p for p in pull], abs=1e-6)
    assert step.std.tolist() == pytest.approx([s * math.sqrt(0.15) for s in (0.3, 0.8)], abs=1e-7)


def test_dance_sde_is_psi_sde_of_one_level():
    x, v = normal(9, 4, 3), normal(9, 4, 3, seed=1)
    dance, psi = (kernel(x, v, SD3_10[:-2], SD3_10[1:-1], 0.3) for kernel in (dance_sde, psi_sde))
    assert torch.equal(dance.mean, psi.mean)
    assert torch.equal(dance.std, psi.std)


@pytest.mark.parametrize("grid", [SD3_10, linspace_shift_grid(6, 1.0), linspace_shift_grid(4, 3.0) * 0.9])
def test_flow_sde_is_psi_sde_with_its_own_table_also_at_t_1(grid):
    steps = len(grid) - 1
    x, v = normal(steps, 5), normal(steps, 5, seed=1)
    flow = flow_sde(x, v, grid[:-1], grid[1:], 0.7)
    psi = psi_sde(x, v, grid[:-1], grid[1:], flow_sde_sigmas(grid, 0.7))
    torch.testing.assert_close(psi.mean, flow.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(psi.std, flow.std, rtol=1e-6, atol=0)


def test_psi_step_has_a_gaussian_log_prob_and_variance_over_its_own_length():
    assert KERNEL_LOG_PROB["psi_sde"] == "gaussian"
    t, t_next = SD3_10[2:4], SD3_10[3:5]
    std = psi_sde(normal(2, 3), normal(2, 3), t, t_next, 0.6).std
    torch.testing.assert_close(std**2, 0.36 * noise_interval("psi_sde", t, t_next))


# -- tables -------------------------------------------------------------------------------------------------------


def test_flow_sde_table_of_the_sd3_grid():
    expected = [3.506, 3.435, 2.273, 1.719, 1.359, 1.088, 0.861, 0.652, 0.434, 0.066]
    assert flow_sde_sigmas(SD3_10, 0.7).tolist() == pytest.approx(expected, abs=6e-4)


def test_sigmas_and_multipliers_are_inverse():
    multipliers = torch.linspace(0.05, 1.4, 10, dtype=torch.float64)
    sigmas = multipliers_to_sigmas(multipliers, SD3_10)
    torch.testing.assert_close(sigmas_to_multipliers(sigmas, SD3_10), multipliers, rtol=1e-12, atol=0)
    torch.testing.assert_close(multipliers_to_sigmas(torch.full((10,), 0.7), SD3_10), flow_sde_sigmas(SD3_10, 0.7))


# -- one update ---------------------------------------------------------------------------------------------------


def test_direction_of_a_step_under_both_rules():
    up, down = torch.tensor([0, 13, 8, 12]), torch.tensor([0, 11, 16, 12])
    assert moves(up, down, FRACTION) == [1, 1, -1, 1]
    assert moves(up, down, LITERAL) == [1, -1, -1, 1]


def raise_probability(samples, config):
    """Exact probability that `samples` perfectly balanced gains raise an entry."""
    up = torch.arange(samples + 1)
    raised = balanced(up, samples - up, config).tolist()
    return sum(math.comb(samples, k) for k in range(samples + 1) if raised[k]) / 2**samples


@pytest.mark.parametrize(("samples", "share"), [(3, 0.75), (24, 0.16), (64, 0.099), (128, 0.070), (1024, 0.025)])
def test_literal_rule_lowers_a_balanced_step_most_of_the_time(samples, share):
    assert raise_probability(samples, LITERAL) == pytest.approx(share, abs=2e-3)


def test_fraction_rule_raises_a_balanced_step():
    assert raise_probability(128, FRACTION) == pytest.approx(0.97, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(param=st.sampled_from(["multiplier", "sigma"]), sign=st.integers(-1, 1), factor=st.floats(1.0, 3.0))
def test_entries_stay_within_bounds_and_untrained_ones_do_not_move(param, sign, factor):
    config = CalibrationConfig(param=param, psi_max_factor=factor, iterations=300, step=0.05)
    result = calibrate_table(lambda sigmas, _: torch.full((4, 7), float(sign)), SD3_10, range(1, 8), config)
    start = flow_sde_sigmas(SD3_10, 0.7)
    if param == "multiplier":
        table, low, high = result.multipliers, torch.full((10,), 0.02), torch.full((10,), 0.7 * factor)
    else:
        table, low, high = result.sigmas, torch.full((10,), 0.02), start * factor
    expected = low if sign else high  # all gains of one sign are as unbalanced as can be; no gain at all is balanced
    # the mean of tables that no longer moved by more than three steps lies within these of the bound, and not beyond
    distance = (table - expected)[1:8] * (1 if sign else -1)
    assert bool(((distance >= -1e-6) & (distance <= 0.15)).all())
    assert torch.equal(result.sigmas[[0, 8, 9]], start[[0, 8, 9]])


def test_an_initial_entry_below_the_lowest_level_is_not_raised_by_the_bound():
    # sigma of the last searched step is .0664 at level .7: with the lowest level above it, its own start is its floor
    config = CalibrationConfig(param="sigma", psi_min=0.1, iterations=5)
    result = calibrate_table(lambda *_: -torch.ones(4, 10), SD3_10, range(10), config)
    assert result.sigmas[9] == flow_sde_sigmas(SD3_10, 0.7)[9]


# -- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [64, 128, 512, 2048])
def test_fraction_rule_settles_where_the_tolerated_imbalance_is_reached(samples):
    # P(gain > 0) = Phi(-.6 psi) = .4 at psi = .422, for any number of samples
    assert equilibrium(samples, FRACTION).mean().item() == pytest.approx(0.42, abs=0.03)


@pytest.mark.parametrize("samples", [24, 64, 128])
def test_literal_rule_ends_without_noise(samples):
    config = CalibrationConfig(rule="literal", psi_min=1e-6)
    assert equilibrium(samples, config).max() < 0.01


def equilibrium(samples, config, replicas=24, iterations=700):
    """Mean table of the last 200 iterations for independent copies (R,) of the toy, one in each entry."""
    generator = torch.Generator().manual_seed(samples)
    initial = torch.full((replicas,), 0.7, dtype=torch.float64)
    psi, total, trained = initial, torch.zeros(replicas), torch.ones(replicas, dtype=torch.bool)
    for iteration in range(iterations):
        gains = toy_gains(psi, samples, generator)
        psi = update_table(psi, (gains > 0).sum(0), (gains < 0).sum(0), config, initial, trained)
        if iteration >= iterations - 200:
            total = total + psi / 200
    return total


def test_search_stops_near_the_equilibrium_and_returns_the_mean_of_ten_tables():
    generator = torch.Generator().manual_seed(0)
    config = CalibrationConfig(samples=512, iterations=200)
    reports = []

    def gains(sigmas, iteration):
        return toy_gains(sigmas_to_multipliers(sigmas, SD3_10)[:9], config.samples, generator)

    result = calibrate_table(gains, SD3_10, range(9), config, lambda *line: reports.append(line))
    assert result.settled
    assert 28 < result.iterations < 150  # 28 steps of .01 lead from .7 to .42
    torch.testing.assert_close(result.multipliers[:9], torch.full((9,), 0.42).double(), rtol=0, atol=0.08)
    assert result.history.shape == (result.iterations + 1, 10)
    torch.testing.assert_close(result.sigmas, result.history[-10:].mean(dim=0))
    torch.testing.assert_close(result.sigmas, multipliers_to_sigmas(result.multipliers, SD3_10))
    # Phi(-.6 x .7) = .337 of the gains are positive at the start, .4 at the equilibrium
    assert result.up[0].mean().item() == pytest.approx(0.337, abs=0.03)
    assert result.up[-10:].mean().item() == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(result.up + result.down, torch.ones(result.iterations, 9))
    assert reports[0] == ("calibrating", 0, 200)
    assert reports[-1] == ("calibrating", result.iterations, result.iterations)


def test_gains_are_asked_for_with_the_table_of_the_iteration():
    seen = []

    def gains(sigmas, iteration):
        seen.append((iteration, sigmas))
        return -torch.ones(5, 9)

    result = calibrate_table(gains, SD3_10, range(9), CalibrationConfig(iterations=3))
    assert [i for i, _ in seen] == [0, 1, 2]
    assert torch.equal(torch.stack([s for _, s in seen]), result.history[:3])
    assert not result.settled


def test_zero_and_missing_gains_count_in_neither_and_never_give_nan():
    gains = torch.tensor([[1.0, 0.0, math.nan, 1.0], [-1.0, 0.0, math.nan, math.nan], [0.0, 0.0, math.nan, -1.0]])
    result = calibrate_table(lambda *_: gains, SD3_10, range(4), CalibrationConfig(iterations=1))
    assert result.up[0].tolist() == pytest.approx([1 / 3, 0, 0, 1 / 2])
    assert result.down[0].tolist() == pytest.approx([1 / 3, 0, 0, 1 / 2])
    assert result.multipliers[:4].tolist() == pytest.approx([0.71] * 4)
    assert bool(result.history.isfinite().all())


def test_a_search_goes_on_from_its_counts_exactly():
    config, kept, seen = CalibrationConfig(iterations=14, samples=64), [], []

    def gains(sigmas, iteration):
        seen.append(iteration)
        generator = torch.Generator().manual_seed(iteration)
        found = toy_gains(sigmas_to_multipliers(sigmas, SD3_10)[2:5], 64, generator)
        found[: iteration % 3] = math.nan
        return found

    whole = calibrate_table(gains, SD3_10, range(2, 5), config, keep=kept.append)
    assert len(kept) == 14
    assert kept[2].sum(dim=0).tolist() == [2 * 62] * 3  # two of 64 are missing, the others gained or lost
    seen.clear()
    again = calibrate_table(gains, SD3_10, range(2, 5), config, done=kept[:7])
    assert seen == list(range(7, 14))
    for name in ("sigmas", "multipliers", "history", "up", "down"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert calibrate_table(gains, SD3_10, range(2, 5), config, done=kept).sigmas.equal(whole.sigmas)
    assert seen == list(range(7, 14))


def test_a_step_that_almost_nobody_gains_or_loses_by_is_hardly_measured():
    def gains(_, iteration):
        found = torch.zeros(100, 4)
        found[:, 0] = math.nan
        found[: 3 if iteration % 2 else 6, 1] = 1.0  # 4.5 % on average
        found[:5, 2] = -1.0
        found[:, 3] = float(iteration < 2)  # only before the last ten iterations
        return found

    result = calibrate_table(gains, SD3_10, range(4), CalibrationConfig(iterations=12, step=0.1))
    assert result.iterations == 12
    assert result.hardly_measured().tolist() == [True, True, False, True]


def test_settled_needs_ten_iterations_and_at_most_three_steps():
    still = [torch.tensor([0.5, 0.2])] * 10
    assert not settled(still, 0.01)
    assert settled([*still, torch.tensor([0.53, 0.17])], 0.01)
    assert not settled([*still, torch.tensor([0.5, 0.16])], 0.01)


def test_gains_of_another_number_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"each of 9 steps, got \(4, 3\)"):
        calibrate_table(lambda *_: torch.ones(4, 3), SD3_10, range(9), FRACTION)


def test_every_wrong_setting_is_named():
    wrong = CalibrationConfig(
        rule="best", tolerance=1.5, count_tolerance=0, step=0.0, param="level", init=-1.0, samples=0, iterations=0,
        psi_min=0.0, psi_max_factor=0.5, seed=-1,
    )  # fmt: skip
    named = {line.split()[0] for line in wrong.validate()}
    assert named == set(vars(wrong))
    assert CalibrationConfig().validate() == []
