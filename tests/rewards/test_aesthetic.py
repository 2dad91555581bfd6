"""The two aesthetic predictors on tiny networks in the formats of the published files."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from rewards import RewardConfig, RewardError, build_reward, checked_score, to_uint8

CPU, FP32 = torch.device("cpu"), torch.float32
TYPES = ["aesthetic", "aesthetic_v25"]
FILES = {"aesthetic": "sac+logos+ava1-l14-linearMSE.pth", "aesthetic_v25": "aesthetic_predictor_v2_5.pth"}
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = WIDTH | {"vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7, "pad_token_id": 7}


def trained_head(kind: str, width: int) -> nn.Module:
    """The published architecture, dropout and all, with the published names; only the widths are small."""
    linear, dropout = nn.Linear, nn.Dropout
    if kind == "aesthetic":
        layers = (linear(width, 8), dropout(0.2), linear(8, 8), dropout(0.2), linear(8, 8), dropout(0.1), linear(8, 4))
        return nn.ModuleDict({"layers": nn.Sequential(*layers, linear(4, 1))})
    layers = (linear(width, 8), dropout(0.5), linear(8, 8), dropout(0.5), linear(8, 8), dropout(0.5), linear(8, 4))
    return nn.ModuleDict({"scoring_head": nn.Sequential(*layers, dropout(0.2), linear(4, 1))})


def backbone(kind: str) -> nn.Module:
    """2 + 2 layers for 32 x 32 pixels, with weights far from the tiny values at which training starts."""
    vision = WIDTH | {"image_size": 32, "patch_size": 8}
    if kind == "aesthetic":
        model: nn.Module = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=vision))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(5 if "embedding" in name else 2)
    return model.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, tuple[nn.Module, nn.Module, dict[str, str]]]:
    """Name -> (backbone, head, arguments of the reward)."""
    found = {}
    for kind in TYPES:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(2)
        model, head = backbone(kind), trained_head(kind, 16 if kind == "aesthetic" else 32).eval()
        model.save_pretrained(folder / "backbone")
        torch.save(OrderedDict(head.state_dict()), folder / FILES[kind])
        found[kind] = (model, head, {"path": str(folder / FILES[kind]), "backbone": str(folder / "backbone")})
    return found


@pytest.fixture
def images() -> torch.Tensor:
    """(3, 3, 48, 40) of the 256 levels of a file: smooth, so that resizing does not only filter noise."""
    noise = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(5))
    smooth = F.interpolate(noise, size=(48, 40), mode="bilinear").clamp(0, 1)
    return smooth.mul(255).round().div(255)


def loaded(published, kind, dtype=FP32, **changes):
    reward = build_reward(kind, RewardConfig(type=kind, args=published[kind][2] | changes))
    reward.setup(CPU, dtype)
    return reward


@pytest.mark.parametrize("kind", TYPES)
def test_score_is_that_of_the_published_code_path_on_pil_images(published, images, make_batch, kind):
    """transformers' own processor and model, features of unit norm, the head with its dropout in eval mode."""
    model, head, _ = published[kind]
    if kind == "aesthetic":
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        processor = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=3)
    pictures = [Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()) for image in images]
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output
        (layers,) = head.values()
        expected = layers(F.normalize(features, dim=-1)).squeeze(-1)
    scores = checked_score(loaded(published, kind), make_batch(3, images=images)).scores
    assert torch.allclose(scores, expected, atol=1e-3)
    assert expected.std() > 3e-3


