"""Losses from rewards, and their gradient at the final latents: against autograd's definition, with missing scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.errors import UserError
from align.models.base import ImageModel, ModelConfig, load_model
from align.playground.captions import caption
from align.playground.data import to_tensor
from align.playground.proxy import ProxyReward
from align.playground.scenes import render, sample_scene
from align.prompts import Prompt
from align.reward_loss import (
    ImageGradient,
    LossConfig,
    check_differentiable,
    enable_checkpointing,
    image_gradient,
    reward_loss,
)
from align.schema import build
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput
from rewards.debug import BrightnessReward
from rewards.function import FunctionReward
from rewards.jpeg import JPEGReward
from rewards.registry import RewardConfig

COUNT = 4


class Redness(Reward):
    """Mean of red above blue, times `factor`; a score and slope of NaN for the prompts to be missed."""

    name = "redness"
    differentiable = True

    def __init__(self, factor: float = 1.0, missed: frozenset[str] = frozenset()) -> None:
        self.factor, self.missed = factor, missed

    def score(self, batch: RewardBatch) -> RewardOutput:
        red = self.factor * (batch.images[:, 0] - batch.images[:, 2]).square().mean(dim=(1, 2))
        lost = torch.tensor([text in self.missed for text in batch.prompts])
        return RewardOutput(red * torch.where(lost, torch.nan, 1.0))


@pytest.fixture(scope="module")
def model() -> ImageModel:
    return load_model(ModelConfig(path="playground"))


@pytest.fixture(scope="module")
def proxy() -> ProxyReward:
    reward = ProxyReward(0)
    reward.setup(torch.device("cpu"), torch.float32)
    return reward


@pytest.fixture(scope="module")
def world(model) -> tuple[Tensor, list[Prompt]]:
    """Latents (4, C, h, w) of rendered scenes, a little blurred by noise, and the captions of the scenes."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(COUNT)]
    latents = model.encode_images(to_tensor(np.stack([render(scene) for scene in scenes])) / 2 + 0.5)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    return 0.9 * latents + 0.1 * noise, [Prompt(caption(scene, rng)) for scene in scenes]


@pytest.fixture
def gradient(model, world) -> Callable[..., ImageGradient]:
    """gradient(rewards, weights, latents=..., **settings of the loss)."""

    def run(
        rewards: dict[str, Reward], weights: dict[str, float] | None = None, latents: Tensor | None = None, **loss: Any
    ) -> ImageGradient:
        settings = {name: RewardConfig(type=name, weight=(weights or {}).get(name, 1.0)) for name in rewards}
        states, prompts = world
        states = states if latents is None else latents
        return image_gradient(model, rewards, settings, states, prompts, [0, 0, 1, 1], 3, LossConfig(**loss))

    return run


def norms(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).norm(dim=1)


# -- losses of scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "score", "loss", "slope"),
    [
        ("negative", None, 0.5, -0.5, -1),
        ("target", 10.0, 4.0, 6.0, -1),
        ("target", 10.0, 12.0, 2.0, 1),
        ("hinge", 2.0, 0.5, 1.5, -1),
        ("hinge", 2.0, 2.5, 0.0, 0),
    ],
)
def test_each_loss_and_its_slope(kind, value, score, loss, slope):
    """A missing score beside it has loss and slope 0, whatever the kind."""
    scores = torch.tensor([score, torch.nan], requires_grad=True)
    losses = reward_loss(scores, kind, value)
    losses.sum().backward()
    assert losses.tolist() == [loss, 0]
    assert scores.grad.tolist() == [slope, 0]


# -- the gradient at the latents -----------------------------------------------------------------------------------


def test_gradient_is_the_finite_difference_of_the_loss(gradient, proxy, world):
    """Central differences along random directions, 1e-3 of a latent's standard deviation long."""
    latents, _ = world
    found = gradient({"proxy": proxy})
    expected, slopes = [], []
    for seed in range(4):
        direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        up, down = (gradient({"proxy": proxy}, latents=latents + sign * 1e-3 * direction).losses for sign in (1, -1))
        slopes.append((up - down) / 2e-3)
        expected.append((found.gradient * direction).sum(dim=(1, 2, 3)))
    # rounding of scores of about 0.5 makes differences of single samples wrong by 6e-8 / 2e-3 = 3e-5 of about 0.02
    error = (torch.stack(slopes) - torch.stack(expected)).norm() / torch.stack(expected).norm()
    assert error < 0.01


