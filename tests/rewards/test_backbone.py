"""Frozen image networks: their tokens are those of the network itself, under every way to name one."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from align.playground.proxy import load_proxy
from rewards.backbone import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from rewards.preprocess import preprocess
from rewards.weights import CLIP_MEAN, CLIP_STD

CPU, FP32 = torch.device("cpu"), torch.float32
SIZE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
DINO = SIZE | {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 56)


@pytest.mark.parametrize(
    ("model", "mean", "std"),
    [
        (lambda: Dinov2Model(Dinov2Config(**DINO)), IMAGENET_MEAN, IMAGENET_STD),
        (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO)), IMAGENET_MEAN, IMAGENET_STD),
        (
            lambda: CLIPVisionModel(CLIPVisionConfig(**SIZE, intermediate_size=32, image_size=28, patch_size=14)),
            CLIP_MEAN,
            CLIP_STD,
        ),
    ],
    ids=["dinov2", "registers", "clip"],
)
def test_tokens_of_transformers_networks(tmp_path, images, model, mean, std):
    network = model().eval()
    network.save_pretrained(tmp_path)
    middle, last = load_backbone(str(tmp_path), FP32).to(CPU).tokens(images)
    with torch.no_grad():
        pixels = preprocess(images, (28, 28), mean, std)
        states = network(pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(last.image, states.last_hidden_state[:, 0])
    torch.testing.assert_close(last.patches, states.last_hidden_state[:, -4:])
    torch.testing.assert_close(middle.image, states.hidden_states[2][:, 0])
    assert middle.patches.shape == (3, 4, 16)


def test_tokens_of_an_open_clip_network_lead_to_its_own_embedding(images):
    proxy, backbone = load_proxy(), load_backbone("proxy", FP32).to(CPU)
    with torch.no_grad():
        last = backbone.tokens(images)[1]
        embedded = torch.nn.functional.normalize(last.image @ backbone.network.proj, dim=-1)
        torch.testing.assert_close(embedded, proxy.embed_images(images))
    assert last.patches.shape == (3, 64, 96)


@pytest.mark.parametrize("kind", ["dinov2", "proxy"])
def test_recomputed_activations_give_the_same_gradient(tmp_path, images, kind):
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**DINO)).save_pretrained(tmp_path)
    gradients = []
    for again in (False, True):
        backbone = load_backbone(str(tmp_path) if kind == "dinov2" else kind, FP32).to(CPU)
        if again:
            backbone.enable_checkpointing()
        pixels = images.clone().requires_grad_()
        middle, last = backbone.tokens(pixels)
        value = middle.patches.square().mean() + last.image.square().mean() + last.patches[:, 0].mean()
        gradients.append(torch.autograd.grad(value, pixels)[0])
        assert not any(p.requires_grad for p in backbone.network.parameters())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])
