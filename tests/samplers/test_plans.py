"""Plans and settings: what may be stochastic, windows that every rank draws alike, errors listed at once."""

from collections import Counter

import pytest

from samplers.config import SamplerConfig
from samplers.plans import Plan, draw_window, full_plan, window_plan


def test_full_plan_is_all_but_the_last_step():
    assert full_plan(10).stochastic == tuple(range(9))
    assert full_plan(2).stochastic == (0,)
    with pytest.raises(ValueError, match="at least 2 steps"):
        full_plan(1)


def test_window_plan_covers_its_window():
    assert window_plan(10, 2, 3) == Plan(10, (2, 3, 4))
    assert window_plan(10, 6, 3).stochastic[-1] == 8


@pytest.mark.parametrize(
    ("steps", "stochastic", "message"),
    [
        (10, (9,), "last step 9 must be deterministic"),
        (1, (0,), "last step 0 must be deterministic"),
        (10, (3, 10), "0..8"),
        (10, (-1, 3), "0..8"),
        (10, (3, 2), "increase strictly"),
        (10, (3, 3), "increase strictly"),
        (0, (), "at least 1 step"),
    ],
)
def test_plans_that_cannot_be_sampled_are_refused(steps, stochastic, message):
    with pytest.raises(ValueError, match=message):
        Plan(steps, stochastic)


def test_a_window_over_the_last_step_is_refused():
    with pytest.raises(ValueError, match="last step 9"):
        window_plan(10, 7, 3)
    with pytest.raises(ValueError, match="at least 1"):
        window_plan(10, 2, 0)


def test_draw_window_stays_in_range_and_is_uniform_over_its_starts():
    starts = Counter(draw_window(10, 3, 1, 6, seed=0, iteration=i).stochastic[0] for i in range(1200))
    assert set(starts) == {1, 2, 3}
    # Binomial(1200, 1/3) has a standard deviation of 16.3; 5 of them.
    assert all(abs(count - 400) < 82 for count in starts.values())
    assert draw_window(10, 3, 4, 7, seed=0, iteration=0) == window_plan(10, 4, 3)
    assert draw_window(10, 9, 0, 9, seed=0, iteration=0) == full_plan(10)


def test_draw_window_depends_on_seed_and_iteration_only():
    def draws(seed):
        return [draw_window(20, 3, 0, 19, seed=seed, iteration=i) for i in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert len(set(draws(3))) > 5


@pytest.mark.parametrize(
    ("size", "lo", "hi", "message"),
    [
        (3, 0, 10, "the last step is deterministic"),
        (3, 0, 2, "hold window_size = 3"),
        (3, -1, 5, "start at 0"),
        (0, 0, 5, "window_size must be at least 1"),
    ],
)
def test_bad_window_ranges_are_refused(size, lo, hi, message):
    with pytest.raises(ValueError, match=message):
        draw_window(10, size, lo, hi, seed=0, iteration=0)


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "ode"])
@pytest.mark.parametrize("plan", ["full", "window"])
def test_valid_settings_have_no_errors_and_make_a_plan(kernel, plan):
    config = SamplerConfig(kernel=kernel, plan=plan)
    assert config.validate() == []
    stochastic = config.make_plan(seed=0, iteration=0).stochastic
    assert len(stochastic) == (0 if kernel == "ode" else {"full": 9, "window": 3}[plan])


@pytest.mark.parametrize("steps", [2, 3, 4, 6, 10])
def test_default_window_range_holds_the_window_whenever_the_steps_allow(steps):
    config = SamplerConfig(num_steps=steps, plan="window", window_size=3)
    assert bool(config.validate()) == (steps < 4)
    if steps >= 4:
        assert len(config.make_plan(0, 0).stochastic) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "flow_sdee"}, "kernel: unknown value 'flow_sdee'; did you mean flow_sde?"),
        ({"grid": "karras"}, "grid: unknown value 'karras'; choose one of"),
        ({"plan": "windows"}, "did you mean window?"),
        ({"solver": "heun"}, "solver: unknown value"),
        ({"kernel": "cps", "noise_level": 1.2}, "at most 1 with kernel cps"),
        ({"noise_level": 0.0}, "noise_level must be positive"),
        ({"noise_level": float("nan")}, "noise_level must be positive"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"kernel": "ode", "num_steps": 0}, "num_steps must be at least 1"),
        ({"shift": 0.0}, "shift must be positive"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"kernel": "dance_sde", "plan": "window", "window_range": [6, 10]}, "the last step is deterministic"),
        ({"plan": "window", "window_range": [4]}, "window_range needs 2 numbers"),
        ({"grid": "custom", "custom_grid": [1.0, 0.0]}, "needs num_steps + 1 = 11 times, got 2"),
        ({"grid": "custom", "num_steps": 2, "custom_grid": [1.0, 0.5, 0.1]}, "must fall from at most 1 to 0"),
        ({"custom_grid": [1.0, 0.0]}, "use grid: custom"),
    ],
)
def test_each_bad_setting_gives_exactly_one_line(changes, message):
    errors = SamplerConfig(**changes).validate()
    assert len(errors) == 1
    assert message in errors[0]
    assert "\n" not in errors[0]


def test_all_errors_are_listed_at_once():
    config = SamplerConfig(kernel="sde", grid="karras", solver="heun", num_steps=0, shift=-1.0)
    assert len(config.validate()) == 5