@pytest.mark.parametrize("kind", TYPES)
def test_the_prompt_and_the_company_do_not_matter_and_no_dropout_can_be_on(published, images, make_batch, kind):
    reward = loaded(published, kind)
    assert not reward.uses_prompt
    expected = checked_score(reward, make_batch(3, images=images)).scores
    other = make_batch(3, images=images.flip(0), prompts=["a", "b", "c"])
    assert torch.allclose(checked_score(reward, other).scores.flip(0), expected, atol=1e-6)
    alone = [checked_score(reward, make_batch(1, images=images[i : i + 1])).scores for i in range(3)]
    assert torch.allclose(torch.cat(alone), expected, atol=1e-6)
    reward.head.train()  # as a parent module would
    assert torch.equal(checked_score(reward, make_batch(3, images=images)).scores, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_gradient_of_one_pixel_equals_the_finite_difference(published, images, kind):
    reward = loaded(published, kind, torch.float64)
    leaf = images[:1].double().requires_grad_()
    reward.rate(leaf).sum().backward()
    gradient = leaf.grad[0]
    assert torch.isfinite(gradient).all()
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(leaf.detach())
    step[0][pixel] = 1e-4
    with torch.no_grad():
        up, down = (reward.rate(leaf + sign * step).item() for sign in (1, -1))
    # Central difference: truncation is about step^2 = 1e-8, rounding about 1e-16 / step = 1e-12.
    assert (up - down) / 2e-4 == pytest.approx(gradient[pixel].item(), rel=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_checkpointing_computes_layers_twice_and_changes_no_gradient(published, images, make_batch, kind):
    gradients, calls = [], []
    for recompute in (False, True):
        reward = loaded(published, kind)
        if recompute:
            reward.enable_checkpointing()
        seen = []
        layers = next(module for name, module in reward.network.named_modules() if name.endswith("encoder.layers"))
        layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        batch = make_batch(3, images=images.clone().requires_grad_())
        checked_score(reward, batch).scores.sum().backward()
        assert all(not weight.requires_grad for weight in [*reward.network.parameters(), *reward.head.parameters()])
        calls.append(len(seen))
        gradients.append(batch.images.grad)
    assert calls == [1, 2]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8)
    assert (gradients[0].abs().sum(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("kind", TYPES)
def test_in_bfloat16_only_the_backbone_is_rounded(published, images, make_batch, kind):
    reward = loaded(published, kind, torch.bfloat16)
    assert next(reward.network.parameters()).dtype is torch.bfloat16
    assert reward.head[0].weight.dtype is FP32
    assert checked_score(reward, make_batch(3, images=images)).scores.dtype is FP32


def test_a_head_with_activations_is_refused(published, tmp_path):
    """The authors' other heads have a ReLU after each layer and so their layers at other places of the list."""
    linear, relu, dropout = nn.Linear, nn.ReLU, nn.Dropout
    layers = nn.Sequential(linear(16, 8), relu(), dropout(0.2), linear(8, 4), relu(), linear(4, 1))
    torch.save(nn.ModuleDict({"layers": layers}).state_dict(), tmp_path / "ava+logos-l14-reluMSE.pth")
    with pytest.raises(
        RewardError, match=r"^reward 'aesthetic': .*reluMSE.pth: the weights are not of this head: layers"
    ):
        loaded(published, "aesthetic", path=str(tmp_path / "ava+logos-l14-reluMSE.pth"))


def test_a_head_of_another_backbone_is_refused(published, tmp_path):
    tensors = torch.load(published["aesthetic"][2]["path"], weights_only=True)
    places = {
        f"layers.{old}.": f"scoring_head.{new}." for old, new in zip((0, 2, 4, 6, 7), (0, 2, 4, 6, 8), strict=True)
    }
    file = tmp_path / "aesthetic_predictor_v2_5.pth"
    torch.save({places[key[:9]] + key[9:]: value for key, value in tensors.items()}, file)
    with pytest.raises(RewardError, match="backbone gives 32 features, the head .* takes 16"):
        loaded(published, "aesthetic_v25", path=str(tmp_path))


def test_a_file_that_would_run_code_is_refused(published, tmp_path):
    torch.save({"layers.0.weight": Path("code")}, tmp_path / "harmful.pth")
    with pytest.raises(RewardError, match=r"^reward 'aesthetic': .*harmful.pth cannot be read") as caught:
        loaded(published, "aesthetic", path=str(tmp_path / "harmful.pth"))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_one_line_that_says_where_to_get_it(published, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    page = "https://github.com/christophschuhmann/improved-aesthetic-predictor and set path to its path"
    cases = [
        ("aesthetic", {"path": "camenduru/improved-aesthetic-predictor"}, page),
        ("aesthetic", {"backbone": "openai/clip-vit-large-patch14"}, "into a folder and set backbone to its path"),
        (
            "aesthetic_v25",
            {"path": str(tmp_path)},
            "has no aesthetic_predictor_v2_5.pth: get .* from https://github.com/",
        ),
        ("aesthetic_v25", {"backbone": "no/such/folder"}, "there is no folder no/such/folder: backbone is a folder"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(RewardError, match=f"^reward '{kind}': .*{message}") as caught:
            loaded(published, kind, **changes)
        assert "\n" not in str(caught.value)


def test_the_head_under_the_agpl_has_no_default():
    with pytest.raises(RewardError, match="args must give path"):
        build_reward("nice", RewardConfig(type="aesthetic_v25"))
