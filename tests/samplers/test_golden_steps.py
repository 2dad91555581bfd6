"""Golden steps: flow kernels on a shifted grid, and DDIM in the coordinates and on the schedule of Stable Diffusion."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from samplers.grids import linspace_shift_grid
from samplers.kernels import cps, ddim, flow_sde, log_prob, noise_interval
from samplers.vp import alpha_sigma, flow_time, time_table, vp_scale

# sigma, g, mean, std, sample and log-prob of flow_sde at steps of the 10-step grid of shift 3, with x = 1, v = -.5, z = .3
FLOW_SDE_TABLE = {
    0: (1.0, 3.7040518, 0.7728571, 0.7, 0.9828571, -0.6072636),
    4: (0.8181818, 1.4849242, 0.9505682, 0.3877382, 1.0668896, -0.0165136),
    8: (0.4285714, 0.6062178, 1.0345982, 0.2561738, 1.1114503, 0.3979607),
    9: (0.25, 0.4041452, 1.0739583, 0.2020726, 1.1345801, 0.6351897),
}


@pytest.mark.parametrize("k", list(FLOW_SDE_TABLE))
def test_golden_flow_sde_steps_of_a_shifted_grid(k):
    sigma, diffusion, mean, std, sample, score = FLOW_SDE_TABLE[k]
    grid = linspace_shift_grid(10, 3.0)
    x, v = torch.ones(1, 1), torch.full((1, 1), -0.5)
    step = flow_sde(x, v, grid[k : k + 1], grid[k + 1 : k + 2], 0.7)
    drawn = step.mean + 0.3 * step.std
    interval = noise_interval("flow_sde", grid[k], grid[k + 1])
    got = (grid[k], step.std / interval.sqrt(), step.mean, step.std, drawn, log_prob(drawn, step.mean, step.std))
    expected = (sigma, diffusion, mean, std, sample, score)
    assert [value.item() for value in got] == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_golden_cps_step_of_a_shifted_grid():
    grid, x, v = linspace_shift_grid(10, 3.0), torch.ones(1, 1), torch.full((1, 1), -0.5)
    step = cps(x, v, grid[4:5], grid[5:6], 0.7)
    assert (step.mean.item(), step.std.item()) == pytest.approx((0.6618117, 0.6682549), abs=1e-6)
    assert cps(x, v, grid[4:5], grid[5:6], 0.0).mean.item() == pytest.approx(1.0340909, abs=1e-6)


def stable_diffusion(steps=None):
    """The genuine scheduler of Stable Diffusion 1.x, whose last step ends at timestep 0, as DDPO clamps it."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip
    if steps:
        scheduler.set_timesteps(steps)
    return scheduler


def flow_times(dtype):
    """Flow time (1000,) of every timestep: from betas in float64, or as a run has them, from diffusers' float32 betas."""
    if dtype == torch.float32:
        return time_table(stable_diffusion().alphas)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return flow_time(torch.cumprod(1 - betas, 0))


def vp_step(t, t_next, eta, x=1.0, noise=0.5, z=0.3):
    """(clean estimate, mean, std, sample, log-prob) of `ddim` in VP coordinates, from a VP state and its noise estimate."""
    (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(t), alpha_sigma(t_next)
    clean, back = (x - sigma * noise) / alpha, alpha_next + sigma_next
    step = ddim((x * vp_scale(t)).view(-1, 1), (noise - clean).view(-1, 1), t, t_next, eta)
    drawn = step.mean + z * step.std.view(-1, 1)
    score = log_prob(drawn, step.mean, step.std, dtype=torch.float64) - back.log()
    columns = (clean, step.mean.view(-1) * back, step.std * back, drawn.view(-1) * back, score)
    return torch.stack([column.double() for column in columns], dim=1)


PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
DDIM_STD = {
    50: {(981, 961): 0.4544632724, (501, 481): 0.2947845403, (21, 1): 0.0394795461, (1, 0): 0.0206483202},
    20: {(951, 901): 0.6443910140, (501, 451): 0.4293211493, (51, 1): 0.0405967319, (1, 0): 0.0206483202},
}
# clean estimate, mean, std, sample and log-prob of (timestep, next one, eta), with x = 1, noise estimate .5, z = .3
DDIM_STEPS = {
    (501, 481, 1.0): (1.0950823731, 0.9928623707, 0.2947845403, 1.0812977327, 0.2575720282),
    (501, 481, 0.5): (1.0950823731, 1.0131818165, 0.1473922701, 1.0573994976, 0.9507192088),
    (1, 0, 1.0): (None, 0.9900705406, 0.0206483202, 0.9962650366, 2.9161827766),
}


@PRECISIONS
@pytest.mark.parametrize("steps", list(DDIM_STD))
def test_golden_ddim_std_of_stable_diffusion(steps, dtype, tolerance):
    table, visited = flow_times(dtype), stable_diffusion(steps).timesteps.tolist()
    for (timestep, after), std in DDIM_STD[steps].items():
        assert after == [*visited, 0][visited.index(timestep) + 1]
        got = vp_step(table[[timestep]], table[[after]], 1.0)
        assert got[0, 2].item() == pytest.approx(std, abs=tolerance)


@PRECISIONS
@pytest.mark.parametrize("case", list(DDIM_STEPS))
def test_golden_ddim_steps_of_stable_diffusion(case, dtype, tolerance):
    timestep, after, eta = case
    table = flow_times(dtype)
    got = vp_step(table[[timestep]], table[[after]], eta)[0].tolist()
    for value, expected in zip(got, DDIM_STEPS[case], strict=True):
        if expected is not None:
            assert value == pytest.approx(expected, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_takes_the_steps_of_the_diffusers_scheduler(eta):
    """In VP coordinates and from its own alphas, the last step included."""
    scheduler = stable_diffusion(20)
    timesteps = [*scheduler.timesteps.tolist(), 0]
    x, noise, z = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))
    theirs = [
        scheduler.step(noise[k], timestep, x[k], eta=eta, variance_noise=z[k]).prev_sample
        for k, timestep in enumerate(timesteps[:-1])
    ]
    times = flow_time(scheduler.alphas_cumprod)[timesteps].float()
    (alpha, sigma), n = alpha_sigma(times[:-1].view(-1, 1)), vp_scale(times)
    clean = (x - sigma * noise) / alpha
    step = ddim((x * n[:-1, None]).float(), (noise - clean).float(), times[:-1], times[1:], eta)
    ours = (step.mean + step.std.view(-1, 1) * z) / n[1:, None]
    # the clean estimate is up to 40 at the noisiest step, where one float32 rounding of alpha_bar moves it by 1e-5
    torch.testing.assert_close(ours.float(), torch.stack(theirs), atol=3e-5, rtol=1e-5)


def test_the_last_ddim_step_goes_from_timestep_1_to_0_with_noise():
    timesteps = stable_diffusion(50).timesteps
    assert timesteps[-1] == 1
    table = flow_times(torch.float64)
    *_, std, sample, score = vp_step(table[[1]], table[[0]], 1.0)[0].tolist()
    assert std == pytest.approx(0.0206483202, abs=1e-9)
    assert math.isfinite(sample)
    assert math.isfinite(score)
