"""Plans and settings: what may be stochastic, windows that every rank draws alike, errors listed at once."""

from collections import Counter
from dataclasses import replace

import pytest

from samplers.config import SamplerConfig
from samplers.plans import (
    BranchConfig,
    Plan,
    branched_plan,
    draw_window,
    full_plan,
    sliding_window,
    suffix_length,
    window_plan,
)


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


def test_with_a_noisy_end_the_last_step_may_be_stochastic_too():
    assert full_plan(10, noisy_end=True).stochastic == tuple(range(10))
    assert full_plan(1, noisy_end=True).stochastic == (0,)
    assert window_plan(10, 7, 3, noisy_end=True).stochastic == (7, 8, 9)
    assert draw_window(10, 3, 7, 10, seed=0, iteration=0, noisy_end=True).stochastic == (7, 8, 9)
    starts = [sliding_window(4, 2, 0, 4, 1, 1, i, noisy_end=True).stochastic[0] for i in range(4)]
    assert starts == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"0\.\.9"):
        Plan(10, (3, 10), noisy_end=True)


# released schedule of 100 stages from 14 to 20 of 20 steps: first and last stage of each length
STAGES = {14: (0, 14), 15: (15, 28), 16: (29, 42), 17: (43, 57), 18: (58, 71), 19: (72, 85), 20: (86, 99)}


def test_the_suffix_grows_over_the_stages_as_published():
    lengths = [suffix_length(stage, 14, 20, 100) for stage in range(100)]
    assert lengths == [n for n, (first, last) in STAGES.items() for _ in range(first, last + 1)]
    assert sum(lengths) / 100 == pytest.approx(16.97)
    assert {suffix_length(stage, 14, 20, 100) for stage in range(100, 300)} == {20}


@pytest.mark.parametrize("noisy_end", [False, True])
def test_the_trained_steps_of_every_stage_are_the_last_ones(noisy_end):
    for stage, length in ((0, 14), (57, 17), (99, 20), (250, 20)):
        config = BranchConfig()
        plan = config.plan(20, stage, "ddim" if noisy_end else "cps")
        assert plan.split == 20 - length
        assert plan.stochastic == tuple(range(20 - length, 20 if noisy_end else 19))


@pytest.mark.parametrize("stages", [1, 2, 3, 7, 30])
def test_the_suffix_reaches_its_end_however_few_the_stages(stages):
    lengths = [suffix_length(stage, 14, 20, stages) for stage in range(40)]
    assert lengths[0] == 14
    assert lengths == sorted(lengths)
    assert set(lengths[stages:]) == {20}


def test_a_branched_plan_is_its_prefix_and_its_suffix():
    plan = branched_plan(10, 7, noisy_prefix=True)
    assert plan == Plan(10, (3, 4, 5, 6, 7, 8), split=3, noisy_prefix=True)
    assert plan.prefix() == Plan(3, (0, 1, 2), noisy_end=True)
    assert plan.suffix() == Plan(7, (0, 1, 2, 3, 4, 5))
    assert branched_plan(10, 7).prefix() == Plan(3, (), noisy_end=True)
    ends = branched_plan(10, 7, noisy_end=True)
    assert ends.stochastic == (3, 4, 5, 6, 7, 8, 9)
    assert ends.suffix() == full_plan(7, noisy_end=True)
    assert branched_plan(10, 10).suffix() == full_plan(10)
    assert branched_plan(10, 10).split == 0
    assert plan.shared
    assert not branched_plan(10, 7, shared=False).shared


@pytest.mark.parametrize(("suffix", "noisy_end", "least"), [(1, False, 2), (0, True, 1), (11, False, 2), (11, True, 1)])
def test_a_suffix_without_a_trained_step_or_longer_than_the_chain_is_refused(suffix, noisy_end, least):
    with pytest.raises(ValueError, match=rf"needs a suffix of {least}\.\.10, got {suffix}"):
        branched_plan(10, suffix, noisy_end)


@pytest.mark.parametrize(("stochastic", "split"), [((2, 3), 3), ((2, 3), -1), ((), 1)])
def test_a_group_cannot_split_after_its_first_stochastic_step(stochastic, split):
    with pytest.raises(ValueError, match="splits before its first stochastic step"):
        Plan(10, stochastic, split=split)
    assert Plan(10, (2, 3), split=2).split == 2


@pytest.mark.parametrize(
    ("steps", "lengths"), [(20, (14, 20)), (10, (7, 10)), (50, (35, 50)), (3, (3, 3)), (1, (1, 1)), (11, (8, 11))]
)
def test_the_suffix_begins_at_seventy_percent_rounded_up(steps, lengths):
    assert BranchConfig().lengths(steps) == lengths
    assert BranchConfig(suffix_start=1).lengths(steps) == (1, steps)


@pytest.mark.parametrize(
    ("kernel", "prefix", "noisy"),
    [
        ("ddim", "auto", True),
        ("flow_sde", "auto", False),
        ("cps", "auto", False),
        ("ddim", "ode", False),
        ("cps", "stochastic", True),
    ],
)
def test_the_shared_steps_are_drawn_as_published_or_as_told(kernel, prefix, noisy):
    config = SamplerConfig(kernel=kernel, plan="branched", branch=BranchConfig(prefix=prefix), num_steps=10)
    assert config.validate() == []
    plan = config.make_plan(seed=0, iteration=0)
    assert (plan.split, plan.noisy_prefix, plan.noisy_end) == (3, noisy, kernel == "ddim")
    assert config.shared_start
    config.branch.shared = False
    assert config.make_plan(seed=0, iteration=0) == replace(plan, shared=False)
    assert not config.shared_start


@pytest.mark.parametrize(
    ("kernel", "branch", "message"),
    [
        ("cps", BranchConfig(suffix_start=1), "branch: need 2 <= suffix_start"),
        ("ddim", BranchConfig(suffix_start=0), "branch: need 1 <= suffix_start"),
        ("cps", BranchConfig(suffix_start=8, suffix_end=7), "got 8 and 7"),
        ("cps", BranchConfig(suffix_end=11), "<= num_steps = 10, got 7 and 11"),
        ("cps", BranchConfig(stages=0), "branch.stages must be at least 1, got 0"),
        ("cps", BranchConfig(prefix="euler"), "branch.prefix must be auto, ode or stochastic, got 'euler'"),
    ],
)
def test_bad_branches_are_refused_with_their_numbers(kernel, branch, message):
    (error,) = SamplerConfig(kernel=kernel, noise_level=0.7, plan="branched", branch=branch).validate()
    assert message in error


def test_ddim_draws_every_step_and_may_take_a_single_one():
    assert SamplerConfig(kernel="ddim", num_steps=1).validate() == []
    assert SamplerConfig(kernel="ddim", num_steps=10).make_plan(0, 0) == full_plan(10, noisy_end=True)
    window = SamplerConfig(kernel="ddim", num_steps=10, plan="window", window_range=[7, 10])
    assert window.validate() == []
    assert window.make_plan(0, 0).stochastic == (7, 8, 9)
    sliding = SamplerConfig(kernel="ddim", num_steps=4, plan="sliding", window_size=2, window_every=1)
    assert [sliding.make_plan(0, i).stochastic[-1] for i in range(4)] == [1, 2, 3, 1]
    (error,) = SamplerConfig(kernel="ddim", num_steps=10, noise_level=1.1).validate()
    assert "at most 1 with kernel ddim" in error
