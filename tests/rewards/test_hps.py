"""HPS v2 on a tiny open_clip network in the format of the published checkpoint."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from rewards import RewardConfig, RewardError, build_reward, checked_score, to_uint8
from rewards.clip import CLIPScore
from rewards.hps import HPSv2

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["a red circle", "two blue square", "a star left of a ring"]


@pytest.fixture(scope="module")
def published(clip_config, tmp_path_factory) -> tuple[CLIPScore, Path]:
    """A random network, and its weights in half precision under `state_dict` as in the published files."""
    clip = CLIPScore(config=clip_config, pretrained="random", seed=3)
    clip.setup(CPU, FP32)
    clip.clip.model.half().float()
    folder = tmp_path_factory.mktemp("hps")
    state = {key: value.half() for key, value in clip.clip.model.state_dict().items()}
    torch.save({"epoch": 4, "name": "hps", "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return clip, folder


@pytest.fixture(scope="module")
def hps(published, clip_config) -> HPSv2:
    args = {"path": str(published[1]), "config": clip_config}
    reward = build_reward("hps", RewardConfig(type="hps", args=args))
    reward.setup(CPU, FP32)
    return reward


@pytest.fixture
def images(smooth_images) -> torch.Tensor:
    return smooth_images(48, 80, (6, 10))


def test_score_is_the_cosine_of_padded_pil_images_without_logit_scale(hps, published, images, make_batch):
    clip = published[0].clip
    transform = image_transform_v2(PreprocessCfg(size=32, resize_mode="longest"), is_train=False)
    pictures = [Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()) for image in images]
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        features = clip.model.encode_image(pixels, normalize=True)
        texts = clip.model.encode_text(clip.tokenizer(PROMPTS), normalize=True)
    scores = checked_score(hps, make_batch(3, images=images, prompts=PROMPTS)).scores
    assert torch.allclose(scores, (features * texts).sum(-1), atol=1e-3)
    cropped = checked_score(published[0], make_batch(3, images=images, prompts=PROMPTS)).scores
    assert not torch.allclose(scores, cropped, atol=1e-2)


def test_a_square_image_scores_as_without_padding(hps, published, images, make_batch):
    batch = make_batch(3, images=images[..., 16:64], prompts=PROMPTS)
    assert torch.allclose(checked_score(hps, batch).scores, checked_score(published[0], batch).scores, atol=1e-6)


def test_the_network_sees_the_whole_of_a_wide_image_between_black_rows(published, clip_config, tmp_path, make_batch):
    """512 x 1024 into 224: 112 rows of picture between 56 black rows above and below, black being -mean / std."""
    config = clip_config | {"vision_cfg": clip_config["vision_cfg"] | {"image_size": 224, "patch_size": 56}}
    clip = CLIPScore(config=config, pretrained="random")
    clip.setup(CPU, FP32)
    torch.save({"state_dict": clip.clip.model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    reward = HPSv2(path=str(tmp_path), config=config)
    reward.setup(CPU, FP32)
    seen = []
    reward.clip.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    checked_score(reward, make_batch(1, images=torch.ones(1, 3, 512, 1024)))
    black = torch.tensor([-1.7922625, -1.7520971, -1.4802198]).view(3, 1, 1).expand(3, 56, 224)
    assert torch.allclose(seen[0][:, :56], black, atol=1e-5)
    assert torch.allclose(seen[0][:, 168:], black, atol=1e-5)
    assert (seen[0][:, 56:168] > 1).all()


def test_versions_are_different_files_of_one_folder(published, clip_config, tmp_path, images):
    other = CLIPScore(config=clip_config, pretrained="random", seed=4)
    other.setup(CPU, FP32)
    file = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": other.clip.model.state_dict()}, file)
    (tmp_path / "HPS_v2.1_compressed.pt").symlink_to(published[1] / "HPS_v2.1_compressed.pt")
    square = images[..., 16:64]
    for version, clip in (("v2.0", other), ("v2.1", published[0])):
        reward = HPSv2(version=version, path=str(tmp_path), config=clip_config)
        reward.setup(CPU, FP32)
        assert torch.allclose(reward.similarity(square, PROMPTS), clip.similarity(square, PROMPTS), atol=1e-6)
    by_file = HPSv2(path=str(file), config=clip_config)
    by_file.setup(CPU, FP32)
    assert torch.allclose(by_file.similarity(square, PROMPTS), other.similarity(square, PROMPTS), atol=1e-6)


def test_each_image_meets_its_own_prompt_only(hps, images, make_batch):
    together = checked_score(hps, make_batch(3, images=images, prompts=PROMPTS)).scores
    batches = [make_batch(1, images=images[i : i + 1], prompts=PROMPTS[i : i + 1]) for i in range(3)]
    alone = torch.cat([checked_score(hps, batch).scores for batch in batches])
    backwards = checked_score(hps, make_batch(3, images=images.flip(0), prompts=PROMPTS[::-1])).scores
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together, backwards.flip(0), atol=1e-6)


def test_gradient_of_one_pixel_equals_the_finite_difference(published, clip_config, images):
    reward = HPSv2(path=str(published[1]), config=clip_config)
    reward.setup(CPU, torch.float64)
    leaf = images[:1].double().requires_grad_()
    reward.similarity(leaf, PROMPTS[:1]).sum().backward()
    gradient = leaf.grad[0]
    assert torch.isfinite(gradient).all()
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(leaf.detach())
    step[0][pixel] = 1e-4
    with torch.no_grad():
        up, down = (reward.similarity(leaf + sign * step, PROMPTS[:1]).item() for sign in (1, -1))
    # Central difference: truncation is about step^2 = 1e-8, rounding about 1e-16 / step = 1e-12.
    assert (up - down) / 2e-4 == pytest.approx(gradient[pixel].item(), rel=1e-4)


def test_a_gradient_reaches_every_image_also_with_checkpointing(published, clip_config, images, make_batch):
    gradients = []
    for recompute in (False, True):
        reward = HPSv2(path=str(published[1]), config=clip_config)
        reward.setup(CPU, FP32)
        if recompute:
            reward.enable_checkpointing()
        batch = make_batch(3, images=images.clone().requires_grad_(), prompts=PROMPTS)
        checked_score(reward, batch).scores.sum().backward()
        assert (batch.images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
        gradients.append(batch.images.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-7)


def test_scores_of_a_network_in_bfloat16_are_float32(published, clip_config, images, make_batch):
    reward = HPSv2(path=str(published[1]), config=clip_config)
    reward.setup(CPU, torch.bfloat16)
    assert checked_score(reward, make_batch(3, images=images, prompts=PROMPTS)).scores.dtype is torch.float32


def test_without_a_config_the_network_is_open_clips_vit_h_14_with_ordinary_gelu():
    reward = HPSv2()
    assert (reward.model_name, reward.version) == ("ViT-H-14", "v2.1")
    architecture = open_clip.get_model_config(reward.model_name)
    assert (architecture["embed_dim"], architecture["vision_cfg"]["layers"]) == (1024, 32)
    assert not architecture.get("quick_gelu", False)


def test_what_is_missing_is_one_line_that_says_where_to_get_it(clip_config, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    remedy = "get HPS_v2.1_compressed.pt from https://huggingface.co/xswu/HPSv2 and set path to its path"
    cases = [
        ({}, f"not on this machine and could not be downloaded: {remedy}"),
        ({"path": "lost.pt"}, f"there is no file lost.pt: {remedy}"),
        ({"path": str(tmp_path)}, f"has no HPS_v2.1_compressed.pt: {remedy}"),
        ({"path": str(tmp_path / "other.pt")}, "do not fit"),
    ]
    for args, message in cases:
        with pytest.raises(RewardError, match=f"^reward 'hps': .*{message}") as caught:
            HPSv2(config=clip_config, **args).setup(CPU, FP32)
        assert "\n" not in str(caught.value)
    with pytest.raises(RewardError, match=r"version 'v2' must be v2.0 or v2.1; did you mean 'v2.\d'\?"):
        HPSv2(version="v2")
