"""Which steps are differentiated: the published laws, by frequency and by support, and what the settings refuse."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from samplers.gradient_plan import BackpropConfig, draw_active, draw_length, draw_plan, gradient_weights, last_step_plan
from samplers.grids import linspace_shift_grid
from samplers.vp import time_table, timestep_of, vp_grid

DRAWS = 100_000
ALIGNPROP = BackpropConfig(truncation="gaussian")
DRTUNE = BackpropConfig(steps="spread", k=3, cut_ratio=0.4, jacobian=False)
REFL = BackpropConfig(k=1, cut_ratio=0.25)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def uniform_grid(num_steps: int) -> torch.Tensor:
    return linspace_shift_grid(num_steps, 1.0)


def lengths(config: BackpropConfig, num_steps: int, draws: int = DRAWS) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([draw_length(config, num_steps, rng) for _ in range(draws)])


# -- how many last steps -------------------------------------------------------------------------------------------


def test_gaussian_truncation_is_that_of_the_released_alignprop():
    """b = int(Normal(42, 5)) of 50 steps, drawn again outside 1..49; the numbers are computed in the spec (2.2)."""
    drawn = lengths(ALIGNPROP, 50)
    assert drawn.mean() == pytest.approx(9.09, abs=0.05)  # std 4.3: the mean of 1e5 draws is off by 0.014
    assert (drawn == 1).mean() == pytest.approx(0.0275, abs=0.002)  # standard error 0.0005
    assert np.median(drawn) == 9
    assert drawn.min() == 1
    assert drawn.max() <= 49


def test_uniform_truncation_never_takes_the_whole_chain_and_all_lengths_below_it_alike():
    counts = np.bincount(lengths(BackpropConfig(truncation="uniform"), 50), minlength=51)
    assert counts[0] == counts[50] == 0
    expected = DRAWS / 49
    assert np.abs(counts[1:50] - expected).max() < 5 * np.sqrt(expected)


def test_each_step_by_itself_keeps_half_of_fifty():
    """Step i of 50 with probability (i + 1) / 51: 25 on average, the first 1 / 51, the last 50 / 51."""
    config, rng = BackpropConfig(truncation="per_step_bernoulli"), np.random.default_rng(0)
    counts = np.zeros(50)
    draws = 20_000
    for _ in range(draws):
        counts[draw_active(config, 50, rng)] += 1
    assert counts.sum() / draws == pytest.approx(25.0, abs=0.1)  # std of a draw 2.9, of the mean 0.02
    expected = np.arange(1, 51) / 51
    assert np.abs(counts / draws - expected).max() < 5 * np.sqrt(0.25 / draws)


@pytest.mark.parametrize("truncation", ["gaussian", "uniform"])
def test_a_chain_of_a_single_step_has_nothing_to_cut_off(truncation):
    config = BackpropConfig(truncation=truncation)
    assert draw_active(config, 1, np.random.default_rng(0)) == [0]
    assert set(lengths(config, 2, 50)) == {1}


# -- which steps ---------------------------------------------------------------------------------------------------


def test_refl_stops_at_one_of_the_last_ten_of_forty_and_differentiates_that_step():
    plan = draw_plan(REFL, uniform_grid(40), range(3000), seed=0, iteration=0)
    counts = Counter(plan.last.tolist())
    assert set(counts) == set(range(30, 40))
    assert min(counts.values()) > 300 - 5 * 17  # standard error sqrt(3000 * 0.1 * 0.9) = 16.4
    assert plan.active.nonzero()[:, 1].tolist() == plan.last.tolist()


@pytest.mark.parametrize("num_steps", [10, 25, 40])
def test_drtune_stops_in_its_window_and_spreads_its_steps_evenly_up_to_there(num_steps):
    plan = draw_plan(DRTUNE, uniform_grid(num_steps), range(4000), seed=3, iteration=1)
    assert set(plan.last.tolist()) == set(range(num_steps - round(0.4 * num_steps), num_steps))
    starts: dict[int, set[int]] = {}
    for last, row in zip(plan.last.tolist(), plan.active, strict=True):
        first, second, third = row.nonzero().flatten().tolist()
        stride = max(1, (last + 1) // 3)
        assert (second - first, third - second) == (stride, stride)
        assert third <= last
        starts.setdefault(last, set()).add(first)
    for last, seen in starts.items():
        assert seen == set(range(last - 2 * max(1, (last + 1) // 3) + 1))


def test_late_steps_are_drawn_without_replacement_by_their_weight():
    """Two of four with weights i + 1: the inclusion probabilities of drawing one after the other, p_i the first time."""
    config, rng = BackpropConfig(steps="late_biased", k=2, late_bias=1.0, jacobian=False), np.random.default_rng(0)
    draws = 20_000
    counts = np.zeros(4)
    for _ in range(draws):
        drawn = draw_active(config, 4, rng)
        assert len(set(drawn)) == 2
        assert drawn == sorted(drawn)
        counts[drawn] += 1
    p = np.arange(1, 5) / 10
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    assert np.abs(counts / draws - (p + second)).max() < 5 * np.sqrt(0.25 / draws)


def test_without_bias_all_steps_are_drawn_alike_and_with_more_of_it_later_ones():
    rng = np.random.default_rng(0)
    means = []
    for bias in (0.0, 1.0, 2.0):
        config = BackpropConfig(steps="late_biased", k=1, late_bias=bias)
        means.append(np.mean([draw_active(config, 9, rng)[0] for _ in range(10_000)]))
    steps = np.arange(9.0)
    expected = [(steps * (steps + 1) ** b).sum() / ((steps + 1) ** b).sum() for b in (0, 1, 2)]
    assert means == pytest.approx(expected, abs=5 * 2.6 / 100)  # std of a draw at most 2.6


def test_fixed_takes_the_last_k():
    plan = draw_plan(BackpropConfig(k=3), uniform_grid(7), [0, 5], seed=0, iteration=0)
    assert (plan.first, plan.last.tolist(), plan.weight.tolist()) == (0, [6, 6], [1, 1])
    assert plan.active.tolist() == [[False] * 4 + [True] * 3] * 2
    assert last_step_plan(2, 7).active.nonzero().tolist() == [[0, 6], [1, 6]]


# -- factors of the gradient ---------------------------------------------------------------------------------------


def test_half_of_the_missing_step_length_is_made_up_for():
    """FlowBP: uniform times, two of four steps, rho = 0.5: g = 1 + 0.5 (2 - 1)."""
    config = BackpropConfig(steps="late_biased", k=2, grad_rescale=0.5)
    assert draw_plan(config, uniform_grid(4), range(6), 0, 0).weight.tolist() == [1.5] * 6
    every = BackpropConfig(steps="late_biased", k=4, grad_rescale=0.5)
    assert draw_plan(every, uniform_grid(4), range(3), 0, 0).weight.tolist() == [1.0] * 3


def test_weights_count_lengths_and_not_steps_and_a_jump_with_its_own_length():
    grid = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.0])
    last = torch.tensor([3, 3, 1, 3])
    active = torch.zeros(4, 4, dtype=torch.bool)
    active[0, 0] = active[1, 1] = active[2, 1] = True
    weights = gradient_weights(grid, 0, last, active, 1.0)
    assert weights.tolist() == pytest.approx([1 / 0.1, 1 / 0.4, 1 / 0.9, 1.0])  # the last has no active step at all
    later = gradient_weights(grid, 1, last, active, 1.0)
    assert float(later[1]) == pytest.approx(0.9 / 0.4)  # a chain that begins at 0.9


# -- starting from real images -------------------------------------------------------------------------------------


def test_a_partial_chain_of_twenty_steps_begins_at_training_timestep_551():
    """InstructVideo (arXiv 2312.12490): d(i) = (T / D)(i - 1) + 1, tau D = 12 of D = 20 steps, d(12) = 551."""
    scheduler = DDIMScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(20)
    table = time_table(scheduler.alphas)
    grid = vp_grid(scheduler.timesteps.tolist(), table, float(table[0]))
    plan = draw_plan(BackpropConfig(partial_tau=0.6), grid, [0, 1], seed=0, iteration=0)
    steps = timestep_of(grid, table)[:-1].flip(0).tolist()  # d(1), d(2), ...
    assert (steps[0], steps[1], steps[11]) == (1, 51, 551)
    assert float(timestep_of(grid[plan.first, None], table)) == 551
    assert 20 - plan.first == 12
    assert plan.active.nonzero()[:, 1].tolist() == [19, 19]


def test_laws_of_a_partial_chain_count_its_own_steps():
    config = BackpropConfig(truncation="uniform", partial_tau=0.5)
    plan = draw_plan(config, uniform_grid(10), range(300), seed=0, iteration=0)
    assert plan.first == 5
    assert set(plan.active.sum(dim=1).tolist()) == {1, 2, 3, 4}
    assert not plan.active[:, :5].any()
    assert config.most_active(10) == 4


# -- keyed draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [ALIGNPROP, DRTUNE, BackpropConfig(truncation="per_step_bernoulli"), BackpropConfig(steps="late_biased", k=3)],
    ids=["gaussian", "spread", "bernoulli", "late"],
)
def test_a_sample_s_plan_depends_on_its_name_alone(config):
    grid = uniform_grid(20)
    whole = draw_plan(config, grid, range(30), seed=1, iteration=2)
    order = [17, 3, 29, 0]
    some = draw_plan(config, grid, order, seed=1, iteration=2)
    picked = whole.take(torch.tensor(order))
    for name in ("last", "active", "weight"):
        assert torch.equal(getattr(some, name), getattr(picked, name))
    assert some.first == picked.first
    for other in (draw_plan(config, grid, range(30), 2, 2), draw_plan(config, grid, range(30), 1, 3)):
        assert not torch.equal(other.active, whole.active)
    assert len(torch.unique(whole.active, dim=0)) > 5  # samples differ from each other


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"k": 0}, "k: must be at least 1, got 0"),
        ({"truncation_mean": 1.0}, "truncation_mean: must be in (0, 1), got 1.0"),
        ({"truncation_std": 0.0}, "truncation_std: must be in (0, 1], got 0.0"),
        ({"late_bias": -1.0}, "late_bias: must be at least 0, got -1.0"),
        ({"grad_rescale": 1.5}, "grad_rescale: must be in [0, 1], got 1.5"),
        ({"cut_ratio": 1.0}, "cut_ratio: must be in [0, 1), got 1.0"),
        ({"lv_draws": -1}, "lv_draws: must be at least 0, got -1"),
        ({"partial_tau": 0.0}, "partial_tau: must be in (0, 1], or null, got 0.0"),
        ({"adjoint_clip": -1.0}, "adjoint_clip: must be at least 0, got -1.0"),
        ({"velocity_penalty": -1.0}, "velocity_penalty: must be at least 0, got -1.0"),
        ({"k": 11}, "k: 11 active steps, but a chain may have only 10; use fewer"),
        ({"k": 8, "cut_ratio": 0.4, "steps": "spread"}, "k: 8 active steps, but a chain may have only 7; use fewer"),
        ({"partial_tau": 0.04}, "partial_tau: 0.04 of 10 steps leaves none to run; use a larger one"),
        (
            {"partial_tau": 0.3, "cut_ratio": 0.5},
            "cut_ratio: 0.5 of 10 steps is more than the 3 that run",
        ),
        (
            {"truncation": "uniform", "partial_tau": 0.1},
            "truncation: uniform draws K from 1 to T - 1, and T is 1; use fixed",
        ),
        (
            {"truncation": "gaussian", "steps": "spread"},
            "truncation: gaussian belongs to steps last, and steps is spread; use fixed",
        ),
        ({"lv_draws": 1, "k": 2}, "lv_draws: copies of the last step go with k 1, steps last, truncation fixed, no early stop"),
    ],
)  # fmt: skip
def test_every_mistake_is_named(settings: dict[str, Any], line: str):
    assert BackpropConfig(**settings).validate(10) == [line]


def test_every_mistake_of_a_section_is_told_at_once_and_the_presets_have_none():
    assert len(BackpropConfig(k=0, late_bias=-1, adjoint_clip=-2).validate(10)) == 3
    for config in (
        BackpropConfig(),
        ALIGNPROP,
        DRTUNE,
        REFL,
        BackpropConfig(lv_draws=2),
        BackpropConfig(partial_tau=0.6),
    ):
        assert config.validate(40) == []


def test_a_gaussian_that_never_falls_on_a_legal_cut_is_refused_and_not_drawn_for_ever():
    narrow = BackpropConfig(truncation="gaussian", truncation_mean=0.02, truncation_std=0.001)
    (line,) = narrow.validate(10)
    assert line.startswith("truncation_mean: ")
    assert BackpropConfig(truncation="gaussian", truncation_mean=0.5, truncation_std=0.001).validate(10) == []
