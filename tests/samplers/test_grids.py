"""Time grids: published numbers, agreement with diffusers, and refusals."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from samplers.grids import flux_mu, linspace_shift_grid, make_grid, scheduler_grid, static_shift
from samplers.kernels import flow_sde

SD3_10 = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
DANCE_10 = [1, 0.964286, 0.923077, 0.875, 0.818182, 0.75, 0.666667, 0.5625, 0.428571, 0.25, 0]
FLUX_6 = [1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0]


def test_static_shift_keeps_the_ends_and_inverts_with_the_inverse_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = static_shift(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert bool((shifted[1:-1] > t[1:-1]).all())
    torch.testing.assert_close(static_shift(shifted, 1 / 3), t, atol=1e-15, rtol=0)


def test_linspace_shift_grid_has_the_published_numbers():
    grid = linspace_shift_grid(10)
    assert grid.dtype == torch.float32
    assert grid.shape == (11,)
    torch.testing.assert_close(grid, torch.tensor(DANCE_10), atol=1e-6, rtol=0)
    torch.testing.assert_close(linspace_shift_grid(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]), atol=0, rtol=0)


def test_scheduler_grid_of_sd3_has_the_published_numbers_and_leaves_the_scheduler_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    grid = scheduler_grid(scheduler, 10)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    torch.testing.assert_close(grid, torch.tensor(SD3_10), atol=1e-6, rtol=0)
    assert torch.equal(scheduler.sigmas, before)


def test_scheduler_grid_of_flux_has_the_published_numbers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    assert flux_mu(1024) == pytest.approx(0.63, abs=1e-12)
    grid = scheduler_grid(scheduler, 6, mu=flux_mu(1024))
    torch.testing.assert_close(grid, torch.tensor(FLUX_6), atol=1e-6, rtol=0)


def test_flux_mu_meets_its_two_defining_points():
    assert flux_mu(256) == pytest.approx(0.5, abs=1e-12)
    assert flux_mu(4096) == pytest.approx(1.15, abs=1e-12)


def test_uniform_base_follows_the_pipelines_that_pass_their_own_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    uniform = scheduler_grid(scheduler, 4, uniform_base=True)
    torch.testing.assert_close(uniform, torch.tensor([1, 0.75, 0.5, 0.25, 0]), atol=1e-7, rtol=0)
    own = scheduler_grid(scheduler, 4)
    assert own[3] == pytest.approx(0.001, abs=1e-6)


def test_flow_sde_stds_on_the_sd3_grid_are_the_published_ones():
    grid = scheduler_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)
    x = torch.zeros(10, 1)
    std = flow_sde(x, x, grid[:-1], grid[1:], 0.7).std
    expected = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
    torch.testing.assert_close(std, torch.tensor(expected), atol=5e-5, rtol=0)


def test_make_grid_reaches_every_kind():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(make_grid("scheduler", 10, scheduler=scheduler), scheduler_grid(scheduler, 10))
    assert torch.equal(make_grid("linspace_shift", 10, shift=2.0), linspace_shift_grid(10, 2.0))
    assert torch.equal(make_grid("custom", 2, custom=[1, 0.5, 0]), torch.tensor([1, 0.5, 0]))


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ([1, 0.5, 0.1], "does not end in 0"),
        ([1, 1, 0], "a step of length 0"),
        ([1.5, 0.5, 0], "starts above 1"),
        ([1, math.nan, 0], "not a number"),
        ([1, 1 - 1e-12, 0], "falls in float64, not in float32"),
    ],
)
def test_custom_grids_that_cannot_be_sampled_are_refused(times, why):
    with pytest.raises(ValueError, match="fall strictly"):
        make_grid("custom", 2, custom=times)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"num_steps \+ 1 = 4 times.*got 3"):
        make_grid("custom", 3, custom=[1, 0.5, 0])
    with pytest.raises(ValueError, match="pass scheduler="):
        make_grid("scheduler", 3)
    with pytest.raises(ValueError, match="choose one of scheduler, linspace_shift, custom"):
        make_grid("karras", 3)
    with pytest.raises(ValueError, match="pass mu"):
        scheduler_grid(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 6)
    with pytest.raises(ValueError, match="DDIMScheduler has no sigma table"):
        scheduler_grid(DDIMScheduler(), 6)
    with pytest.raises(ValueError, match="at least 1"):
        linspace_shift_grid(0)
    with pytest.raises(ValueError, match="shift must be positive"):
        linspace_shift_grid(4, 0.0)
