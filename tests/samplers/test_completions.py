"""Completions: the wavefront against one completion at a time, on velocities that differ by row, time and condition."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from samplers.completions import CompletionConfig, CompletionPlan, completion_indices
from samplers.grids import make_grid
from samplers.kernels import ode
from samplers.plans import Plan, full_plan, sliding_window, window_plan
from samplers.rollout import rollout

SD3_10 = make_grid(
    "custom",
    10,
    custom=[1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0],
)
LEVELS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.7}
PLANS = {"full": full_plan(10), "window": window_plan(10, 3, 4), "gaps": Plan(10, (1, 4, 8))}


@dataclass
class Rows:
    """A condition of one number a row."""

    numbers: Tensor

    def take(self, rows):
        return Rows(self.numbers[torch.as_tensor(rows)])


class Field:
    """A nonlinear velocity that counts the rows and calls it is asked for."""

    def __init__(self, strength=1.0):
        self.strength, self.rows, self.calls = strength, 0, 0

    def __call__(self, x, t, cond):
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        assert len(cond.numbers) == len(x)
        t, c = (y.view(-1, 1, 1) for y in (t.to(x.dtype), cond.numbers.to(x.dtype)))
        return self.strength * torch.tanh(x.roll(1, -1) + c) * (1 + t) - 0.3 * x


def start(batch=4, shape=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(batch, *shape, generator=generator)
    draws = torch.randn(10, batch, *shape, generator=generator)
    return x0, Rows(torch.linspace(-1, 1, batch)), lambda k: draws[k]


def naive(velocity, x, cond, k, ode_steps="all", dtype=torch.float32):
    """One completion at a time: the oracle."""
    path = completion_indices(k, 10, ode_steps)
    x = x.to(dtype)
    for i, j in zip(path, path[1:], strict=False):
        t, t_next = SD3_10[i].expand(len(x)), SD3_10[j].expand(len(x))
        x = ode(x.float(), velocity(x.float(), t, cond).float(), t, t_next).mean.to(dtype)
    return x


@pytest.mark.parametrize("ode_steps", ["all", 1, 2, 3, 7, 10])
@pytest.mark.parametrize("plan", list(PLANS))
@pytest.mark.parametrize("kernel", list(LEVELS))
def test_the_wavefront_gives_what_one_completion_at_a_time_gives(kernel, plan, ode_steps):
    x0, cond, noise = start()
    found = rollout(
        Field(), x0, cond, SD3_10, PLANS[plan], kernel, LEVELS[kernel], noise, completions=CompletionPlan(ode_steps)
    )
    assert len(found.completions) == len(PLANS[plan].stochastic)
    # kernels compute in float32 whatever comes in, so bit for bit is the strongest statement there is
    for k, clean in zip(PLANS[plan].stochastic, found.completions, strict=True):
        assert torch.equal(clean, naive(Field(), found.states[k], cond, k, ode_steps))


def test_completions_do_not_change_the_trajectory():
    x0, cond, noise = start()
    plain = rollout(Field(), x0, cond, SD3_10, full_plan(10), "flow_sde", 0.7, noise)
    valued = rollout(Field(), x0, cond, SD3_10, full_plan(10), "flow_sde", 0.7, noise, completions=CompletionPlan())
    assert torch.equal(plain.final, valued.final)
    assert torch.equal(plain.log_probs, valued.log_probs)
    assert plain.completions == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_noise_every_completion_is_the_final_image_bit_for_bit(dtype):
    """So every gain is exactly 0; in the stored dtype too, because both round alike."""
    x0, cond, noise = start()
    levels = torch.full((10,), 1e-30, dtype=torch.float64)
    found = rollout(Field(), x0, cond, SD3_10, full_plan(10), "flow_sde", levels, noise, dtype, completions=CompletionPlan())
    for clean in found.completions:
        assert clean.dtype == dtype
        assert torch.equal(clean, found.final)


def test_noise_at_one_step_only_moves_the_completions_after_it():
    """With step 4 alone stochastic every gain but its own is 0: its completion is the ODE image of the same noise."""
    x0, cond, noise = start()
    found = rollout(Field(), x0, cond, SD3_10, window_plan(10, 4, 1), "cps", 0.7, noise, completions=CompletionPlan())
    deterministic = naive(Field(), x0, cond, 0)
    torch.testing.assert_close(found.completions[0], deterministic, atol=1e-6, rtol=1e-6)
    assert (found.final - deterministic).abs().max() > 0.05
    levels = torch.full((10,), 1e-30, dtype=torch.float64)
    levels[4] = 0.7
    full = rollout(Field(), x0, cond, SD3_10, full_plan(10), "flow_sde", levels, noise, completions=CompletionPlan())
    for k, clean in enumerate(full.completions):
        assert torch.equal(clean, full.completions[0] if k <= 4 else full.final)


def test_one_ode_step_is_the_clean_estimate():
    x0, cond, noise = start()
    found = rollout(Field(), x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan(1))
    for k, clean in enumerate(found.completions):
        x, t = found.states[k], SD3_10[k]
        torch.testing.assert_close(clean, x - t * Field()(x, t.expand(4), cond), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("start_at", "ode_steps", "remaining"),
    [
        (3, 2, [7, 3, 0]),
        (0, 3, [10, 6, 3, 0]),
        (0, 10, list(range(10, -1, -1))),
        (6, 10, [4, 3, 2, 1, 0]),
        (4, "all", [6, 5, 4, 3, 2, 1, 0]),
        (9, 1, [1, 0]),
    ],
)
def test_the_grid_of_a_completion(start_at, ode_steps, remaining):
    assert [10 - i for i in completion_indices(start_at, 10, ode_steps)] == remaining


@pytest.mark.parametrize(("start_at", "ode_steps"), [(10, 1), (-1, "all"), (0, 0)])
def test_impossible_completions_are_refused(start_at, ode_steps):
    with pytest.raises(ValueError):
        completion_indices(start_at, 10, ode_steps)


@pytest.mark.parametrize(("ode_steps", "evaluations"), [("all", 45), (1, 0), (2, 9)])
def test_evaluations_per_image_and_sequential_calls(ode_steps, evaluations):
    """T = 10: 10 for the rollout and T (T - 1) / 2 = 45 for the completions, in 10 calls; n steps: 9 (n - 1)."""
    x0, cond, noise = start()
    field = Field()
    found = rollout(field, x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan(ode_steps))
    assert (found.nfe, found.calls) == (4 * (10 + evaluations), 10)
    assert (field.rows, field.calls) == (found.nfe, found.calls)


def test_a_window_costs_only_what_its_own_states_need():
    """Three steps from 2 on: completions from 2, 3, 4 with their first step known: 7 + 6 + 5."""
    x0, cond, noise = start()
    found = rollout(Field(), x0, cond, SD3_10, window_plan(10, 2, 3), "cps", 0.7, noise, completions=CompletionPlan())
    assert found.nfe == 4 * (10 + 7 + 6 + 5)


def test_images_that_start_alike_share_the_completion_of_their_start():
    x0, _, noise = start(batch=6)
    groups = [7, 7, 3, 7, 3, 3]
    x0 = x0[torch.tensor([0, 0, 1, 0, 1, 1])]
    cond = Rows(torch.tensor([0.5, 0.5, -1.0, 0.5, -1.0, -1.0]))
    apart = rollout(Field(), x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan())
    shared = rollout(
        Field(), x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan(same_start=groups)
    )
    for a, b in zip(apart.completions, shared.completions, strict=True):
        assert torch.equal(a, b)
    assert apart.nfe - shared.nfe == 4 * 9  # four of six first completions saved, nine evaluations each


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_the_chunk_changes_nothing_but_the_size_of_a_call(chunk):
    x0, cond, noise = start()
    whole = rollout(Field(), x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan())
    sizes = []

    def watched(x, t, cond):
        sizes.append(len(x))
        return Field()(x, t, cond)

    split = rollout(
        watched, x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan(), chunk=chunk
    )
    assert max(sizes) <= chunk
    assert torch.equal(whole.final, split.final)
    for a, b in zip(whole.completions, split.completions, strict=True):
        assert torch.equal(a, b)


def test_completions_with_a_velocity_of_their_own_cannot_reuse_the_trajectorys():
    """Nine starts cost 10 + ... + 2 = 54 evaluations instead of 45, and the trajectory is untouched."""
    x0, cond, noise = start()
    live, other = Field(), Field(strength=0.5)
    found = rollout(
        live, x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise, completions=CompletionPlan(velocity=other)
    )
    plain = rollout(Field(), x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise)
    assert torch.equal(found.final, plain.final)
    assert (live.rows, other.rows) == (4 * 10, 4 * 54)
    for k, clean in enumerate(found.completions):
        torch.testing.assert_close(clean, naive(other, found.states[k], cond, k), atol=1e-6, rtol=1e-6)


def test_a_table_of_noise_levels_acts_step_by_step():
    x0, cond, noise = start()
    table = torch.linspace(0.9, 0.1, 10, dtype=torch.float64)
    found = rollout(Field(), x0, cond, SD3_10, full_plan(10), "cps", table, noise)
    for k in range(9):
        same = rollout(Field(), x0, cond, SD3_10, full_plan(10), "cps", float(table[k]), noise)
        assert torch.equal(found.states[k + 1], same.states[k + 1]) == (k == 0)


@pytest.mark.parametrize("settings", [{"ode_steps": 0}, {"ode_steps": 11}, {"chunk": 0}, {"guidance_scale": -1.0}])
def test_settings_that_cannot_work_are_named(settings):
    errors = CompletionConfig(**settings).validate(num_steps=10)
    assert len(errors) == 1
    assert next(iter(settings)) in errors[0]
    assert CompletionConfig().validate(10) == CompletionConfig(ode_steps=10, chunk=1).validate(10) == []


def test_the_sliding_window_moves_by_its_stride_and_starts_again():
    first = [sliding_window(10, 4, 0, 9, every=25, stride=1, iteration=i).stochastic[0] for i in range(0, 25 * 8, 25)]
    assert first == [0, 1, 2, 3, 4, 5, 0, 1]
    assert sliding_window(10, 4, 0, 9, 25, 1, 24) == sliding_window(10, 4, 0, 9, 25, 1, 0) == window_plan(10, 0, 4)
    by_two = [sliding_window(10, 4, 1, 9, every=1, stride=2, iteration=i).stochastic for i in range(4)]
    assert by_two == [(1, 2, 3, 4), (3, 4, 5, 6), (5, 6, 7, 8), (1, 2, 3, 4)]
    with pytest.raises(ValueError, match="window_range"):
        sliding_window(10, 4, 0, 10, 25, 1, 0)
