"""From latents to images and rewards with gradient: the numbers of `decode`, and nothing that blocks a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.models.base import ImageModel, ModelConfig, load_model
from align.playground.data import to_tensor
from align.playground.proxy import ProxyReward
from align.playground.scenes import render, sample_scene
from rewards.clip import CLIPScore

CPU, FP32 = torch.device("cpu"), torch.float32
BOTH = pytest.mark.parametrize("path", ["playground", "playground-unet"])


def load(path: str = "playground", **settings: Any) -> ImageModel:
    """A shipped model: flow matching, or variance preserving with an end above t = 0."""
    return load_model(ModelConfig(path=path, **settings))


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    """Three rendered scenes (3, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng(0)
    return to_tensor(np.stack([render(sample_scene(rng)) for _ in range(3)])) / 2 + 0.5


def loud(model: ImageModel, count: int = 2) -> Tensor:
    """Latents far enough out that many pixels of their images are clamped."""
    return 8 * torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(1))


@BOTH
@pytest.mark.parametrize("slicing", [True, False])
@pytest.mark.parametrize("clamp", ["hard", "straight_through"])
def test_images_with_gradient_are_those_of_decode(path, slicing, clamp):
    model = load(path, vae_slicing=slicing)
    latents = loud(model).requires_grad_()
    images, saturated = model.decode_with_gradient(latents, clamp)
    torch.testing.assert_close(images.detach(), model.decode(latents.detach()), rtol=0, atol=1e-6)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert (saturated > 0.05).all()
    assert not saturated.requires_grad
    # an image has a gradient with respect to its own latent only, also where the VAE takes one image at a time
    (gradient,) = torch.autograd.grad(images[0].sum(), latents)
    assert gradient[0].abs().sum() > 0
    assert (gradient[1:] == 0).all()


def test_the_saturated_share_counts_the_values_that_were_cut():
    model = load()
    latents = loud(model)
    vae = model.pipe.vae
    with torch.no_grad():
        free = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    _, saturated = model.decode_with_gradient(latents)
    torch.testing.assert_close(saturated, (free.abs() > 1).float().mean(dim=(1, 2, 3)), rtol=0, atol=1e-4)


def test_a_clamped_pixel_has_a_gradient_only_straight_through():
    model = load()
    latents = loud(model, 1).requires_grad_()
    hard, _ = model.decode_with_gradient(latents, "hard")
    through, _ = model.decode_with_gradient(latents, "straight_through")
    clamped = (hard == 0) | (hard == 1)
    for chosen, same in ((clamped, False), (~clamped, True)):
        (blocked,) = torch.autograd.grad(hard[chosen].sum(), latents, retain_graph=True)
        (passed,) = torch.autograd.grad(through[chosen].sum(), latents, retain_graph=True)
        assert passed.abs().sum() > 0
        if same:
            torch.testing.assert_close(blocked, passed)
        else:
            assert (blocked == 0).all()


@BOTH
@pytest.mark.parametrize("slicing", [True, False])
def test_encoding_is_the_way_back_from_decode(path, slicing, scenes):
    model = load(path, vae_slicing=slicing)
    clean = model.encode_images(scenes)
    assert clean.shape == (3, *model.latent_shape)
    assert clean.dtype == torch.float32
    assert clean.std() == pytest.approx(1, abs=0.1)  # the scale that the denoiser was trained at
    final = clean * model.noise_scale(model.end_time)
    torch.testing.assert_close(model.clean(final), clean)
    vae = model.pipe.vae
    with torch.no_grad():
        plain = vae.decode(vae.encode(2 * scenes - 1).latent_dist.mode()).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(final), plain.clamp(0, 1), rtol=0, atol=1e-5)
    # the autoencoder's own error: 2 % of the range, a tenth of the spread of the scenes
    assert (model.decode(final) - scenes).square().mean().sqrt() < 0.03
    assert scenes.std() > 0.15
    assert torch.equal(model.encode_images(scenes), clean)  # the mode, not a sample


def calls_of(module: torch.nn.Module) -> list[None]:
    """A list that grows with every forward call of `module`."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def test_the_checkpointed_decoder_has_the_same_gradient_and_runs_twice():
    """diffusers checkpoints a VAE in eval mode too, wherever gradients are recorded."""
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = load()
        if checkpointing:
            model.pipe.vae.enable_gradient_checkpointing()
        assert not model.pipe.vae.training
        calls = calls_of(model.pipe.vae.decoder.up_blocks[-1])
        latents = loud(model, 1).requires_grad_()
        images, _ = model.decode_with_gradient(latents)
        (gradient,) = torch.autograd.grad(images.square().sum(), latents)
        gradients.append(gradient)
        counts.append(len(calls))
        model.decode(latents)
        assert len(calls) == counts[-1] + 1  # without gradient nothing is computed twice
    assert counts == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5 * float(gradients[0].abs().max()))


def test_the_checkpointed_reward_has_the_same_gradient_and_runs_twice(scenes):
    gradients, counts = [], []
    for checkpointing in (False, True):
        reward = ProxyReward(0)
        reward.setup(CPU, FP32)
        if checkpointing:
            reward.enable_checkpointing()
        calls = calls_of(reward.clip.model.visual.transformer.resblocks[0])
        leaf = scenes.clone().requires_grad_()
        scores = reward.similarity(leaf, ["a red circle"] * 3)
        gradients.append(torch.autograd.grad(scores.sum(), leaf)[0])
        counts.append(len(calls))
    assert counts == [1, 2]
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6 * float(gradients[0].abs().max()))


def test_an_image_tower_that_cannot_be_checkpointed_works_as_before(scenes):
    """A ResNet of open_clip has no such mode."""
    reward = CLIPScore(
        config={
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
            "text_cfg": {"context_length": 8, "width": 8, "heads": 2, "layers": 1},
        },
        pretrained="random",
    )
    reward.setup(CPU, FP32)
    before = reward.similarity(scenes, ["a red circle"] * 3)
    reward.enable_checkpointing()
    leaf = scenes.clone().requires_grad_()
    scores = reward.similarity(leaf, ["a red circle"] * 3)
    assert torch.equal(scores, before)
    assert torch.autograd.grad(scores.sum(), leaf)[0].abs().sum() > 0
