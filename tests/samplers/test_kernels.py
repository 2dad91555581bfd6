"""Kernels, log-probs and KL: golden numbers, identities, edge cases. Formulas are written out again in float64 here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers.grids import linspace_shift_grid
from samplers.kernels import (
    KERNELS,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    log_prob,
    noise_interval,
    ode,
    transition_kl,
    velocity_mse,
)

NOISE = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "psi_sde": 0.3, "cps": 0.7, "ddim": 0.7}
STOCHASTIC = ("flow_sde", "dance_sde", "cps")
SD3_10 = torch.tensor(
    [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0.0]
)
FLUX_6 = torch.tensor([1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(value, batch=1):
    return torch.full((batch,), value, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kernel", "mean", "std"),
    [
        ("ode", 1.075, 0.0),
        ("flow_sde", 1.0015, 0.3320392),
        ("dance_sde", 1.066, 0.1161895),
        ("cps", 0.8784366, 0.4009529),
    ],
)
def test_scalar_example(kernel, mean, std):
    x, v = torch.ones(1, 1), torch.full((1, 1), -0.5)
    step = KERNELS[kernel](x, v, times(0.6), times(0.45), NOISE[kernel])
    assert step.mean.item() == pytest.approx(mean, abs=1e-6)
    assert step.std.item() == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_without_noise_cps_is_the_euler_step_bitwise_and_ddim_is_it_to_rounding(steps):
    for grid in (linspace_shift_grid(steps, 3.0), linspace_shift_grid(steps, 1.0)):
        x, v = normal(steps, 4, 8, 8), normal(steps, 4, 8, 8, seed=1)
        euler = ode(x, v, grid[:-1], grid[1:]).mean
        assert torch.equal(cps(x, v, grid[:-1], grid[1:], 0.0).mean, euler)
        torch.testing.assert_close(ddim(x, v, grid[:-1], grid[1:], 0.0).mean, euler, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", [*STOCHASTIC, "ddim"])
def test_a_step_without_noise_has_no_log_prob(kernel):
    x = torch.ones(1, 4)
    step = KERNELS[kernel](x, x, times(0.6), times(0.45), 0.0)
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(x, step.mean, step.std)


@settings(max_examples=60, deadline=None)
@given(t=st.floats(0.0625, 1.0, width=32), part=st.floats(0.0, 0.95), seed=st.integers(0, 2**31))
def test_without_noise_every_kernel_is_the_euler_step(t, part, seed):
    x, v = normal(1, 16, seed=seed), normal(1, 16, seed=seed + 1)
    start, end = times(t), times(t * part)
    euler = x - (start - end) * v
    for kernel in KERNELS.values():
        step = kernel(x, v, start, end, 0.0)
        # |x|, |v| < 6 here: a few float32 roundings of numbers below 8 stay under 1e-6 each.
        torch.testing.assert_close(step.mean, euler, atol=1e-6, rtol=1e-6)
        assert step.std.item() == 0


def test_ode_is_bitwise_x_minus_h_v():
    x, v = normal(10, 4, 8, 8), normal(10, 4, 8, 8, seed=1)
    h = (SD3_10[:-1] - SD3_10[1:]).view(-1, 1, 1, 1)
    assert torch.equal(ode(x, v, SD3_10[:-1], SD3_10[1:]).mean, x - h * v)


def test_flow_sde_equals_its_compact_form_below_one():
    x, v, a = normal(9, 32), normal(9, 32, seed=1), 0.7
    t, t_next = SD3_10[1:-1].double().view(-1, 1), SD3_10[2:].double().view(-1, 1)
    h = t - t_next
    compact = x.double() * (1 - a**2 * h / (2 * (1 - t))) - v.double() * h * (1 + a**2 / 2)
    step = flow_sde(x, v, SD3_10[1:-1], SD3_10[2:], a)
    torch.testing.assert_close(step.mean.double(), compact, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(step.std.double(), (a * (t / (1 - t) * h).sqrt()).view(-1), atol=1e-7, rtol=1e-6)


def test_dance_sde_equals_euler_plus_half_eta_squared_score():
    x, v, eta = normal(9, 32), normal(9, 32, seed=1), 0.3
    t, t_next = SD3_10[:-2].double().view(-1, 1), SD3_10[1:-1].double().view(-1, 1)
    h, x64, v64 = t - t_next, x.double(), v.double()
    clean = x64 - t * v64
    score = -(x64 - clean * (1 - t)) / t**2
    step = dance_sde(x, v, SD3_10[:-2], SD3_10[1:-1], eta)
    torch.testing.assert_close(step.mean.double(), x64 - h * v64 + 0.5 * eta**2 * score * h, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(step.std.double(), (eta * h.sqrt()).view(-1), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("grid", [SD3_10, FLUX_6, linspace_shift_grid(10, 1.0), linspace_shift_grid(37, 3.0)])
@pytest.mark.parametrize("a", [0.3, 0.7, 1.5])
def test_first_flow_sde_step_has_std_a_and_keeps_one_minus_half_a_squared(grid, a):
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    on_x = flow_sde(one, zero, grid[:1], grid[1:2], a)
    on_v = flow_sde(zero, one, grid[:1], grid[1:2], a)
    assert on_x.std.item() == pytest.approx(a, rel=1e-6)
    assert on_x.mean.item() == pytest.approx(1 - a**2 / 2, abs=1e-6)
    assert on_v.mean.item() == pytest.approx(-(1 - grid[1].item()), abs=1e-6)


def test_flow_sde_is_special_at_exactly_one_only():
    almost = torch.nextafter(times(1.0), times(0.0))
    x = torch.ones(1, 1)
    assert flow_sde(x, x, times(1.0), times(0.96), 0.7).std.item() == pytest.approx(0.7, rel=1e-6)
    gap = 1 - almost.double().item()
    expected = 0.7 * math.sqrt((almost.double().item() / gap) * (0.04 - gap))
    assert flow_sde(x, x, almost, times(0.96), 0.7).std.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_times_are_refused():
    # 0.9996 rounds to 1 in bfloat16: the t = 1 branch of flow_sde must not be taken for it.
    x, t = torch.ones(1, 1), torch.tensor([0.9996]).bfloat16()
    assert t.item() == 1
    with pytest.raises(ValueError, match="float32"):
        flow_sde(x, x, t, times(0.9), 0.7)


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("grid", [SD3_10, FLUX_6, torch.tensor([1.0, 0.0])])
def test_first_and_last_step_are_finite_with_finite_gradient(kernel, grid):
    x, v = normal(2, 8), normal(2, 8, seed=1).requires_grad_()
    t, t_next = grid[[0, -2]], grid[[1, -1]]
    step = KERNELS[kernel](x, v, t, t_next, NOISE[kernel])
    assert step.mean.isfinite().all()
    assert step.std.isfinite().all()
    (gradient,) = torch.autograd.grad(step.mean.sum(), v)
    assert gradient.isfinite().all()


def test_last_cps_step_is_the_clean_estimate():
    x, v = normal(1, 8), normal(1, 8, seed=1)
    step = cps(x, v, times(0.25), times(0.0), 0.7)
    torch.testing.assert_close(step.mean, x - 0.25 * v, atol=1e-6, rtol=0)
    assert step.std.item() == 0


def test_noise_levels_of_cps_and_ddim_are_bounded():
    x, v = normal(1, 8), normal(1, 8, seed=1)
    fully_renewed = cps(x, v, times(0.6), times(0.45), 1.0)
    torch.testing.assert_close(fully_renewed.mean, 0.55 * (x - 0.6 * v), atol=1e-6, rtol=0)
    assert fully_renewed.std.item() == pytest.approx(0.45, rel=1e-6)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1\.01"):
        cps(x, v, times(0.6), times(0.45), 1.01)
    with pytest.raises(ValueError, match=r"ddim: .*\[0, 1\], got 1\.01"):
        ddim(x, v, times(0.6), times(0.45), 1.01)
    flow_sde(x, v, times(0.6), times(0.45), 1.5)


@pytest.mark.parametrize("level", [-0.1, math.nan])
@pytest.mark.parametrize("kernel", [*STOCHASTIC, "ddim"])
def test_noise_levels_below_zero_are_refused(kernel, level):
    x = torch.ones(1, 1)
    with pytest.raises(ValueError, match="noise_level"):
        KERNELS[kernel](x, x, times(0.6), times(0.45), level)


def test_wrong_shapes_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shape of the latents \(2, 3\)"):
        ode(x, torch.ones(2, 1), times(0.6, 2), times(0.4, 2))
    with pytest.raises(ValueError, match=r"times must have shape \(2,\)"):
        ode(x, x, times(0.6), times(0.4))


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 8, 8)], ids=["flat", "packed", "image"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_batch_of_mixed_times_equals_its_elements_alone_bitwise(kernel, shape):
    x, v = normal(10, *shape), normal(10, *shape, seed=1)
    t, t_next = SD3_10[:-1], SD3_10[1:]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    mixed = KERNELS[kernel](x[order], v[order], t[order], t_next[order], NOISE[kernel])
    for row, k in enumerate(order.tolist()):
        same_time = [tensor[k].expand(6, *tensor.shape[1:]) for tensor in (x, v, t, t_next)]
        alone = KERNELS[kernel](*same_time, NOISE[kernel])
        assert torch.equal(mixed.mean[row], alone.mean[0])
        assert torch.equal(mixed.std[row], alone.std[0])


@pytest.mark.parametrize("form", ["gaussian", "mse"])
@pytest.mark.parametrize("shape", [(7,), (1000,), (4, 64, 64)], ids=["7", "1000", "16384"])
def test_log_prob_does_not_depend_on_the_batch_or_the_order_of_dimensions_bitwise(shape, form):
    sample, mean = normal(9, *shape), normal(9, *shape, seed=1)
    std = torch.tensor([0.7, 0.743, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.282, 0.0063])
    together = log_prob(sample, mean, std, form)
    for i in range(9):
        assert torch.equal(log_prob(sample[i : i + 1], mean[i : i + 1], std[i : i + 1], form)[0], together[i])
    order = torch.randperm(sample[0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = [tensor.flatten(1)[:, order] for tensor in (sample, mean)]
    assert torch.equal(log_prob(*shuffled, std, form), together)


@pytest.mark.parametrize("kernel", [*STOCHASTIC, "ddim"])
def test_noise_level_may_differ_per_element(kernel):
    x, v = normal(3, 8), normal(3, 8, seed=1)
    levels = torch.tensor([0.1, 0.5, 0.9])
    mixed = KERNELS[kernel](x, v, SD3_10[2:5], SD3_10[3:6], levels)
    for i in range(3):
        alone = KERNELS[kernel](x[i : i + 1], v[i : i + 1], SD3_10[2 + i : 3 + i], SD3_10[3 + i : 4 + i], levels[i])
        torch.testing.assert_close(mixed.mean[i], alone.mean[0], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(mixed.std[i], alone.std[0], atol=0, rtol=1e-6)


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_half_precision_inputs_are_computed_in_float32(kernel):
    x, v = normal(2, 64).bfloat16(), normal(2, 64, seed=1).bfloat16()
    t, t_next = SD3_10[2:4], SD3_10[3:5]
    half = KERNELS[kernel](x, v, t, t_next, NOISE[kernel])
    assert half.mean.dtype == half.std.dtype == torch.float32
    assert torch.equal(half.mean, KERNELS[kernel](x.float(), v.float(), t, t_next, NOISE[kernel]).mean)


def gaussian_toy_std(kernel, noise_level, grid, std=0.5, centre=1.0):
    """Final std of the chain on data N(centre, std^2) with the exact velocity, by propagating the variance.

    The velocity is linear in x, so each step is x -> A x + B + s z; A is read off the kernel, all steps in one batch.
    """
    t, t_next = grid[:-1], grid[1:]
    t64 = t.double().view(-1, 1)
    slope = (t64 - (1 - t64) * std**2) / ((1 - t64) ** 2 * std**2 + t64**2)

    def mean_at(value):
        x = torch.full((len(t), 1), value)
        v = -centre + slope * (x - (1 - t64) * centre)
        return KERNELS[kernel](x, v, t, t_next, noise_level)

    gain = (mean_at(1.0).mean - mean_at(0.0).mean).double().view(-1)
    variance = 1.0
    for a, s in zip(gain.tolist(), mean_at(0.0).std.double().tolist(), strict=True):
        variance = a * a * variance + s * s
    return math.sqrt(variance)


TOY_TABLE = {
    10: {"ode": 0.43078, "flow_sde": 0.47954, "dance_sde": 0.44156, "cps": 0.37025},
    40: {"ode": 0.48181, "flow_sde": 0.49736, "dance_sde": 0.48458, "cps": 0.40750},
    1000: {"ode": 0.49926, "flow_sde": 0.50092, "dance_sde": 0.49937, "cps": 0.42451},
    10000: {"ode": 0.49993, "flow_sde": 0.50037, "dance_sde": 0.49994, "cps": 0.42595},
}


@pytest.mark.parametrize("kernel", ["ode", *STOCHASTIC])
@pytest.mark.parametrize("steps", list(TOY_TABLE))
def test_gaussian_toy_has_the_known_final_std(kernel, steps):
    # The coefficients are float32: up to 10,000 roundings of 6e-8 each, in one direction at worst 6e-4, at random 6e-6.
    got = gaussian_toy_std(kernel, NOISE[kernel], linspace_shift_grid(steps, 1.0))
    assert got == pytest.approx(TOY_TABLE[steps][kernel], abs=2e-5)


def test_gaussian_toy_on_the_sd3_grid():
    expected = {"ode": 0.35916, "flow_sde": 0.42102, "dance_sde": 0.37693, "cps": 0.31979}
    for kernel, value in expected.items():
        assert gaussian_toy_std(kernel, NOISE[kernel], SD3_10) == pytest.approx(value, abs=2e-5)


def test_sde_kernels_preserve_the_marginal_in_the_limit_and_cps_does_not():
    grid = linspace_shift_grid(10000, 1.0)
    assert abs(gaussian_toy_std("flow_sde", 0.7, grid) - 0.5) < 5e-4
    assert abs(gaussian_toy_std("dance_sde", 0.3, grid) - 0.5) < 5e-4
    assert abs(gaussian_toy_std("cps", 0.7, grid) - 0.5) > 0.07


@pytest.mark.parametrize("form", ["gaussian", "mse"])
def test_log_prob_is_the_mean_log_density(form):
    sample, mean, std = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1), torch.tensor([0.05, 0.4, 2.0])
    got = log_prob(sample, mean, std, form)
    assert got.shape == (3,)
    assert got.dtype == torch.float32
    if form == "gaussian":
        density = torch.distributions.Normal(mean.double(), std.double().view(-1, 1, 1, 1)).log_prob(sample.double())
    else:
        density = -((sample.double() - mean.double()) ** 2)
    torch.testing.assert_close(got.double(), density.flatten(1).mean(1), atol=0, rtol=1e-6)


def test_mse_form_is_the_gaussian_one_times_twice_the_variance_up_to_a_constant():
    sample, other, mean = normal(2, 50), normal(2, 50, seed=1), normal(2, 50, seed=2)
    std = torch.tensor([0.3, 0.9])
    gaussian = log_prob(sample, mean, std) - log_prob(other, mean, std)
    mse = log_prob(sample, mean, std, "mse") - log_prob(other, mean, std, "mse")
    torch.testing.assert_close(2 * std**2 * gaussian, mse, atol=2e-6, rtol=1e-5)


def test_on_policy_log_prob_has_the_known_mean_and_spread():
    batch, dims, s = 4000, 128, 0.3320392
    mean = normal(batch, dims)
    scores = log_prob(mean + s * normal(batch, dims, seed=1), mean, torch.full((batch,), s))
    spread = 1 / math.sqrt(2 * dims)
    # Means of 4000 draws scatter by spread / sqrt(4000), their std by spread / sqrt(8000); 4 of these is the tolerance.
    assert scores.mean().item() == pytest.approx(-0.316436, abs=4 * spread / math.sqrt(batch))
    assert scores.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * batch))


@pytest.mark.parametrize("kernel", ["ddim", "flow_sde", "cps"])
def test_on_policy_log_probs_of_a_step_have_the_mean_of_a_gaussian(kernel):
    """-1/2 - log std - log(2 pi) / 2, within 3 standard errors over 100,000 elements."""
    elements = 100_000
    x, v = normal(1, elements), normal(1, elements, seed=1)
    step = KERNELS[kernel](x, v, times(0.6), times(0.45), NOISE[kernel])
    drawn = step.mean + step.std * normal(1, elements, seed=2)
    expected = -0.5 - math.log(step.std.item()) - 0.5 * math.log(2 * math.pi)
    # an element's -z^2 / 2 scatters by 1 / sqrt(2)
    assert log_prob(drawn, step.mean, step.std).item() == pytest.approx(expected, abs=3 / math.sqrt(2 * elements))


def test_a_shift_of_the_mean_lowers_the_log_prob_by_half_its_square_over_the_variance():
    """E[new - old] = -delta^2 / (2 std^2), -5.56e-6 here; the noise comes with both signs, so that its own term cancels."""
    std, delta = torch.tensor([0.3]), 1e-3
    z = normal(1, 50_000)
    mean = torch.zeros(1, 100_000)
    sample = std * torch.cat([z, -z], dim=1)
    old, new = (log_prob(sample, m, std, dtype=torch.float64) for m in (mean, mean + delta))
    assert (new - old).item() == pytest.approx(-(delta**2) / (2 * 0.3**2), rel=1e-3)
    assert (new - old).item() == pytest.approx(-5.56e-6, abs=1e-8)


def test_log_prob_gradient_reaches_the_mean():
    sample, mean, std = normal(2, 10), normal(2, 10, seed=1).requires_grad_(), torch.tensor([0.3, 0.7])
    (gradient,) = torch.autograd.grad(log_prob(sample, mean, std).sum(), mean)
    expected = (sample - mean.detach()) / std.view(-1, 1) ** 2 / 10
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", ["gaussian", "mse"])
def test_no_log_prob_or_kl_of_a_deterministic_step(form):
    x = torch.ones(2, 3)
    step = ode(x, x, times(0.6, 2), times(0.4, 2))
    with pytest.raises(ValueError, match="deterministic"):
        log_prob(x, step.mean, step.std, form)
    with pytest.raises(ValueError, match="deterministic"):
        transition_kl(x, step.mean, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="unknown log-prob form"):
        log_prob(x, x, torch.ones(2), "laplace")


def storage_error(s, score_before_rounding, draws=60, dims=65536):
    """Log-ratios, before any update, of bfloat16 states whose old log-prob was taken before or after rounding."""
    ratios = []
    for seed in range(draws):
        target = normal(1, dims, seed=2 * seed)
        z = normal(1, dims, seed=2 * seed + 1)
        mean = target - s * z if s > 0.1 else target
        drawn = mean + s * z
        stored, std = drawn.bfloat16(), torch.tensor([s])
        scored = drawn if score_before_rounding else stored
        ratios.append(log_prob(stored, mean, std) - log_prob(scored, mean, std))
    return torch.cat(ratios).double()


def test_scoring_before_rounding_biases_the_ratio_and_after_it_does_not():
    wide = storage_error(0.319, score_before_rounding=True)
    # 60 draws with spread 2e-5: their mean is known to 2.6e-6, their std to 2e-6 (one sigma).
    assert wide.mean().item() == pytest.approx(-1.3e-5, abs=1e-5)
    assert wide.std().item() == pytest.approx(2.0e-5, abs=7e-6)
    narrow = storage_error(0.0063, score_before_rounding=True, draws=8)
    assert narrow.mean().item() == pytest.approx(-3.5e-2, abs=3e-3)
    assert (storage_error(0.319, score_before_rounding=False, draws=8) == 0).all()


def test_kl_scalar_example():
    x = torch.ones(1, 1)
    t, t_next = times(0.6), times(0.45)
    step = flow_sde(x, torch.full((1, 1), -0.5), t, t_next, 0.7)
    reference = flow_sde(x, torch.full((1, 1), -0.4), t, t_next, 0.7)
    assert transition_kl(step.mean, reference.mean, step.std).item() == pytest.approx(0.00158166, abs=1e-8)
    code = transition_kl(step.mean, reference.mean, step.std, "flow_grpo_code", noise_interval("flow_sde", t, t_next))
    assert code.item() == pytest.approx(0.00023725, abs=1e-8)


@pytest.mark.parametrize(("kernel", "a"), [("flow_sde", 0.7), ("dance_sde", 0.3)])
def test_kl_equals_its_velocity_form_and_the_code_form_is_h_over_d_times_it(kernel, a):
    dims = 48
    x, v, v_ref = (normal(9, dims, seed=s) for s in range(3))
    t, t_next = SD3_10[:-2], SD3_10[1:-1]
    step, reference = (KERNELS[kernel](x, u, t, t_next, a) for u in (v, v_ref))
    t64, h = t.double(), (t - t_next).double()
    gap = torch.where(t64 == 1, h, 1 - t64)
    sigma = a * (t64 / gap).sqrt() if kernel == "flow_sde" else torch.full_like(t64, a)
    distance = (v - v_ref).double().square().sum(1)
    exact = h / 2 * (sigma * (1 - t64) / (2 * t64) + 1 / sigma) ** 2 * distance

    exact_mean = transition_kl(step.mean, reference.mean, step.std).double()
    # The two means differ by less than they are: cancellation leaves a few 1e-7 of |mean| in each difference.
    torch.testing.assert_close(exact_mean * dims, exact, atol=0, rtol=2e-6)
    interval = noise_interval(kernel, t, t_next)
    code = transition_kl(step.mean, reference.mean, step.std, "flow_grpo_code", interval).double()
    torch.testing.assert_close(code, exact * h / dims, atol=0, rtol=2e-6)
    torch.testing.assert_close(velocity_mse(v, v_ref).double(), distance / dims, atol=0, rtol=1e-6)


def test_cps_code_form_divides_by_the_variance_itself():
    x, v, v_ref = (normal(4, 16, seed=s) for s in range(3))
    t, t_next = SD3_10[1:5], SD3_10[2:6]
    step, reference = cps(x, v, t, t_next, 0.7), cps(x, v_ref, t, t_next, 0.7)
    change = -t * (1 - t_next) + (1 - t) * t_next * math.cos(0.35 * math.pi)
    expected = (change.view(-1, 1) * (v - v_ref)).square().mean(1) / (2 * step.std**2)
    code = transition_kl(step.mean, reference.mean, step.std, "flow_grpo_code", noise_interval("cps", t, t_next))
    torch.testing.assert_close(code, expected, atol=0, rtol=1e-4)


def test_kl_of_a_step_to_itself_is_zero_and_bad_forms_are_refused():
    x, std = normal(2, 5), torch.ones(2)
    assert (transition_kl(x, x, std) == 0).all()
    with pytest.raises(ValueError, match="needs h"):
        transition_kl(x, x, std, "flow_grpo_code")
    with pytest.raises(ValueError, match="velocity_mse"):
        transition_kl(x, x, std, "exact")
