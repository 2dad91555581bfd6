"""Variance-preserving models in flow coordinates: golden numbers, exact inverses, and DDIM as the Euler step."""

import pytest
import torch
from diffusers import DDIMScheduler

from samplers.kernels import ode
from samplers.vp import PREDICTIONS, alpha_sigma, flow_time, time_table, timestep_of, velocity_from, vp_grid, vp_scale

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULES = {
    "sd": SD,
    "zero terminal": SD | {"rescale_betas_zero_snr": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
# float64 cumulative products of Stable Diffusion's schedule
GOLDEN = {0: 0.99915, 1: 0.9982960278384514, 951: 0.0081550045674304, 981: 0.0057755001394957}


def table_of(schedule: str = "sd") -> torch.Tensor:
    return time_table(DDIMScheduler(**SCHEDULES[schedule]).alphas)


def test_the_table_of_stable_diffusion_has_the_published_numbers():
    alpha, _ = alpha_sigma(table_of())
    for timestep, alpha_bar in GOLDEN.items():
        assert float(alpha[timestep] ** 2) == pytest.approx(alpha_bar, abs=1e-6, rel=1e-5)


def test_flow_time_and_signal_levels_are_inverses():
    alpha_bar = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = flow_time(alpha_bar)
    alpha, sigma = alpha_sigma(t)
    assert (t[0], t[-1]) == (1, 0)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=0, atol=1e-15)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(vp_scale(t) * (alpha + sigma), torch.ones_like(t), rtol=0, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_training_timestep_is_found_exactly(schedule):
    table = table_of(schedule)
    assert table.dtype == torch.float32
    assert bool((table[1:] > table[:-1]).all())
    assert torch.equal(timestep_of(table, table), torch.arange(1000.0))
    middle = (table[:-1].double() + table[1:].double()) / 2
    torch.testing.assert_close(timestep_of(middle, table), torch.arange(999) + 0.5, rtol=0, atol=1e-4)
    assert timestep_of(torch.tensor([0.0, 1.0]), table).tolist() == [0, 999]


def test_a_grid_of_fifty_steps_goes_from_timestep_981_over_1_to_0():
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(50)
    table = table_of()
    grid = vp_grid(scheduler.timesteps.tolist(), table, float(table[0]))
    assert timestep_of(grid, table).tolist() == [*range(981, 0, -20), 0]
    assert grid.dtype == torch.float32
    assert float(grid[-1]) == pytest.approx(0.0283409, abs=1e-7)


@pytest.mark.parametrize("timesteps", [[1000, 500], [500, -1], [0], [3, 3], [1, 2]])
def test_timesteps_that_make_no_grid(timesteps):
    table = table_of()
    with pytest.raises(ValueError):
        vp_grid(timesteps, table, float(table[0]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_gives_noise_minus_data(prediction):
    data, noise = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    # pure noise leaves a prediction of the noise without information; the others are finite there
    t = torch.tensor([0.03, 0.3, 0.6, 0.94, 0.96 if prediction == "epsilon" else 1.0])
    weight = t.view(-1, 1, 1, 1)
    alpha, sigma = (level.float().view(-1, 1, 1, 1) for level in alpha_sigma(t))
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * data, "sample": data}[prediction]
    v = velocity_from(output, (1 - weight) * data + weight * noise, t, prediction)
    torch.testing.assert_close(v, noise - data, rtol=0, atol=2e-5)


def test_an_unknown_prediction_type_names_the_known_ones():
    with pytest.raises(ValueError, match="'flow'; choose one of epsilon, v_prediction, sample"):
        velocity_from(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), "flow")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_ddim_step_without_noise_is_an_euler_step(prediction):
    scheduler = DDIMScheduler(**SD, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(50)
    x_vp, output, table = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), table_of()
    for now, then in ((981, 961), (501, 481), (21, 1)):
        t, t_next = table[[now]], table[[then]]
        x = x_vp * vp_scale(t).float()
        stepped = ode(x, velocity_from(output, x, t, prediction), t, t_next).mean / vp_scale(t_next).float()
        torch.testing.assert_close(stepped, scheduler.step(output, now, x_vp).prev_sample, rtol=1e-5, atol=2e-5)