def test_a_gradient_belongs_to_one_sample_and_reaches_nothing_else(gradient, model, proxy, world):
    latents, _ = world
    found = gradient({"proxy": proxy, "brightness": BrightnessReward()}, latents=latents.clone())
    assert found.gradient.shape == latents.shape
    assert (norms(found.gradient) > 0).all()
    other = latents.clone()
    other[1:] = 0.3
    alone = gradient({"proxy": proxy, "brightness": BrightnessReward()}, latents=other)
    torch.testing.assert_close(alone.gradient[0], found.gradient[0], rtol=0, atol=1e-6)  # not a mean over the batch
    weights = [*model.pipe.vae.parameters(), *model.network.parameters(), *proxy.clip.model.parameters()]
    assert all(weight.grad is None for weight in weights)
    assert latents.grad is None
    assert not found.gradient.requires_grad
    assert not latents.requires_grad


def test_slices_do_not_change_anything(gradient, proxy):
    rewards = {"proxy": proxy, "jpeg": JPEGReward()}
    single, whole = (gradient(rewards, {"jpeg": 0.0}, image_batch=n) for n in (1, 4))
    uneven = gradient(rewards, {"jpeg": 0.0}, image_batch=3)
    for other in (whole, uneven):
        torch.testing.assert_close(other.gradient, single.gradient, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.losses, single.losses, rtol=0, atol=1e-6)
        torch.testing.assert_close(other.saturated, single.saturated, rtol=0, atol=1e-3)  # one value is 8e-5
        for name in rewards:
            torch.testing.assert_close(other.scores[name], single.scores[name], rtol=0, atol=0.01)


def test_rewards_add_up_with_their_weights_and_the_scale(gradient, proxy):
    parts = {"proxy": proxy, "redness": Redness()}
    both = gradient(parts, {"proxy": 2.0, "redness": -0.5}, scale=0.1)
    first, second = (gradient({name: reward}) for name, reward in parts.items())
    expected = 0.1 * (2 * first.gradient - 0.5 * second.gradient)
    torch.testing.assert_close(both.gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.losses, 0.1 * (-2 * first.scores["proxy"] + 0.5 * second.scores["redness"]))


def test_a_watched_reward_is_scored_and_changes_nothing(gradient, proxy, model, world):
    alone = gradient({"proxy": proxy})
    seen = gradient({"jpeg": JPEGReward(), "proxy": proxy}, {"jpeg": 0.0})
    assert torch.equal(seen.gradient, alone.gradient)
    assert list(seen.scores) == ["jpeg", "proxy"]
    expected = JPEGReward().score(RewardBatch(model.decode(world[0]), [""] * COUNT, [{}] * COUNT, torch.arange(COUNT)))
    torch.testing.assert_close(seen.scores["jpeg"], expected.scores, rtol=0, atol=0.01)


def test_a_satisfied_hinge_has_no_gradient_at_all(gradient):
    """Margins between the scores: samples above are left alone, samples below are pushed as by -R."""
    plain = gradient({"redness": Redness()})
    middle = float(plain.scores["redness"].median()) + 1e-6
    above = plain.scores["redness"] > middle
    assert 0 < above.sum() < COUNT
    for equalise in (False, True):
        found = gradient({"redness": Redness()}, kind="hinge", value={"redness": middle}, equalise=equalise)
        assert (found.gradient[above] == 0).all()
        assert (found.losses[above] == 0).all()
        assert (norms(found.gradient[~above]) > 0).all()
        if not equalise:
            torch.testing.assert_close(found.gradient[~above], plain.gradient[~above])
            torch.testing.assert_close(found.losses[~above], middle - plain.scores["redness"][~above])


def test_equalised_gradients_know_weights_but_no_units(gradient, proxy):
    settings = {"equalise": True, "scale": 0.5}
    small, large = (gradient({"proxy": proxy, "redness": Redness(f)}, **settings) for f in (1.0, 100.0))
    scale = float(norms(small.gradient).max())
    torch.testing.assert_close(small.gradient, large.gradient, rtol=0, atol=1e-5 * scale)
    # the losses stay the plain numbers
    torch.testing.assert_close(small.losses, -0.5 * (small.scores["proxy"] + small.scores["redness"]))
    plain = [gradient({"redness": Redness(factor)}) for factor in (1.0, 100.0)]
    torch.testing.assert_close(100 * plain[0].gradient, plain[1].gradient)


