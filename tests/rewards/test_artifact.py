"""The artifact detector: its regression and splits, and what it makes of images it has not seen."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from align.playground.artifacts import KINDS, clean_images, corrupted
from rewards import RewardConfig, RewardError, build_reward, checked_score
from rewards.artifact import (
    ArtifactHead,
    ArtifactReward,
    deal,
    features,
    fit_head,
    interval,
    logistic_fit,
    probe_image,
    quality,
)
from rewards.backbone import load_backbone
from rewards.conformance import FAIL, check

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Folder of a detector that was fitted to 60 images of each kind, by their texture."""
    clean, others = clean_images(120, seed=1).split(60)
    found = features(torch.cat([clean, corrupted(others, seed=1)]), 64, None)
    labels = torch.arange(120) < 60
    probe = features(probe_image(64), 64, None)[0]
    folder = tmp_path_factory.mktemp("detector")
    fit_head(found, labels, range(120), 64, None, probe).save(folder)
    return folder


@pytest.fixture
def reward(detector):
    reward = build_reward("clean", RewardConfig("artifact", args={"path": str(detector)}))
    reward.setup(CPU, FP32)
    return reward


def test_images_of_other_scenes_are_told_apart(detector, reward, make_batch):
    clean = clean_images(20, seed=2)
    good, bad = (checked_score(reward, make_batch(20, images=images)) for images in (clean, corrupted(clean, seed=2)))
    measured = quality(torch.cat([good.scores, bad.scores]).double(), (torch.arange(40) < 20).double())
    assert measured["auc"] > 0.85
    assert measured["accuracy"] > 0.75
    assert (good.scores > bad.scores).double().mean() > 0.85
    about = json.loads((detector / "artifact_head.json").read_text())
    assert about["held_out"]["clean"] == about["held_out"]["artifact"] == 12
    assert abs(about["held_out"]["auc"] - measured["auc"]) < 0.15


def test_the_score_is_clipped_log_odds_or_their_probability(detector, make_batch):
    images = torch.cat([clean_images(10, seed=3), corrupted(clean_images(10, seed=3), seed=3)])
    batch = make_batch(20, images=images)
    outputs = []
    for args in ({}, {"output": "probability"}, {"clip": 2.0}):
        reward = build_reward("clean", RewardConfig("artifact", args={"path": str(detector)} | args))
        reward.setup(CPU, FP32)
        outputs.append(checked_score(reward, batch))
    odds = outputs[0].components["log_odds"]
    assert odds.abs().max() > 2
    assert torch.equal(outputs[0].scores, odds.clamp(-6, 6))
    assert torch.equal(outputs[2].scores, odds.clamp(-2, 2))
    torch.testing.assert_close(outputs[1].scores, torch.sigmoid(odds))
    assert torch.equal(outputs[0].components["p_clean"], outputs[1].scores)


def test_a_hopeless_image_keeps_its_gradient_and_a_surely_clean_one_has_none(detector, make_batch):
    reward = build_reward("clean", RewardConfig("artifact", args={"path": str(detector), "clip": 2.0}))
    reward.setup(CPU, FP32)
    images = torch.cat([clean_images(12, seed=4), corrupted(clean_images(12, seed=4), seed=4)]).requires_grad_()
    output = checked_score(reward, make_batch(24, images=images))
    odds = output.components["log_odds"]
    low, high = odds.argmin(), odds.argmax()
    assert odds[low] < -2
    assert odds[high] > 2
    (gradient,) = torch.autograd.grad(output.scores.sum(), images)
    assert gradient[low].abs().sum() > 0
    assert gradient[high].abs().sum() == 0
    small = gradient[low] / gradient[low].norm() * 1e-3
    with torch.no_grad():
        moved = reward.log_odds((images[low] + small).unsqueeze(0))
    assert moved > odds[low]


def check_gradient_of_one_pixel(path, batch):
    """d score / d image of the detector in the folder `path` is its finite difference, where the clip cuts nothing."""
    reward = ArtifactReward(str(path), clip=1e3)
    reward.setup(CPU, torch.float64)
    leaf = batch.images[:1].double().requires_grad_()
    reward.score(replace(batch, images=leaf)).scores.sum().backward()
    gradient = leaf.grad[0]
    pixel = np.unravel_index(int(gradient.abs().argmax()), gradient.shape)
    step = torch.zeros_like(leaf.detach())
    step[0][pixel] = 1e-6
    with torch.no_grad():
        up, down = (reward.log_odds(leaf + sign * step).item() for sign in (1, -1))
    # The log of a cell's contrast bends within sqrt(1e-5) = 3e-3: truncation is about (step / 3e-3)^2 = 1e-7, rounding
    # about 1e-15 / step = 1e-9.
    assert (up - down) / 2e-6 == pytest.approx(gradient[pixel].item(), rel=1e-4)


def test_gradient_of_one_pixel_equals_the_finite_difference(detector, make_batch):
    # not of a drawn image: its flat cells are equally smooth, and a quantile of equal values has a kink
    check_gradient_of_one_pixel(detector, make_batch(1))


def test_it_keeps_the_contract_of_rewards(detector):
    found = build_reward("artifact", RewardConfig("artifact", args={"path": str(detector)}))
    assert [verdict for verdict in check(found) if verdict.status == FAIL] == []


