"""The losses of ControlNet++ and Ctrl-U by numbers that can be checked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from align.control_loss import (
    IGNORE,
    ConsistencyConfig,
    CtrlUConfig,
    active,
    clean_estimate,
    consistency,
    diffusion_errors,
    disagreement,
    masked_mean,
    matched_level,
    pixel_losses,
    ramp,
    second_timestep,
)
from samplers.vp import alpha_sigma, flow_time, velocity_from, vp_scale

OFF, BOTH = CtrlUConfig(mode="off"), CtrlUConfig(u_scale=1.0)


def at(alpha_bar: float) -> Tensor:
    return flow_time(torch.tensor([alpha_bar], dtype=torch.float64))


def estimate(output: float, prediction: str, alpha_bar: float = 0.25, clean: float = 1.0, noise: float = 2.0) -> float:
    """The clean value that one step predicts when the network says `output`."""
    t = at(alpha_bar).float()
    x = (1 - t) * clean + t * noise
    return float(clean_estimate(x, velocity_from(torch.tensor([output]), x, t, prediction), t))


def logits(*pairs: tuple[float, float]) -> Tensor:
    """(1, 2, 1, W) of one row of pixels with two classes."""
    return torch.tensor(pairs).T.reshape(1, 2, 1, -1)


# -- the noise axis -----------------------------------------------------------------------------------------------------


def test_one_step_prediction_of_ddpm():
    """An error of .1 in the noise at alpha_bar = 1/4 is one of .1 sqrt(3) in the image; v-prediction gives it back exactly."""
    t = at(0.25)
    assert float(((1 - t) + 2 * t) / vp_scale(t)) == pytest.approx(0.5 + 2 * math.sqrt(0.75))  # x_vp = 2.2320508
    assert estimate(2.0, "epsilon") == pytest.approx(1.0, abs=1e-6)
    assert estimate(1.9, "epsilon") == pytest.approx(1 + 0.1 * math.sqrt(3), abs=1e-6)
    assert estimate(0.5 * 2 - math.sqrt(0.75), "v_prediction") == pytest.approx(1.0, abs=1e-6)
    assert estimate(0.5 * 2 - math.sqrt(0.75) + 0.1, "v_prediction") == pytest.approx(
        1 - 0.1 * math.sqrt(0.75), abs=1e-6
    )


def test_one_step_prediction_of_flow():
    x, t = torch.tensor([1.3]), torch.tensor([0.3])
    assert float(clean_estimate(x, torch.tensor([1.0]), t)) == pytest.approx(1.0, abs=1e-6)
    assert float(clean_estimate(x, torch.tensor([123.0]), torch.zeros(1))) == float(x)


def test_a_timestep_is_carried_to_a_flow_model_by_its_noise_content():
    """cumulative alpha .753692 at 200 and .424483 at 400; a division by 1000 would give .2 and .4."""
    assert matched_level(200) == pytest.approx(0.363732, abs=1e-5)
    assert matched_level(400) == pytest.approx(0.537976, abs=1e-5)
    for timestep, alpha_bar in ((100, 0.894223), (200, 0.753692), (400, 0.424483), (600, 0.160783), (999, 0.004660)):
        alpha, _ = alpha_sigma(torch.tensor(matched_level(timestep)))
        assert float(alpha) ** 2 == pytest.approx(alpha_bar, abs=1e-6)


@pytest.mark.parametrize(("target", "output"), [("epsilon", 1.9), ("v_prediction", 0.4), ("sample", 0.7)])
def test_the_diffusion_error_is_that_of_the_networks_own_output(target, output):
    t = at(0.25).float()
    x = (1 - t) * 1.0 + t * 2.0
    truth = {"epsilon": 2.0, "v_prediction": 0.5 * 2 - math.sqrt(0.75), "sample": 1.0}[target]
    velocity = velocity_from(torch.tensor([output]), x, t, target)
    error = diffusion_errors(x[:, None], velocity[:, None], t, torch.ones(1, 1), 2 * torch.ones(1, 1), target)
    assert float(error) == pytest.approx((output - truth) ** 2, rel=1e-4)


def test_the_second_timestep_stays_on_the_schedule():
    assert second_timestep(torch.tensor([0, 998, 999]), 1, 999).tolist() == [1, 999, 999]
    assert second_timestep(torch.tensor([998]), 3, 999).tolist() == [999]


def test_who_is_judged_is_told_by_the_primary_timestep():
    first = torch.tensor([10, 400, 401, 999])
    assert active(first, 0, 400).tolist() == [True, True, False, False]
    assert active(first, 11, 400).tolist() == [False, True, False, False]
    assert int(second_timestep(first, 1, 999)[1]) == 401  # its auxiliary timestep is beyond the limit


def test_the_mean_over_those_judged():
    losses = torch.tensor([1.0, 3.0, 100.0, 100.0], requires_grad=True)
    assert masked_mean(losses, torch.tensor([True, True, False, False])).item() == 2.0
    halves = [masked_mean(losses[i : i + 2], torch.tensor([True, False]), count=2) for i in (0, 2)]
    assert sum(halves).item() == (1.0 + 100.0) / 2  # parts of a batch add up to it
    nothing = masked_mean(losses, torch.zeros(4, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0.0
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.0] * 4


def test_the_ramp():
    assert [ramp(n, 5000, 0.1) for n in (0, 2500, 5000, 9000)] == [0.0, 0.05, 0.1, 0.1]
    assert ramp(0, 0, 0.1) == 0.1


# -- uncertainty --------------------------------------------------------------------------------------------------------


def test_the_disagreement_is_the_divergence_of_the_auxiliary_from_the_primary():
    """KL((3/4, 1/4) || (1/2, 1/2)) = .130812; the other way round it is .143841."""
    primary, auxiliary = logits((0.0, 0.0)), logits((math.log(3), 0.0))
    assert float(disagreement(primary, auxiliary, "probabilistic")) == pytest.approx(0.1308120, abs=1e-6)
    assert float(disagreement(primary, auxiliary, "probabilistic", "primary_to_aux")) == pytest.approx(
        0.1438410, abs=1e-6
    )
    target = torch.zeros(1, 1, 1, dtype=torch.int64)
    for scale, weight in ((0.1, 0.9870040), (1.0, 0.8773827)):
        found = consistency(torch.cat([primary, auxiliary]), target, "probabilistic", CtrlUConfig(u_scale=scale))
        assert float(found.weight) == pytest.approx(weight, abs=1e-6)
        assert float(found.penalty) == pytest.approx(scale * 0.1308120, abs=1e-6)
        assert float(found.loss) == pytest.approx(math.log(2) * weight, abs=1e-6)


def test_predictions_that_agree_leave_controlnet_pp():
    torch.manual_seed(0)
    one = torch.randn(3, 4, 5, 5, requires_grad=True)
    target = torch.randint(4, (3, 5, 5))
    target[0, :2] = IGNORE
    alone, both = (
        consistency(torch.cat([one] * config.passes), target, "probabilistic", config) for config in (OFF, BOTH)
    )
    assert float(both.penalty.detach().abs().max()) == 0.0
    assert torch.equal(both.weight, torch.ones(3))
    assert torch.equal(both.loss, alone.loss)
    (first,) = torch.autograd.grad(alone.loss.sum(), one, retain_graph=True)
    (second,) = torch.autograd.grad(both.loss.sum() + both.penalty.sum(), one)
    torch.testing.assert_close(second, first, rtol=0, atol=1e-7)


def test_a_constant_on_all_logits_of_a_pixel_is_no_disagreement():
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 5, 5).split(1)
    moved = second + 7 * torch.randn(1, 1, 5, 5)
    found = disagreement(first, moved, "probabilistic")
    torch.testing.assert_close(found, disagreement(first, second, "probabilistic"), rtol=0, atol=1e-5)


def test_without_the_penalty_disagreeing_pays():
    """f(U) = 2 exp(-U) + U / 2 is least at U = ln 4; without its second term it falls for ever."""

    def loss(u: Tensor, eta: float) -> Tensor:
        """An image of one pixel with squared error 2 and disagreement u, through the functions that train."""
        outputs = torch.stack([torch.full_like(u, math.sqrt(2)), math.sqrt(2) + u]).view(2, 1, 1, 1)
        found = consistency(outputs, torch.zeros(1, 1, 1, 1), "continuous", CtrlUConfig(eta=eta))
        return found.loss.sum() + eta * found.penalty.sum()

    assert float(loss(torch.tensor(0.5), 0.0)) == pytest.approx(1.2130613, abs=1e-6)
    assert float(loss(torch.tensor(0.5), 1.0)) == pytest.approx(1.7130613, abs=1e-6)
    best = torch.tensor(2 * math.log(2), dtype=torch.float32, requires_grad=True)
    value = loss(best, 0.5)
    assert float(value) == pytest.approx(0.5 + 0.5 * math.log(4), abs=1e-6)
    assert float(torch.autograd.grad(value, best)[0]) == pytest.approx(0.0, abs=1e-6)
    for u in (0.01, 0.5, 3.0):
        point = torch.tensor(u, requires_grad=True)
        assert float(torch.autograd.grad(loss(point, 0.0), point)[0]) < 0


def test_a_detached_weight_leaves_the_auxiliary_prediction_to_the_penalty():
    torch.manual_seed(0)
    primary, auxiliary = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    target = torch.randint(3, (2, 4, 4))
    for detached in (True, False):
        found = consistency(
            torch.cat([primary, auxiliary]), target, "probabilistic", replace(BOTH, detach_weight=detached)
        )
        (gradient,) = torch.autograd.grad(found.loss.sum(), auxiliary, retain_graph=True, allow_unused=True)
        nothing = gradient is None or float(gradient.abs().max()) == 0.0
        assert nothing == detached
        assert float(torch.autograd.grad(found.penalty.sum(), auxiliary)[0].abs().max()) > 0


def test_ignored_pixels_count_for_the_disagreement_alone():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 4).split(1)
    target = torch.randint(3, (1, 4, 4))
    target[:, :2] = IGNORE

    def found(primary: Tensor, labels: Tensor = target) -> tuple[float, float]:
        result = consistency(torch.cat([primary, second]), labels, "probabilistic", BOTH)
        return float(result.loss), float(result.penalty)

    changed = first.clone()
    changed[:, :, :2] += torch.randn(1, 3, 2, 4)
    assert found(changed)[0] == found(first)[0]
    assert found(changed)[1] != found(first)[1]
    nothing, penalty = found(first, torch.full_like(target, IGNORE))
    assert nothing == 0.0
    assert penalty == found(first)[1]


def test_where_the_scale_stands():
    """u = .1: the penalty's slope per unit of raw disagreement is the same for both kinds, the exponent's is not."""
    settings = CtrlUConfig(u_scale=0.1)
    raw = {"probabilistic": 0.1308120, "continuous": 0.25}
    labels, maps = logits((0.0, 0.0), (0.0, 0.0)), torch.zeros(1, 1, 1, 2)
    outputs = {
        "probabilistic": torch.cat([labels, logits((math.log(3), 0.0), (math.log(3), 0.0))]),
        "continuous": torch.cat([maps, maps + 0.25]),
    }
    targets = {"probabilistic": torch.zeros(1, 1, 2, dtype=torch.int64), "continuous": maps}
    exponents = {}
    for kind, value in raw.items():
        found = consistency(outputs[kind], targets[kind], kind, settings)
        assert settings.penalty_weight(kind) * float(found.penalty) == pytest.approx(0.1 * value, abs=1e-6)
        exponents[kind] = -math.log(float(found.weight)) / value
    assert settings.penalty_weight("probabilistic") == 1.0
    assert settings.penalty_weight("continuous") == 0.1
    assert exponents == pytest.approx({"probabilistic": 0.1, "continuous": 1.0}, rel=1e-5)
    inside = replace(settings, scale_inside_exp=True)
    found = consistency(outputs["continuous"], maps, "continuous", inside)
    assert (float(found.weight), float(found.penalty)) == pytest.approx((math.exp(-0.025), 0.025), abs=1e-6)
    assert inside.penalty_weight("continuous") == 1.0
    assert replace(settings, eta=0.3).penalty_weight("continuous") == 0.3
    turned = replace(settings, u_scale=1.0, kl_direction="primary_to_aux")
    found = consistency(outputs["probabilistic"], targets["probabilistic"], "probabilistic", turned)
    assert float(found.penalty) == pytest.approx(0.1438410, abs=1e-6)


def test_half_precision_outputs_of_any_size_stay_finite():
    first = torch.tensor([200.0, -200.0, 0.0], dtype=torch.float16).view(1, 3, 1, 1)
    outputs = torch.cat([first, first.flip(1)])
    found = consistency(outputs, torch.zeros(1, 1, 1, dtype=torch.int64), "probabilistic", BOTH)
    assert found.loss.dtype == found.penalty.dtype == torch.float32
    for kind in ("probabilistic", "continuous"):  # before anything is taken apart: float16 would round the difference
        assert disagreement(first, first.flip(1), kind).dtype == torch.float32
    assert all(bool(value.isfinite().all()) for value in vars(found).values())
    assert float(found.penalty) == 200.0


def test_both_predictions_share_the_loss_in_the_symmetric_form():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 4).split(1)
    target = torch.randint(3, (1, 4, 4))
    ways = [consistency(torch.cat(pair), target, "probabilistic", BOTH) for pair in ((first, second), (second, first))]
    both = consistency(torch.cat([first, second]), target, "probabilistic", replace(BOTH, symmetric=True))
    for name in ("loss", "penalty", "weight"):
        expected = (getattr(ways[0], name) + getattr(ways[1], name)) / 2
        torch.testing.assert_close(getattr(both, name), expected)


def test_the_average_of_two_predictions_knows_no_uncertainty():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, 4).split(1)
    target = torch.randint(3, (1, 4, 4))
    found = consistency(torch.cat([first, second]), target, "probabilistic", CtrlUConfig(mode="average"))
    plain = [float(pixel_losses(one, target, "probabilistic")[0].mean()) for one in (first, second)]
    assert float(found.loss) == pytest.approx(sum(plain) / 2, abs=1e-6)
    assert float(found.penalty) == 0.0
    assert CtrlUConfig(mode="average").penalty_weight("probabilistic") == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ConsistencyConfig(), "network: a consistency loss needs a network"),
        (ConsistencyConfig(network="x", t_min=500), "t_min, t_max: need 0 <= t_min <= t_max <= 999, got 500 and 400"),
        (
            ConsistencyConfig(network="x", ctrlu=CtrlUConfig(eta=0.0)),
            "without the penalty the loss falls by disagreeing",
        ),
        (ConsistencyConfig(network="x", ctrlu=CtrlUConfig(u_scale=0.0)), "ctrlu.u_scale: 0 leaves nothing"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    (line,) = settings.validate()
    assert message in line


def test_nothing_is_predicted_twice_for_nothing():
    assert ConsistencyConfig(grad_scale=0.0).passes == 1
    assert ConsistencyConfig(grad_scale=0.0).validate() == []
    assert [ConsistencyConfig(ctrlu=CtrlUConfig(mode=m)).passes for m in ("off", "uncertainty", "average")] == [1, 2, 2]
