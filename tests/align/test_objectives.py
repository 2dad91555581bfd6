import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.objectives import (
    KlForm,
    ObjectiveConfig,
    clipped_ratio_loss,
    draw_times,
    forward_process_loss,
    guard_log_ratio,
    noised_state,
    old_policy_decay,
    optimality_probability,
)
from samplers.kernels import KL_FORMS, cps, dance_sde, flow_sde, log_prob, transition_kl

NFT = ObjectiveConfig(type="forward_process", ref_coef=0.0)
PLAIN = replace(NFT, loss_space="v")
SPACES = pytest.mark.parametrize("config", [NFT, PLAIN], ids=["x0_adaptive", "v"])
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=30, deadline=None)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# One sample with latents of size 2: x_t = (.58, .28) and v = (-.7, 1.3).
X0, NOISE, T = double([1.0, -0.5]), double([0.3, 0.8]), double(0.6)
V_OLD, V_THETA = double([-0.5, 1.0]), double([-0.4, 0.9])
TARGET = NOISE - X0


def advantage(r, config=NFT):
    """The advantage whose optimality probability is r."""
    return double((2 * r - 1) * config.adv_max)


def loss_and_grad(config, r, v_theta=V_THETA, v_old=V_OLD, x0=X0, noise=NOISE, t=T, v_ref=None):
    v_theta = v_theta.clone().requires_grad_()
    loss, diagnostics = forward_process_loss(v_theta, v_old, x0, noise, t, advantage(r, config), config, v_ref)
    (grad,) = torch.autograd.grad(loss.sum(), v_theta)
    return loss.detach(), grad, diagnostics


