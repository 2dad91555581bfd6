"""Rollouts and solvers on worlds whose exact velocity is known, and against diffusers' own samplers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from samplers.grids import linspace_shift_grid, make_grid, scheduler_grid
from samplers.kernels import log_prob
from samplers.noise import keyed_normal
from samplers.plans import Plan, full_plan, window_plan
from samplers.rollout import predict_transition, rollout, solve

STOCHASTIC = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.7}
SD3_10 = make_grid(
    "custom",
    10,
    custom=[1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0],
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_for(x, seed=0):
    return lambda k: normal(*x.shape, seed=1000 * (seed + 1) + k)


def spread(t, x):
    return t.view((-1,) + (1,) * (x.dim() - 1))


def gaussian_velocity(std=0.5, centre=1.0):
    """Exact velocity of data N(centre, std^2)."""

    def velocity(x, t, cond):
        t = spread(t, x)
        slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return -centre + slope * (x - (1 - t) * centre)

    return velocity


def curved_velocity(x, t, cond):
    """A smooth nonlinear field that uses the time, the condition and mixes latent dimensions."""
    return torch.tanh(x.roll(1, -1) + cond.view(spread(t, x).shape)) * (1 + spread(t, x)) - 0.3 * x


def curved_case(batch=5, shape=(3, 4)):
    x0 = normal(batch, *shape)
    return x0, torch.linspace(-1, 1, batch), noise_for(x0)


def test_rollout_without_noise_is_diffusers_own_sampler_bitwise():
    x0, cond, noise = curved_case()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    grid = scheduler_grid(scheduler, 10)
    scheduler.set_timesteps(10)
    x = x0
    for k, timestep in enumerate(scheduler.timesteps):
        v = curved_velocity(x, grid[k].expand(len(x)), cond)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    trajectory = rollout(curved_velocity, x0, cond, grid, Plan(10, ()), "ode", 0.0, noise)
    assert torch.equal(trajectory.final, x)
    assert torch.equal(solve(curved_velocity, x0, cond, grid), x)
    assert trajectory.log_probs.shape == (5, 0)


@pytest.mark.parametrize("kernel", list(STOCHASTIC))
@pytest.mark.parametrize("store_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [full_plan(10), window_plan(10, 3, 2)], ids=["full", "window"])
def test_scoring_the_stored_states_again_gives_exactly_the_same_log_probs(kernel, store_dtype, plan):
    x0, cond, noise = curved_case()
    trajectory = rollout(curved_velocity, x0, cond, SD3_10, plan, kernel, STOCHASTIC[kernel], noise, store_dtype)
    form = "mse" if kernel == "cps" else "gaussian"
    assert trajectory.log_probs.dtype == torch.float32
    for column, k in enumerate(plan.stochastic):
        x, x_next = trajectory.states[k], trajectory.states[k + 1]
        assert x.dtype == x_next.dtype == store_dtype
        t, t_next = SD3_10[k].expand(5), SD3_10[k + 1].expand(5)
        step, _ = predict_transition(curved_velocity, x, cond, t, t_next, kernel, STOCHASTIC[kernel])
        again = log_prob(x_next, step.mean, step.std, form)
        assert torch.equal(again, trajectory.log_probs[:, column])


def test_scoring_in_a_batch_of_mixed_steps_gives_the_same_log_probs():
    x0, cond, noise = curved_case()
    plan = full_plan(10)
    trajectory = rollout(curved_velocity, x0, cond, SD3_10, plan, "flow_sde", 0.7, noise)
    pairs = [(i, k) for k in plan.stochastic for i in range(5)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [pairs[j] for j in order]
    x = torch.stack([trajectory.states[k][i] for i, k in rows])
    x_next = torch.stack([trajectory.states[k + 1][i] for i, k in rows])
    steps = torch.tensor([k for _, k in rows])
    conds = torch.stack([cond[i] for i, _ in rows])
    step, _ = predict_transition(curved_velocity, x, conds, SD3_10[steps], SD3_10[steps + 1], "flow_sde", 0.7)
    again = log_prob(x_next, step.mean, step.std)
    old = torch.stack([trajectory.log_probs[i, k] for i, k in rows])
    torch.testing.assert_close(again, old, atol=1e-6, rtol=0)


def test_log_prob_at_the_rollout_is_minus_half_the_noise_squared_and_the_normaliser():
    x0, cond, noise = curved_case(batch=4, shape=(6, 6))
    trajectory = rollout(curved_velocity, x0, cond, SD3_10, full_plan(10), "flow_sde", 0.7, noise)
    stds = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254]
    for k, s in enumerate(stds):
        expected = -0.5 * noise(k).square().flatten(1).mean(1) - math.log(s) - 0.5 * math.log(2 * math.pi)
        # The stds are given to 5e-5, i.e. 2.3e-4 of the smallest one.
        torch.testing.assert_close(trajectory.log_probs[:, k], expected, atol=4e-4, rtol=0)


def test_states_are_kept_only_where_a_stochastic_step_starts_or_ends_and_at_the_end():
    x0, cond, noise = curved_case()
    trajectory = rollout(curved_velocity, x0, cond, SD3_10, window_plan(10, 3, 2), "cps", 0.7, noise)
    assert [k for k, x in enumerate(trajectory.states) if x is not None] == [3, 4, 5, 10]
    assert trajectory.log_probs.shape == (5, 2)
    assert (trajectory.nfe, trajectory.calls) == (5 * 10, 10)
    full = rollout(curved_velocity, x0, cond, SD3_10, full_plan(10), "cps", 0.7, noise)
    assert all(x is not None for x in full.states)
    assert torch.equal(full.states[0], x0)


def test_a_window_changes_nothing_before_it_and_is_ode_after_it():
    x0, cond, noise = curved_case()
    trajectory = rollout(curved_velocity, x0, cond, SD3_10, window_plan(10, 3, 2), "flow_sde", 0.7, noise)
    assert torch.equal(trajectory.states[3], ode_steps(x0, cond, 0, 3))
    assert torch.equal(trajectory.final, ode_steps(trajectory.states[5], cond, 5, 10))
    assert not torch.equal(trajectory.states[5], ode_steps(trajectory.states[3], cond, 3, 5))


def ode_steps(x, cond, start, stop):
    for k in range(start, stop):
        x = x - (SD3_10[k] - SD3_10[k + 1]) * curved_velocity(x, SD3_10[k].expand(len(x)), cond)
    return x


@pytest.mark.parametrize("kernel", list(STOCHASTIC))
def test_the_last_step_is_the_clean_estimate_whatever_the_kernel(kernel):
    x0, cond, noise = curved_case()
    trajectory = rollout(curved_velocity, x0, cond, SD3_10, full_plan(10), kernel, STOCHASTIC[kernel], noise)
    before = trajectory.states[9]
    clean = before - SD3_10[9] * curved_velocity(before, SD3_10[9].expand(5), cond)
    assert torch.equal(trajectory.final, clean)
    assert all(x.isfinite().all() for x in trajectory.states)
    assert trajectory.log_probs.isfinite().all()


def test_samples_do_not_depend_on_the_batch_they_are_made_in():
    names = {"seed": 0, "iteration": 4}
    x0 = keyed_normal((3, 4), **names, samples=range(6), step=0, stream=1)
    cond = torch.linspace(-1, 1, 6)

    def part(indices):
        def noise(k):
            return keyed_normal((3, 4), **names, samples=indices, step=k)

        return rollout(curved_velocity, x0[indices], cond[indices], SD3_10, full_plan(10), "flow_sde", 0.7, noise)

    whole, split = part(list(range(6))), [part([4, 1]), part([0]), part([5, 3, 2])]
    order = [4, 1, 0, 5, 3, 2]
    # The test's tanh may take another vector path for another batch size: 1 ulp, not bitwise.
    torch.testing.assert_close(torch.cat([p.final for p in split]), whole.final[order], atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.cat([p.log_probs for p in split]), whole.log_probs[order], atol=2e-6, rtol=0)


def test_the_network_sees_the_grid_times_in_float32_and_leaves_no_graph():
    seen = []
    weight = torch.ones((), requires_grad=True)

    def velocity(x, t, cond):
        seen.append(t)
        assert x.dtype == torch.float32
        return (weight * x).bfloat16()

    x0 = normal(2, 3)
    trajectory = rollout(velocity, x0, None, SD3_10, full_plan(10), "cps", 0.7, noise_for(x0), torch.bfloat16)
    assert torch.equal(torch.stack(seen), SD3_10[:-1].view(-1, 1).expand(10, 2))
    assert not trajectory.final.requires_grad
    assert not trajectory.log_probs.requires_grad


POINT_MASS_FLOW_SDE = [0.958658, 0.889092, 0.779695, 0.669075, 0.559354, 0.450762, 0.343458, 0.238084, 0.138095]


@pytest.mark.parametrize("kernel", ["cps", "flow_sde"])
def test_point_mass_noise_level_after_each_step(kernel):
    """Data on one point: CPS leaves exactly the noise the network expects; Flow-SDE leaves a known surplus."""
    n, grid, centre = 40_000, linspace_shift_grid(10, 1.0), 0.8
    x0 = normal(n, 1)
    trajectory = rollout(
        lambda x, t, cond: (x - centre) / spread(t, x), x0, None, grid, full_plan(10), kernel, 0.7, noise_for(x0)
    )
    expected = grid[1:10].tolist() if kernel == "cps" else POINT_MASS_FLOW_SDE
    for k, value in enumerate(expected):
        state = trajectory.states[k + 1]
        # A sample std scatters by std / sqrt(2 n); 4.5 of that, over 9 steps.
        assert state.std().item() == pytest.approx(value, rel=4.5 / math.sqrt(2 * n))
        assert state.mean().item() == pytest.approx((1 - grid[k + 1].item()) * centre, abs=4.5 * value / math.sqrt(n))
    torch.testing.assert_close(trajectory.final, torch.full((n, 1), centre), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("steps", "kernel", "expected"),
    [
        (10, "flow_sde", 0.47964),
        (10, "dance_sde", 0.44005),
        (10, "cps", 0.37025),
        (40, "flow_sde", 0.49737),
        (40, "dance_sde", 0.48449),
        (40, "cps", 0.40750),
    ],
)
def test_gaussian_toy_monte_carlo(steps, kernel, expected):
    """Final std on data N(1, 0.5^2); the numbers are those of test_kernels with the last step deterministic."""
    n = 60_000
    x0 = normal(n, 1)
    grid = linspace_shift_grid(steps, 1.0)
    trajectory = rollout(
        gaussian_velocity(), x0, None, grid, full_plan(steps), kernel, STOCHASTIC[kernel], noise_for(x0)
    )
    assert trajectory.final.std().item() == pytest.approx(expected, abs=3 / math.sqrt(2 * n))
    assert trajectory.final.mean().item() == pytest.approx(1.0, abs=5 * expected / math.sqrt(n))


def solver_error(solver, grid, std=0.5, centre=1.0):
    """Largest error at the grid's end on data N(centre, std^2), whose ODE keeps the quantile: (x - mean_t) / std_t."""
    start, end = grid[0].item(), grid[-1].item()

    def total_std(t):
        return math.hypot((1 - t) * std, t)

    x0 = torch.linspace(-2, 2, 9).view(-1, 1)
    exact = (1 - end) * centre + total_std(end) / total_std(start) * (x0 - (1 - start) * centre)
    return (solve(gaussian_velocity(std, centre), x0, None, grid, solver) - exact).abs().max().item()