def test_logistic_regression_finds_the_known_optimum():
    """With equal means but for one feature, and balanced classes: the odds of two normal distributions of one std."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(4000) % 4 == 0).double()
    values = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    values[:, 1] += 2 * labels
    weight, bias = logistic_fit(values, labels, 1e-6)
    assert weight.tolist() == pytest.approx([0.0, 2.0, 0.0], abs=0.25)
    assert bias.item() == pytest.approx(-2.0, abs=0.25)
    shifted, offset = logistic_fit(values * torch.tensor([1.0, 10.0, 1.0]) + 3, labels, 1e-6)
    torch.testing.assert_close(shifted * torch.tensor([1.0, 10.0, 1.0]), weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close((values * torch.tensor([1.0, 10.0, 1.0]) + 3) @ shifted + offset, values @ weight + bias,
                               atol=1e-2, rtol=1e-2)  # fmt: skip


def test_quality_has_known_values():
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert quality(torch.tensor([2.0, 1.0, -1.0, -2.0]), labels) == {"accuracy": 1.0, "auc": 1.0} | {
        "log_loss": pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))) / 2)
    }
    assert quality(torch.zeros(4), labels) == {"accuracy": 0.5, "auc": 0.5, "log_loss": pytest.approx(np.log(2))}
    assert quality(torch.tensor([0.0, 3.0, 1.0, -1.0]), labels)["auc"] == 0.75


def test_the_interval_of_a_share_has_known_values():
    assert interval(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert interval(1.0, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)


def test_folds_are_even_and_keep_a_picture_with_its_damaged_copy():
    clean = [True] * 30 + [False] * 20
    units = [*range(30), *range(10), *range(100, 110)]  # the first ten pictures are there twice
    folds = deal(clean, units, 5, seed=3)
    assert torch.equal(folds[:10], folds[30:40])
    for fold in range(5):
        of = folds == fold
        assert int(of[:30].sum()) == 6
        assert int(of[30:].sum()) == 4
    assert not torch.equal(folds, deal(clean, units, 5, seed=4))


def test_tokens_of_a_network_are_used_where_they_tell_what_texture_does_not(tmp_path, make_batch):
    """Clean is what has its brighter half on the left, which no statistic of the texture sees."""
    torch.manual_seed(1)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, layerscale_value=1.0, **size)).save_pretrained(
        tmp_path / "dino"
    )
    network = load_backbone(str(tmp_path / "dino"), FP32).to(CPU)
    ramp = torch.linspace(1, 0, 32).expand(60, 3, 32, 32) * torch.rand(60, 1, 1, 1)
    images = torch.cat([ramp, ramp.flip(-1)]) * 0.8 + 0.05 * torch.rand(120, 3, 32, 32)
    found, probe = features(images, 32, network), features(probe_image(32), 32, network)[0]
    head = fit_head(found, torch.arange(120) < 60, [*range(60), *range(60)], 32, str(tmp_path / "dino"), probe)
    assert head.backbone == str(tmp_path / "dino")
    assert head.about["held_out"]["auc"] > 0.9
    head.save(tmp_path / "head")
    reward = ArtifactReward(str(tmp_path / "head"))
    reward.setup(CPU, FP32)
    expected = found @ head.weight + head.bias
    output = checked_score(reward, make_batch(120, images=images))
    torch.testing.assert_close(output.components["log_odds"], expected, atol=1e-3, rtol=1e-3)
    check_gradient_of_one_pixel(tmp_path / "head", make_batch(1, images=images[:1]))
    # another network under the same name is noticed
    torch.manual_seed(2)
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, layerscale_value=1.0, **size)).save_pretrained(
        tmp_path / "dino"
    )
    with pytest.raises(RewardError, match="fit it again"):
        ArtifactReward(str(tmp_path / "head")).setup(CPU, FP32)


def test_every_kind_of_artifact_changes_the_image_and_is_drawn_from_its_seed():
    image = clean_images(1)[0]
    for kind in KINDS.values():
        drawn = [kind(image, np.random.default_rng(seed)) for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert (drawn[0] - image).abs().mean() > 1e-3


def test_mistakes_are_told(tmp_path):
    for args, words in (({"output": "odds"}, "did you mean 'log_odds'"), ({"clip": 0}, "clip must be positive")):
        with pytest.raises(RewardError, match=words):
            build_reward("clean", RewardConfig("artifact", args={"path": "x"} | args))
    with pytest.raises(
        RewardError, match="get artifact_head.safetensors from a folder that `align fit-artifact` wrote"
    ):
        ArtifactReward(str(tmp_path)).setup(CPU, FP32)
    ArtifactHead(torch.ones(3), 0.0, 64, None, torch.ones(3)).save(tmp_path)
    with pytest.raises(RewardError, match="other features than the texture"):
        ArtifactReward(str(tmp_path)).setup(CPU, FP32)
    (tmp_path / "artifact_head.json").write_text("{}")
    with pytest.raises(RewardError, match="no artifact detector that can be read"):
        ArtifactReward(str(tmp_path)).setup(CPU, FP32)