def random_case(seed, dims=6):
    """x0, noise, v_old, v_theta (1, dims), t (1,) in [.05, 1] and r in [.02, .98]."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(1, dims, generator=g, dtype=torch.float64) for _ in range(4)]
    t, r = torch.rand(2, generator=g, dtype=torch.float64).tolist()
    return *tensors, double(0.05 + 0.95 * t), 0.02 + 0.96 * r


class TestForwardProcess:
    @pytest.mark.parametrize(
        ("beta", "r", "plain", "plain_grad", "adaptive", "adaptive_grad"),
        [
            (1.0, 1.0, 0.625, (1.5, -2.0), 1.0714286, (2.5714286, -3.4285714)),
            (1.0, 0.7, 0.475, (0.9, -1.1), 0.9, (1.2, -1.2)),
            (1.0, 0.5, 0.375, (0.5, -0.5), 0.7857143, (0.2857143, 0.2857143)),
            (1.0, 0.0, 0.125, (-0.5, 1.0), 0.5, (-2.0, 4.0)),
            (0.1, 0.7, 3.355, (0.45, -0.65), 7.9156731, (0.9836538, -1.4163462)),
        ],
    )
    def test_golden_vector(self, beta, r, plain, plain_grad, adaptive, adaptive_grad):
        # Worked by hand from arXiv 2509.16117; the table rounds at 1e-7.
        for config, loss, grad in ((PLAIN, plain, plain_grad), (NFT, adaptive, adaptive_grad)):
            got_loss, got_grad, _ = loss_and_grad(replace(config, beta=beta), r)
            assert got_loss.item() == pytest.approx(loss, abs=1e-6)
            assert got_grad[0].tolist() == pytest.approx(grad, abs=1e-6)

    def test_golden_weights_and_diagnostics(self):
        _, _, got = loss_and_grad(NFT, 0.7, v_ref=V_OLD * 2)
        assert got["weight_plus"].item() == pytest.approx(0.21)
        assert got["weight_minus"].item() == pytest.approx(0.09)
        assert got["probability"].item() == pytest.approx(0.7)
        assert got["displacement"].item() == pytest.approx(0.01)
        assert got["old_square"].item() == pytest.approx(0.625)
        assert got["ref_mse"].item() == pytest.approx((0.6**2 + 1.1**2) / 2)
        assert got["norm_ratio"].item() == pytest.approx(math.sqrt((0.4**2 + 0.9**2) / (1 + 4)))
        assert not any(value.requires_grad for value in got.values())

    @pytest.mark.parametrize("beta", [1.0, 0.1])
    @pytest.mark.parametrize("r", [0.0, 0.3, 0.7, 1.0])
    def test_at_the_old_policy_the_value_ignores_the_reward_but_the_gradient_does_not(self, beta, r):
        for config, value, grad_at_one in ((PLAIN, 0.325, (1.0, -1.5)), (NFT, 0.78, (2.4, -3.6))):
            loss, grad, got = loss_and_grad(replace(config, beta=beta), r, v_theta=V_OLD)
            assert loss.item() == pytest.approx(value / beta, abs=1e-12)
            assert got["loss_plus"] == got["loss_minus"]
            # Proportional to 2r - 1, the same for every beta.
            assert grad[0].tolist() == pytest.approx([(2 * r - 1) * g for g in grad_at_one], abs=1e-12)

    @quick
    @given(seeds, st.floats(0.05, 2.0))
    def test_plain_loss_is_a_matching_push_plus_a_proximal_pull(self, seed, beta):
        # loss - loss(old) = A_max beta mean(d^2) - 2 A mean(d (v - v_old)), d = v_theta - v_old.
        x0, noise, v_old, v_theta, t, r = random_case(seed)
        config = replace(PLAIN, beta=beta)
        case = {"x0": x0, "noise": noise, "t": t, "v_old": v_old}
        difference = loss_and_grad(config, r, v_theta=v_theta, **case)[0] - loss_and_grad(config, r, v_old, **case)[0]
        d, residual = v_theta - v_old, noise - x0 - v_old
        expected = config.adv_max * beta * (d**2).mean() - 2 * advantage(r) * (d * residual).mean()
        # The loss itself is up to 1e3 times the difference at beta = .05.
        assert torch.allclose(difference, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("c", [-0.9, -0.2, 0.5, 0.95])
    def test_at_even_odds_the_plain_loss_pulls_back_and_the_adaptive_one_ignores_radial_moves(self, c):
        x0, noise, v_old, _, t, _ = random_case(4)
        residual = v_old - (noise - x0)
        _, grad, _ = loss_and_grad(NFT, 0.5, v_old + c * residual, v_old, x0, noise, t)
        assert grad.abs().max() < 1e-12
        _, plain, _ = loss_and_grad(PLAIN, 0.5, v_old + c * residual, v_old, x0, noise, t)
        assert torch.allclose(plain, 2 * PLAIN.adv_max * c * residual / 6, atol=1e-12)
        _, elsewhere, _ = loss_and_grad(NFT, 0.5, v_old + residual.roll(1, 1), v_old, x0, noise, t)
        assert elsewhere.abs().max() > 0.01

    @quick
    @given(seeds)
    def test_beta_one_and_certain_reward_is_flow_matching_on_positives(self, seed):
        x0, noise, v_old, v_theta, t, _ = random_case(seed)
        case = {"x0": x0, "noise": noise, "t": t, "v_old": v_old, "v_theta": v_theta}
        target = noise - x0
        positive, _, _ = loss_and_grad(PLAIN, 1.0, **case)
        assert torch.allclose(positive, 5 * ((v_theta - target) ** 2).mean(1), rtol=1e-12)
        negative, _, _ = loss_and_grad(PLAIN, 0.0, **case)
        assert torch.allclose(negative, 5 * ((2 * v_old - v_theta - target) ** 2).mean(1), rtol=1e-12)

    @pytest.mark.parametrize("beta", [0.1, 1.0, 50.0])
    @pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
    def test_minimiser_of_one_sample(self, beta, r):
        # Approaches v_old as 1 / beta for large beta and runs away for small.
        best = V_OLD + (2 * r - 1) * (TARGET - V_OLD) / beta
        _, grad, _ = loss_and_grad(replace(PLAIN, beta=beta), r, v_theta=best)
        assert grad.abs().max() < 1e-10

    def test_small_beta_leaves_only_the_push(self):
        d, r = V_THETA - V_OLD, 0.8
        push = (-2 * advantage(r) * (d * (TARGET - V_OLD)).mean()).item()
        gaps = []
        for beta in (1e-2, 1e-3, 1e-4):
            config = replace(PLAIN, beta=beta)
            gaps.append((loss_and_grad(config, r)[0] - loss_and_grad(config, r, v_theta=V_OLD)[0]).item() - push)
        # The gap is the proximal term A_max beta mean(d^2) = .05 beta.
        assert gaps == pytest.approx([5e-4, 5e-5, 5e-6], rel=1e-5)

    @SPACES
    @quick
    @given(seed=seeds)
    def test_swapping_good_and_bad_mirrors_the_move(self, config, seed):
        x0, noise, v_old, v_theta, t, r = random_case(seed)
        one, _, _ = loss_and_grad(config, r, v_theta, v_old, x0, noise, t)
        other, _, _ = loss_and_grad(config, 1 - r, 2 * v_old - v_theta, v_old, x0, noise, t)
        assert torch.allclose(one, other, rtol=1e-12)

    def test_advantage_scale_moves_only_the_proximal_term(self):
        a = double(1.7)

        def parts(adv_max):
            config = replace(PLAIN, adv_max=adv_max)
            at_old, plus, minus = (
                forward_process_loss(v, V_OLD, X0, NOISE, T, a, config)[0]
                for v in (V_OLD, V_THETA, 2 * V_OLD - V_THETA)
            )
            return (plus - minus) / 2, (plus + minus) / 2 - at_old  # odd part: push; even part: proximal term

        push, pull = parts(5.0)
        push_3, pull_3 = parts(15.0)
        assert push_3.item() == pytest.approx(push.item(), rel=1e-10)
        assert pull_3.item() == pytest.approx(3 * pull.item(), rel=1e-10)

    @pytest.mark.parametrize(("config", "power"), [(NFT, 1), (PLAIN, 2)], ids=["x0_adaptive", "v"])
    def test_scaling_everything_scales_the_loss(self, config, power):
        x0, noise, v_old, v_theta, t, r = random_case(5)
        one, _, _ = loss_and_grad(config, r, v_theta, v_old, x0, noise, t)
        scaled, _, _ = loss_and_grad(config, r, 3 * v_theta, 3 * v_old, 3 * x0, 3 * noise, t)
        assert scaled.item() == pytest.approx(3**power * one.item(), rel=1e-12)

    def test_a_perfect_branch_stays_finite(self):
        loss, grad, got = loss_and_grad(NFT, 0.9, v_theta=TARGET, v_old=TARGET)
        assert loss.item() == 0
        assert torch.equal(grad, torch.zeros_like(grad))
        assert got["weight_plus"].item() == pytest.approx(1e-5)

    @SPACES
    def test_beta_changes_no_gradient_on_policy(self, config):
        # With old = current at every gradient, no optimiser can tell beta = 1 from beta = .1.
        for seed in range(5):
            x0, noise, v_old, _, t, r = random_case(seed, dims=64)
            v_ref = v_old + 0.1
            grads = [
                loss_and_grad(replace(config, beta=beta, ref_coef=0.05), r, v_old, v_old, x0, noise, t, v_ref)[1]
                for beta in (1.0, 0.1)
            ]
            assert torch.allclose(*grads, rtol=1e-12, atol=1e-14)
            assert grads[0].abs().max() > 1e-3

    @quick
    @given(seeds, st.sampled_from([0.1, 1.0]))
    def test_equals_the_clean_image_form_in_every_parameterisation(self, seed, beta):
        # Mixing clean-image or noise estimates instead of velocities gives the same implicit policies, as both pairs of
        # coefficients (1 - beta, beta) and (1 + beta, -beta) sum to 1.
        x0, noise, v_old, v_theta, t, r = random_case(seed)
        x_t = noised_state(x0, noise, t)
        loss, _, _ = loss_and_grad(replace(NFT, beta=beta), r, v_theta, v_old, x0, noise, t)
        clean_old, clean = x_t - t * v_old, x_t - t * v_theta
        noise_old, noise_theta = x_t + (1 - t) * v_old, x_t + (1 - t) * v_theta
        total = 0.0
        for weight, share in ((r, beta), (1 - r, -beta)):
            mixed_clean = (1 - share) * clean_old + share * clean
            mixed_noise = (1 - share) * noise_old + share * noise_theta
            assert torch.allclose(x_t, (1 - t) * mixed_clean + t * mixed_noise, rtol=0, atol=1e-12)
            error = mixed_clean - x0
            total = total + weight * (error**2).mean() / error.abs().mean()
        assert torch.allclose(loss, NFT.adv_max * total / beta, rtol=1e-11)

    def test_only_the_trained_velocity_has_a_graph(self):
        leaves = [x.clone().requires_grad_() for x in (V_OLD, V_OLD + 1, X0, NOISE, advantage(0.7), V_THETA)]
        v_old, v_ref, x0, noise, a, v_theta = leaves
        loss, _ = forward_process_loss(v_theta, v_old, x0, noise, T, a, replace(NFT, ref_coef=0.1), v_ref)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        assert [g is not None for g in grads] == [False] * 5 + [True]

    def test_the_adaptive_weights_are_constants(self):
        # Finite differences of the loss with the weights frozen at their value, not of the loss itself.
        x0, noise, v_old, v_theta, t, r = random_case(8)
        _, grad, got = loss_and_grad(NFT, r, v_theta, v_old, x0, noise, t)

        def frozen(v):
            plus, minus = t * (v - (noise - x0)), t * (2 * v_old - v - (noise - x0))
            value = r * (plus**2).mean() / got["weight_plus"] + (1 - r) * (minus**2).mean() / got["weight_minus"]
            return NFT.adv_max * value.item()

        for i, unit in enumerate(torch.eye(6, dtype=torch.float64)):
            assert grad[0, i].item() == pytest.approx((frozen(v_theta + unit) - frozen(v_theta - unit)) / 2, rel=1e-9)

    def test_elements_are_independent_and_ranks_of_latents_agree(self):
        g = torch.Generator().manual_seed(0)
        x0, noise, v_old, v_theta, v_ref = (torch.randn(3, 4, 8, 8, generator=g) for _ in range(5))
        t, a = torch.tensor([1.0, 0.5, 0.0089]), torch.tensor([2.0, -9.0, 0.0])
        config = replace(NFT, ref_coef=0.1)
        loss, _ = forward_process_loss(v_theta, v_old, x0, noise, t, a, config, v_ref)
        for i in range(3):
            row = [x[i : i + 1].flatten(2).transpose(1, 2) for x in (v_theta, v_old, x0, noise, v_ref)]
            alone, _ = forward_process_loss(*row[:4], t[i : i + 1], a[i : i + 1], config, row[4])
            assert alone.item() == pytest.approx(loss[i].item(), rel=1e-6)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()

    def test_half_precision_velocities_are_scored_in_float32(self):
        g = torch.Generator().manual_seed(1)
        v_theta, v_old, x0, noise = (torch.randn(2, 4096, generator=g).bfloat16() for _ in range(4))
        t, a = torch.tensor([0.0089, 0.7]), torch.tensor([1.0, -1.0])
        half, _ = forward_process_loss(v_theta, v_old, x0, noise, t, a, NFT)
        exact, _ = forward_process_loss(*(x.double() for x in (v_theta, v_old, x0, noise)), t.double(), a, NFT)
        assert half.dtype == torch.float32
        assert torch.allclose(half.double(), exact, rtol=1e-5)

    def test_probability_saturates_at_the_largest_advantage(self):
        r = optimality_probability(torch.tensor([-9.0, -5.0, -2.0, 0.0, 2.0, 5.0, 9.0]), 5.0)
        assert r.tolist() == pytest.approx([0, 0, 0.3, 0.5, 0.7, 1, 1])

    def test_reference_is_required_when_weighted(self):
        with pytest.raises(ValueError, match="ref_coef above 0 needs the reference velocity"):
            forward_process_loss(V_THETA, V_OLD, X0, NOISE, T, double(1.0), replace(NFT, ref_coef=0.1))


class TestGaussianWorld:
    """Data N(m, s^2), reward x0, a velocity with the right slope whose only parameter is the mean it believes in.

    Expectations are exact: the plain loss is a polynomial of degree 3 in (x0, noise), so Gauss-Hermite quadrature with
    8 x 8 nodes (all within 4.2 stds, where no advantage is clipped) has no error but rounding.
    """

    M, S = 0.3, 0.7

    def gradient(self, config, believed, old, t, ref=0.0):
        nodes, weights = np.polynomial.hermite_e.hermegauss(8)
        z0, z1 = (torch.from_numpy(z).reshape(-1, 1) for z in np.meshgrid(nodes, nodes))
        weight = torch.from_numpy(np.outer(weights, weights).reshape(-1) / (2 * math.pi))
        x0, times = self.M + self.S * z0, torch.full((64,), t, dtype=torch.float64)
        x_t = noised_state(x0, z1, times)
        slope = (t - (1 - t) * self.S**2) / ((1 - t) ** 2 * self.S**2 + t**2)
        believed = double(believed).requires_grad_()
        v_theta, v_old, v_ref = (-m + slope * (x_t - (1 - t) * m) for m in (believed, old, ref))
        loss, _ = forward_process_loss(v_theta, v_old, x0, z1, times, z0[:, 0], config, v_ref)
        (grad,) = torch.autograd.grad((weight * loss).sum(), believed)
        return grad.item()

    @pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize("beta", [1.0, 0.1])
    def test_minimiser_is_the_exponential_tilt_at_temperature_beta_adv_max(self, t, beta):
        # pi_old exp(A / lambda), lambda = beta A_max, shifts the mean by s / lambda: .14 for beta = 1, 1.4 for .1.
        config = replace(PLAIN, beta=beta)
        g0, g1 = (self.gradient(config, self.M + shift, self.M, t) for shift in (0.0, 1.0))
        assert g0 / (g0 - g1) == pytest.approx(self.S / (beta * 5), rel=1e-9)

    @pytest.mark.parametrize("beta", [1.0, 0.1])
    def test_fixed_point_lies_one_over_ref_coef_stds_from_the_reference(self, beta):
        config = replace(PLAIN, beta=beta, ref_coef=0.05)
        ref = self.M - self.S / config.ref_coef
        assert abs(self.gradient(config, self.M, self.M, 0.5, ref)) < 1e-10
        assert abs(self.gradient(config, self.M, self.M, 0.5, ref + 1.0)) > 1e-3


class TestOldPolicy:
    def test_schedules(self):
        assert [old_policy_decay(n, 0, 0.001, 0.5) for n in (0, 100, 500, 9000)] == pytest.approx([0, 0.1, 0.5, 0.5])
        assert [old_policy_decay(n, 75, 0.0075, 0.999) for n in (74, 75, 76, 500)] == pytest.approx(
            [0, 0, 0.0075, 0.999]
        )
        assert old_policy_decay(10**6, 0, 0.001, 0.0) == 0

    @pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])
    def test_lag_saturates_at_step_over_one_minus_eta(self, eta):
        theta = old = before = 0.0
        for n in range(1, 400):
            theta, before = theta + 1.0, old
            lag = theta - old
            decay = old_policy_decay(n, 0, 1.0, eta)
            old = decay * old + (1 - decay) * theta
        assert lag == pytest.approx(1 / (1 - eta))
        assert old - before == pytest.approx(1.0)  # the sampler still moves at full speed


class TestDrawTimes:
    GRID = torch.linspace(1, 0, 11)

    def test_all_but_one_time_covers_each_time_equally(self):
        # One of T = 10 times is left out per sample, uniformly: counts of the missing one are multinomial(4000, .1).
        times = draw_times(self.GRID, range(4000), 0, 0, 0, 1.0)
        assert times.shape == (4000, 9)
        assert times.dtype == torch.int64
        assert all(len(set(row)) == 9 for row in times[:50].tolist())
        used, first = torch.bincount(times.flatten()), torch.bincount(times[:, 0])
        assert len(used) == 10
        assert (used - 3600).abs().max() < 5 * math.sqrt(4000 * 0.1 * 0.9)
        assert (first - 400).abs().max() < 5 * math.sqrt(4000 * 0.1 * 0.9)

    @pytest.mark.parametrize(("time_range", "in_range"), [(0.9, 9), (0.7, 7), (0.5, 5), (0.05, 1), (1.0, 10)])
    def test_range_keeps_the_noisiest_times(self, time_range, in_range):
        assert draw_times(self.GRID, range(300), 0, 3, 1, time_range).unique().tolist() == list(range(in_range))

    @pytest.mark.parametrize("sampling", ["grid", "stratified"])
    def test_a_draw_depends_on_seed_iteration_and_sample_only(self, sampling):
        draw = draw_times(self.GRID, range(64), 5, 2, 4, 0.9, sampling)
        assert torch.equal(draw_times(self.GRID, [40, 3], 5, 2, 4, 0.9, sampling), draw[[40, 3]])
        for seed, iteration in ((6, 2), (5, 3), (2, 5)):
            assert not torch.equal(draw_times(self.GRID, range(64), seed, iteration, 4, 0.9, sampling), draw)

    def test_draws_are_the_same_on_every_machine(self):
        # numpy guarantees the streams of Philox and SeedSequence, so a resumed run on a newer numpy keeps its times.
        assert draw_times(self.GRID, [0, 1], 0, 0, 4, 0.9).tolist() == [[6, 3, 4, 7], [4, 1, 3, 0]]

    def test_stratified_takes_one_time_from_each_part(self):
        times = draw_times(self.GRID, range(3000), 0, 0, 3, 0.9, "stratified")
        assert torch.equal(times // 3, torch.arange(3).expand(3000, 3))
        assert (torch.bincount(times.flatten()) - 1000).abs().max() < 5 * math.sqrt(3000 * 2 / 9)

    def test_impossible_draws_are_refused(self):
        with pytest.raises(ValueError, match="exceeds the 5 times in range"):
            draw_times(self.GRID, [0], 0, 0, 6, 0.5)
        with pytest.raises(ValueError, match="time_sampling must be one of"):
            draw_times(self.GRID, [0], 0, 0, 2, 0.5, "sobol")


KERNELS = pytest.mark.parametrize(
    ("kernel", "level", "form"),
    [(flow_sde, 0.7, "gaussian"), (dance_sde, 0.3, "gaussian"), (cps, 0.7, "gaussian"), (cps, 0.7, "mse")],
)


class TestClippedRatio:
    """Real kernels and the velocity v = a x + b; one batch mixes three times, t = 1 among them."""

    CLIP = 0.2

    def setup_method(self):
        g = torch.Generator().manual_seed(11)
        self.x, self.z = torch.randn(6, 4, 4, 4, generator=g), torch.randn(6, 4, 4, 4, generator=g)
        self.t, self.t_next = torch.tensor([1.0, 0.8, 0.5] * 2), torch.tensor([0.96, 0.7, 0.3] * 2)
        self.advantages = torch.tensor([1.3, -0.4, 2.0, -1.1, 0.0, 0.7])

    def transition(self, params, kernel, level):
        return kernel(self.x, params[0] * self.x + params[1], self.t, self.t_next, level)

    def sampled(self, kernel, level):
        params = torch.tensor([0.3, -0.2])
        mean, std = self.transition(params, kernel, level)
        return params, mean + std.view(-1, 1, 1, 1) * self.z, mean, std

    @KERNELS
    def test_unchanged_weights_give_ratio_one(self, kernel, level, form):
        params, sample, mean, std = self.sampled(kernel, level)
        old = log_prob(sample, mean, std, form)
        again = self.transition(params, kernel, level)
        loss, got = clipped_ratio_loss(log_prob(sample, again.mean, again.std, form), old, self.advantages, 1e-5)
        assert torch.equal(got["ratio"], torch.ones(6))
        assert torch.equal(got["clipped"], torch.zeros(6))
        assert torch.equal(loss, -self.advantages)
        assert torch.equal(transition_kl(again.mean, mean, std), torch.zeros(6))
        assert torch.equal(guard_log_ratio(sample, again.mean, mean, std), torch.zeros(6))

    @KERNELS
    def test_gradient_at_ratio_one_is_the_policy_gradient(self, kernel, level, form):
        # -A grad log p by central differences, which are exact up to float32 rounding: log p is quadratic in (a, b).
        params, sample, mean, std = self.sampled(kernel, level)
        old = log_prob(sample, mean, std, form)

        def score(p):
            return log_prob(sample, self.transition(p, kernel, level).mean, std, form)

        differences = [(score(params + unit).double() - score(params - unit)) / 2 for unit in torch.eye(2)]
        expected = torch.stack([-(self.advantages * difference).sum() for difference in differences])
        params.requires_grad_()
        loss, _ = clipped_ratio_loss(score(params), old, self.advantages, 1e-5)
        (grad,) = torch.autograd.grad(loss.sum(), params)
        assert torch.allclose(grad.double(), expected, rtol=1e-4)

    @pytest.mark.parametrize(
        ("advantage", "ratio", "clipped"),
        [(2.0, 1.25, 1), (2.0, 0.5, 0), (2.0, 1.1, 0), (-2.0, 0.75, 1), (-2.0, 1.5, 0), (-2.0, 0.9, 0), (0.0, 1.5, 0)],
    )
    def test_clip_stops_only_moves_that_already_went_far_enough(self, advantage, ratio, clipped):
        log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
        loss, got = clipped_ratio_loss(log_ratio, torch.zeros(1), torch.tensor([advantage]), self.CLIP)
        (grad,) = torch.autograd.grad(loss, log_ratio)
        assert got["clipped"].item() == clipped
        assert got["ratio"].item() == pytest.approx(ratio)
        if clipped:
            assert grad.item() == 0
            assert loss.item() == pytest.approx(-advantage * (1 + math.copysign(self.CLIP, advantage)))
        else:
            assert grad.item() == pytest.approx(-advantage * ratio)
            assert loss.item() == pytest.approx(-advantage * ratio)

    @pytest.mark.parametrize(("kernel", "level"), [(flow_sde, 0.7), (dance_sde, 0.3), (cps, 0.7)])
    def test_guard_is_the_scaled_and_centred_log_ratio(self, kernel, level):
        params, sample, mean_old, std = self.sampled(kernel, level)
        mean = self.transition(params + 0.05, kernel, level).mean
        got = guard_log_ratio(sample, mean, mean_old, std)
        move = (mean - mean_old).flatten(1)
        assert torch.allclose(got, (self.z.flatten(1) * move).mean(1), rtol=0, atol=1e-6)
        difference = log_prob(sample, mean, std).double() - log_prob(sample, mean_old, std)
        # float32 log-probs of size 1 carry 1e-7.
        assert torch.allclose(got.double(), std * difference + (move**2).mean(1) / (2 * std), rtol=0, atol=1e-6)

    def test_guard_is_centred_where_the_plain_log_ratio_is_not(self):
        g = torch.Generator().manual_seed(2)
        z = torch.randn(4000, 64, generator=g)
        mean_old, std, move = torch.zeros(4000, 64), torch.full((4000,), 0.5), 0.1
        sample, mean = mean_old + 0.5 * z, mean_old + move
        plain = log_prob(sample, mean, std) - log_prob(sample, mean_old, std)
        repaired = guard_log_ratio(sample, mean, mean_old, std)
        # std of both averages: (move / .5 or move) / sqrt(64 * 4000) = 4e-4 or 2e-4.
        assert plain.mean().item() == pytest.approx(-(move**2) / (2 * 0.5**2), abs=2e-3)
        assert repaired.mean().item() == pytest.approx(0, abs=1e-3)

    def test_no_gradient_reaches_what_was_stored(self):
        leaves = [torch.tensor([0.1], requires_grad=True) for _ in range(3)]
        loss, _ = clipped_ratio_loss(*leaves, 0.2)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        assert [g is not None for g in grads] == [True, False, False]
        stored = [torch.ones(1, 3, requires_grad=True) for _ in range(3)]
        ratio = guard_log_ratio(*stored, torch.ones(1))
        grads = torch.autograd.grad(ratio.sum(), stored, allow_unused=True)
        assert [g is not None for g in grads] == [False, True, False]


class TestConfig:
    def test_defaults_of_both_types_are_usable(self):
        assert ObjectiveConfig().validate() == []
        assert ObjectiveConfig(type="forward_process").validate(num_steps=10) == []

    def test_every_error_is_reported_at_once(self):
        bad = ObjectiveConfig(type="forward_process", loss_space="x0", beta=0.0, time_range=1.5, old_decay_max=1.0)  # type: ignore[arg-type]
        assert [line.split()[0] for line in bad.validate()] == ["loss_space", "beta", "time_range", "old_decay_max"]

    def test_settings_of_the_other_type_are_refused(self):
        (line,) = ObjectiveConfig(type="forward_process", kl_beta=0.1).validate()
        assert line == "kl_beta has no effect with type forward_process: remove it or set type to clipped_ratio"
        (line,) = ObjectiveConfig(times_per_sample=2).validate()
        assert line.startswith("times_per_sample has no effect with type clipped_ratio")

    def test_settings_that_cannot_act_together_are_refused(self):
        (line,) = replace(NFT, times_per_sample=6, time_range=0.5).validate(num_steps=10)
        assert line.startswith("times_per_sample 6 is more than the 5 times")
        assert replace(NFT, times_per_sample=6, time_range=0.5).validate() == []
        (line,) = replace(NFT, old_decay_slope=0.0).validate()
        assert line.startswith("old_decay_slope 0 keeps")

    def test_kl_forms_are_those_of_the_kernels(self):
        assert get_args(KlForm) == KL_FORMS