def test_dpm2m_converges_with_second_order_and_euler_with_first():
    steps = (20, 40, 80, 160)
    orders = {}
    for solver in ("euler", "dpm2m"):
        errors = [solver_error(solver, torch.linspace(0.9, 0.1, n + 1)) for n in steps]
        orders[solver] = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert orders["euler"] == pytest.approx(1.0, abs=0.05)
    assert orders["dpm2m"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("steps", [10, 20, 40, 80])
def test_dpm2m_is_closer_than_euler_from_noise_to_data(steps):
    grid = linspace_shift_grid(steps, 1.0)
    assert solver_error("dpm2m", grid) < 0.2 * solver_error("euler", grid)


@pytest.mark.parametrize("grid", [SD3_10, linspace_shift_grid(12, 3.0)], ids=["sd3", "linspace"])
def test_dpm2m_is_diffusers_dpm_solver_plus_plus(grid):
    x0, cond, _ = curved_case()
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        euler_at_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(len(grid) - 1)
    # Its own grid starts just below 1; ours starts at 1, where the first two steps are of first order in both.
    scheduler.sigmas = grid.clone()
    x = x0
    for k, timestep in enumerate(scheduler.timesteps):
        v = curved_velocity(x, grid[k].expand(len(x)), cond)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    torch.testing.assert_close(solve(curved_velocity, x0, cond, grid, "dpm2m"), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_solvers_are_finite_on_the_shortest_grids(solver, steps):
    x0, cond, _ = curved_case()
    final = solve(curved_velocity, x0, cond, linspace_shift_grid(steps), solver)
    assert final.isfinite().all()
    if steps < 3:
        # First and last step are Euler: with up to two steps nothing else is left.
        assert torch.equal(final, solve(curved_velocity, x0, cond, linspace_shift_grid(steps), "euler"))


def test_what_does_not_fit_together_is_refused():
    x0, cond, noise = curved_case()

    def run(grid=SD3_10, steps=10, kernel="flow_sde", level=0.7, noise=noise):
        return rollout(curved_velocity, x0, cond, grid, full_plan(steps), kernel, level, noise)

    with pytest.raises(ValueError, match="kernel ode is deterministic"):
        run(kernel="ode")
    with pytest.raises(ValueError, match="unknown kernel 'dpm'"):
        run(kernel="dpm")
    with pytest.raises(ValueError, match="needs 10 times, got \\(11,\\)"):
        run(steps=9)
    with pytest.raises(ValueError, match="deterministic"):
        run(level=0.0)
    with pytest.raises(ValueError, match="noise must have the shape"):
        run(noise=lambda k: torch.zeros(5, 3))
    with pytest.raises(ValueError, match="unknown solver 'heun'"):
        solve(curved_velocity, x0, cond, SD3_10, "heun")