def test_an_equalised_gradient_has_the_norm_of_the_weight_at_the_image(gradient, proxy, model, world):
    """Against plain autograd, with each reward's gradient divided by its norm there."""
    latents, prompts = world
    leaf = latents.clone().requires_grad_()
    images, _ = model.decode_with_gradient(leaf)
    batch = RewardBatch(images, [p.text for p in prompts], [{}] * COUNT, torch.arange(COUNT))
    parts: dict[str, tuple[Reward, float]] = {"proxy": (proxy, 2.0), "redness": (Redness(), -0.5)}
    total = torch.zeros_like(images)
    for reward, weight in parts.values():
        (slope,) = torch.autograd.grad(reward.score(batch).scores.sum(), images, retain_graph=True)
        total -= weight * slope / norms(slope).view(-1, 1, 1, 1)
    (expected,) = torch.autograd.grad(images, leaf, total)
    found = gradient({k: r for k, (r, _) in parts.items()}, {k: w for k, (_, w) in parts.items()}, equalise=True)
    torch.testing.assert_close(found.gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_missing_score_has_no_gradient_and_disturbs_no_other_sample(gradient, proxy, world):
    """The slope of the missing score is NaN: it must not leak through a product with zero."""
    lost = {"proxy": proxy, "redness": Redness(missed=frozenset([world[1][1].text]))}
    for equalise in (False, True):
        whole = gradient({"proxy": proxy, "redness": Redness()}, equalise=equalise)
        found = gradient(lost, equalise=equalise)
        assert found.missing.tolist() == [False, True, False, False]
        assert found.scores["redness"].isnan().tolist() == found.missing.tolist()
        assert not found.scores["proxy"].isnan().any()
        assert found.losses[1] == 0
        assert (found.gradient[1] == 0).all()
        for i in (0, 2, 3):
            torch.testing.assert_close(found.gradient[i], whole.gradient[i], rtol=0, atol=1e-6)
            assert found.losses[i] == pytest.approx(float(whole.losses[i]), abs=1e-6)
    # with weight 0 its absence does not matter
    watched = gradient(lost, {"redness": 0.0})
    assert not watched.missing.any()
    assert watched.scores["redness"].isnan().tolist() == [False, True, False, False]


def test_a_gradient_that_is_not_finite_comes_back_as_it_is(gradient):
    def steep(images, prompts, metadata):
        flat = images.flatten(1).mean(dim=1)
        return (flat - flat.detach()).sqrt()  # 0, with an infinite slope

    steep.differentiable = True
    found = gradient({"steep": FunctionReward("steep", steep)})
    assert not found.missing.any()
    assert not found.gradient.isfinite().flatten(1).any()


def test_straight_through_reaches_further_than_the_clamp(gradient, world):
    loud = 8 * torch.randn(world[0].shape, generator=torch.Generator().manual_seed(1))
    hard, through = (
        gradient({"brightness": BrightnessReward()}, latents=loud, clamp=c) for c in ("hard", "straight_through")
    )
    assert (hard.saturated > 0.05).all()
    assert torch.equal(hard.saturated, through.saturated)
    assert torch.equal(hard.losses, through.losses)
    assert (norms(through.gradient - hard.gradient) > 0.1 * norms(hard.gradient)).all()


def test_gradient_passes_the_antialiased_resize_of_a_reward(model, proxy):
    """128 x 128 images for a network of 64 x 64: every latent pixel has its share."""
    latents = torch.randn(1, model.latent_shape[0], 32, 32, generator=torch.Generator().manual_seed(0))
    assert model.decode(latents).shape == (1, 3, 128, 128)
    found = image_gradient(
        model,
        {"proxy": proxy},
        {"proxy": RewardConfig("clip")},
        latents,
        [Prompt("a red circle")],
        [0],
        0,
        LossConfig(),
    )
    assert (found.gradient.abs().sum(dim=1) > 0).all()


def test_checkpointing_leaves_the_gradient_as_it_is(gradient, world):
    rewards = {"proxy": ProxyReward(0), "brightness": BrightnessReward()}
    rewards["proxy"].setup(torch.device("cpu"), torch.float32)
    settings = {name: RewardConfig(name) for name in rewards}
    model = load_model(ModelConfig(path="playground"))
    arguments = (model, rewards, settings, *world, [0] * COUNT, 0, LossConfig(image_batch=COUNT))
    before = image_gradient(*arguments)
    blocks = [model.pipe.vae.decoder.up_blocks[-1], rewards["proxy"].clip.model.visual.transformer.resblocks[-1]]
    calls: list[int] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(id(module)))
    enable_checkpointing(model, rewards, settings)
    after = image_gradient(*arguments)
    torch.testing.assert_close(after.gradient, before.gradient, rtol=0, atol=1e-5 * float(before.gradient.abs().max()))
    assert [calls.count(id(block)) for block in blocks] == [2 * COUNT, 2]  # the VAE takes one image at a time


