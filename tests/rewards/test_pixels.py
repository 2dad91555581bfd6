"""JPEG size and brightness."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardError, checked_score
from rewards.debug import BrightnessReward
from rewards.jpeg import JPEGReward


def test_jpeg_score_is_the_size_of_the_file_pillow_writes(make_batch):
    batch = make_batch(3, height=24, width=40)
    output = checked_score(JPEGReward("incompressibility"), batch)
    for image, score in zip(batch.images, output.scores, strict=True):
        pixels = np.round(255 * image.permute(1, 2, 0).numpy().astype(np.float64)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        assert score.item() == pytest.approx(len(buffer.getvalue()) / 1000)


def test_jpeg_prefers_flat_images_and_the_objectives_are_opposite(make_batch):
    batch = make_batch(2, height=32, width=32)
    batch.images[0] = 0.5
    smaller = checked_score(JPEGReward(), batch).scores
    larger = checked_score(JPEGReward("incompressibility"), batch).scores
    assert smaller[0] > smaller[1]
    assert torch.equal(smaller, -larger)
    assert torch.allclose(checked_score(JPEGReward(divisor=500), batch).scores, smaller / 500)


@pytest.mark.parametrize("reward", [JPEGReward(), BrightnessReward()])
def test_pixel_rewards_ignore_the_prompt_repeat_and_follow_a_permutation(make_batch, reward):
    batch = make_batch(4)
    first = checked_score(reward, batch).scores
    renamed = make_batch(4, prompts=["something else"] * 4)
    assert torch.equal(checked_score(reward, renamed).scores, first)
    assert torch.equal(checked_score(reward, batch).scores, first)
    assert torch.equal(checked_score(reward, batch.select(torch.tensor([3, 2, 1, 0]))).scores, first.flip(0))


def test_jpeg_cuts_the_gradient(make_batch):
    batch = make_batch(2)
    batch.images.requires_grad_()
    assert not checked_score(JPEGReward(), batch).scores.requires_grad


def test_brightness_is_the_mean_and_its_gradient_is_uniform(make_batch):
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.full((3, 8, 8), 0.25)]).requires_grad_()
    batch = make_batch(3, images=images)
    output = checked_score(BrightnessReward(), batch)
    assert output.scores.tolist() == [0.0, 1.0, 0.25]
    output.scores.sum().backward()
    assert torch.allclose(images.grad, torch.full_like(images, 1 / (3 * 8 * 8)))


def test_wrong_jpeg_arguments_are_named():
    with pytest.raises(RewardError, match="did you mean 'compressibility'"):
        JPEGReward("compresibility")
    with pytest.raises(RewardError, match=r"quality must be in 1\.\.100, got 0"):
        JPEGReward(quality=0)
    with pytest.raises(RewardError, match="divisor must be positive"):
        JPEGReward(divisor=0)