def test_a_failing_backward_pass_names_the_reward(gradient):
    def spoilt(images, prompts, metadata):
        roots = images.mean(dim=(1, 2, 3)).exp()
        scores = roots * 1
        roots.add_(1)  # exp needs its result in the backward pass
        return scores

    def unrelated(images, prompts, metadata):
        return torch.ones(len(images), requires_grad=True)

    def broken(images, prompts, metadata):
        raise ZeroDivisionError("no")

    for function, message in (
        (spoilt, "failed in its backward pass: .*inplace"),
        (unrelated, "failed in its backward pass: .*not have been used"),
        (broken, "failed: ZeroDivisionError: no"),
    ):
        function.differentiable = True
        with pytest.raises(RewardError, match=f"^reward 'mine' {message}") as caught:
            gradient({"mine": FunctionReward("mine", function)})
        assert "\n" not in str(caught.value)


# -- what is refused at start --------------------------------------------------------------------------------------


class Rank(Redness):
    kind = "groupwise"


def test_rewards_without_a_usable_gradient_are_refused_by_name(proxy):
    rewards = {"jpeg": JPEGReward(), "proxy": proxy, "files": JPEGReward()}
    settings = {name: RewardConfig(name) for name in [*rewards, "rank"]}

    def refusal(**weights: float) -> str:
        chosen = {name: RewardConfig(name, weight=weights.get(name, 0.0)) for name in settings}
        with pytest.raises(UserError) as caught:
            check_differentiable(rewards, chosen)
        return str(caught.value)

    assert refusal(jpeg=1.0, proxy=1.0) == (
        "reward 'jpeg' has no gradient with respect to the image, which objective.type reward_gradient needs; give it "
        "weight 0 to only watch it, or train it with a policy gradient (preset flow_grpo, nft)"
    )
    assert refusal(jpeg=1.0, files=-1.0).startswith("rewards 'jpeg', 'files' have no gradient")
    check_differentiable(rewards, {name: RewardConfig(name, weight=float(name == "proxy")) for name in rewards})
    rewards["rank"] = Rank()
    assert "reward 'rank' judges whole groups" in refusal(rank=1.0)
    everything = refusal(jpeg=1.0, rank=1.0, proxy=1.0)
    assert "'jpeg' has no gradient" in everything
    assert "'rank' judges" in everything
    assert "\n" not in everything
    assert refusal(proxy=1.0).endswith("move it to eval_rewards")  # nor can it be watched in batches


REWARDS = {"proxy": RewardConfig("clip"), "redness": RewardConfig("x"), "jpeg": RewardConfig("jpeg", weight=0.0)}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "target", "value": 10},
        {"kind": "hinge", "value": {"proxy": 0.5, "redness": 2}, "clamp": "straight_through"},
        {"kind": "hinge", "value": {"proxy": 0.5, "redness": 2, "jpeg": 0}},
    ],
)
def test_sound_settings_pass(data):
    errors: list[str] = []
    config = build(LossConfig, data, "loss", errors)
    assert errors == []
    assert config.validate(REWARDS) == []


@pytest.mark.parametrize(
    ("config", "errors"),
    [
        (LossConfig(value=2.0), ["value: kind=negative has none"]),
        (LossConfig(kind="hinge"), ["value: kind=hinge needs the margin of rewards 'proxy', 'redness'"]),
        (LossConfig(kind="target", value={"proxy": 1.0}), ["value: kind=target needs the target of reward 'redness'"]),
        (
            LossConfig(kind="hinge", value={"proxi": 1.0, "redness": 1.0}),
            [
                "value.proxi: no reward has this name (did you mean 'proxy'?)",
                "value: kind=hinge needs the margin of reward 'proxy'",
            ],
        ),
        (LossConfig(scale=0.0, image_batch=0), ["scale: must be positive", "image_batch: must be at least 1"]),
    ],
)
def test_mistakes_are_named_all_at_once(config, errors):
    found = config.validate(REWARDS)
    assert len(found) == len(errors)
    for line, start in zip(found, errors, strict=True):
        assert line.startswith(start)


def test_a_negative_weight_has_no_target():
    rewards = {"proxy": RewardConfig("clip", weight=-1.0)}
    assert LossConfig().validate(rewards) == []
    for kind in ("target", "hinge"):
        (line,) = LossConfig(kind=kind, value=1.0).validate(rewards)
        assert line.startswith(f"kind: {kind} pulls every reward")
        assert "'proxy'" in line
