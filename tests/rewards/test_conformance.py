"""The contract of rewards: what is built in keeps it, and each way of breaking it is named in the right words."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
from torch import nn

from rewards import FunctionReward, Reward, RewardConfig, RewardError, RewardOutput, build_reward, to_uint8
from rewards.clip import CLIPScore
from rewards.conformance import FAIL, NOT_APPLICABLE, PASS, check, sample_batch


def statuses(reward, batch=None) -> dict[str, str]:
    return {verdict.point: verdict.status for verdict in check(reward, batch)}


def failures(reward, batch=None) -> dict[str, str]:
    return {verdict.point: verdict.detail for verdict in check(reward, batch) if verdict.status == FAIL}


@pytest.mark.parametrize("name", ["brightness", "jpeg", "verifier", "proxy"])
def test_what_is_built_in_and_needs_no_download_keeps_the_contract(name):
    assert failures(build_reward(name, RewardConfig(type=name))) == {}


def test_clip_keeps_it_and_every_point_applies(clip_config):
    assert set(statuses(CLIPScore(config=clip_config, pretrained="random")).values()) == {PASS}


def test_the_sample_batch_is_the_same_every_time_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = sample_batch(), sample_batch()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.images, second.images)
    assert first.images.min() >= 0
    assert first.images.max() <= 1


class Mean(Reward):
    """Keeps the contract; the broken ones differ from it in one place."""

    differentiable = True
    uses_prompt = False

    def score(self, batch):
        return RewardOutput(self.value(batch))

    def value(self, batch):
        return batch.images.float().mean(dim=(1, 2, 3))


class Column(Mean):
    def value(self, batch):
        return super().value(batch)[:, None]


class Half(Mean):
    def value(self, batch):
        return super().value(batch).bfloat16()


class Infinite(Mean):
    def value(self, batch):
        means = super().value(batch)
        return torch.where(means < 0.15, torch.inf, means)


class Centred(Mean):
    def value(self, batch):
        return super().value(batch) - super().value(batch).mean()


class Places(Mean):
    def value(self, batch):
        return super().value(batch) + torch.arange(len(batch))


class Rounded(Mean):
    def value(self, batch):
        return to_uint8(batch.images).float().mean(dim=(1, 2, 3))


class Flat(Mean):
    def value(self, batch):
        return 0 * super().value(batch) + 1


class Rooted(Mean):
    def value(self, batch):
        images = batch.images
        return (images - images.detach()).abs().sum(dim=(1, 2, 3)).sqrt() + images.detach().mean(dim=(1, 2, 3))


class Eager(Mean):
    differentiable = False

    def value(self, batch):
        with torch.enable_grad():
            return super().value(batch)


class Writing(Mean):
    def value(self, batch):
        batch.images.data.mul_(0.5)  # .data hides it from autograd's own count
        return super().value(batch)


class Noting(Mean):
    def value(self, batch):
        batch.metadata[0]["seen"] = True
        return super().value(batch)


class Square(Mean):
    def value(self, batch):
        return batch.images.reshape(len(batch), 3, 64, 64).mean(dim=(1, 2, 3))


class Demanding(Mean):
    def value(self, batch):
        count = [entry["include"][0]["count"] for entry in batch.metadata]
        return super().value(batch) * torch.tensor(count)


class Reading(Mean):
    def value(self, batch):
        return super().value(batch) + torch.tensor([float(len(prompt)) for prompt in batch.prompts])


class Network(Mean):
    """A small network, with its place and its state to be spoiled by the classes below."""

    def setup(self, device, dtype):
        self.network = self.build().to(device).eval().requires_grad_(False)

    def build(self):
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def value(self, batch):
        return self.network(batch.images.mean(dim=(2, 3)))[:, 0]


class Early(Network):
    def __init__(self):
        self.network = self.build()


class Learning(Network):
    def setup(self, device, dtype):
        self.network = self.build().eval()


class Dropping(Network):
    def setup(self, device, dtype):
        self.network = self.build().train().requires_grad_(False)


BROKEN = [
    (Column, {"one score per image"}, "one score per image", r"shape \(6, 1\) for 6 images: .*flatten"),
    (Half, {"float32 scores"}, "float32 scores", "bfloat16: compute them in float32"),
    (Infinite, {"finite scores"}, "finite scores", "image [0-9] got inf: return NaN"),
    (Centred, {"size of the batch", "other samples", "one broken sample"}, "other samples", "score each image alone"),
    (Places, {"order of the batch", "size of the batch"}, "order of the batch", "score image i by image i"),
    (Rounded, {"gradient"}, "gradient", "says it is differentiable, but its scores do not depend on the images"),
    (Flat, {"gradient"}, "gradient", "gradient of the images is 0: no rounding"),
    (Rooted, {"gradient"}, "gradient", "not finite: look for sqrt"),
    (Eager, {"gradient"}, "gradient", "remove enable_grad"),
    (Writing, {"input left alone"}, "input left alone", r"work on batch.images.clone\(\)"),
    (Noting, {"input left alone"}, "input left alone", "changed batch.metadata"),
    (Square, {"image sizes"}, "image sizes", r"48 x 80 pixels .*accept any height and width"),
    (Demanding, {"one broken sample"}, "one broken sample", "no metadata stops all.*KeyError.*give NaN"),
    (Reading, {"prompts", "other samples"}, "prompts", "uses_prompt is False, and other prompts change"),
    (Early, {"loads in setup only"}, "loads in setup only", "built Sequential: build and load networks in setup"),
    (
        Learning,
        {"frozen parameters"},
        "frozen parameters",
        r"4 parameters require gradients: .*requires_grad_\(False\)",
    ),
]


@pytest.mark.parametrize(("kind", "points", "point", "words"), BROKEN, ids=[kind.__name__ for kind, *_ in BROKEN])
def test_a_broken_reward_fails_at_its_own_point_in_plain_words(kind, points, point, words):
    found = failures(kind())
    assert re.search(words, found[point]), found
    assert set(found) <= points, found
    assert all("\n" not in detail for detail in found.values())


def test_the_sound_one_passes_so_the_failures_are_of_the_difference():
    assert failures(Mean()) == {}
    assert failures(Network()) == {}


def test_a_dropout_that_is_on_shows_in_repetition_and_by_name():
    found = failures(Dropping())
    assert "switch dropout off" in found["repetition"]
    assert "call network.eval()" in found["evaluation mode"]


def test_random_numbers_must_come_from_a_state_that_is_saved():
    class Noisy(Mean):
        deterministic = False
        source = staticmethod(random.random)

        def value(self, batch):
            return super().value(batch) + 1e6 * self.source()

    class Outside(Noisy):
        source = staticmethod(random.SystemRandom().random)

    assert "repetition" not in failures(Noisy())
    assert "draw from torch, numpy.random or random" in failures(Outside())["repetition"]


def test_a_groupwise_reward_is_cut_at_groups_only():
    class Rank(Mean):
        kind = "groupwise"

        def value(self, batch):
            means = super().value(batch)
            groups = batch.group_ids[:, None] == batch.group_ids
            return means - torch.where(groups, means, 0.0).sum(dim=1) / groups.sum(dim=1)

    class Misnamed(Rank):
        kind = "pointwise"

    assert failures(Rank()) == {}
    assert {"size of the batch", "other samples"} <= set(failures(Misnamed()))


def test_after_a_setup_or_a_first_score_that_fails_the_rest_is_not_reached():
    class Absent(Mean):
        def setup(self, device, dtype):
            raise RewardError("there is no file weights.pt: place it there")

    found = check(Absent())
    assert [(v.point, v.detail) for v in found if v.status == FAIL] == [
        ("setup", "there is no file weights.pt: place it there")
    ]
    assert [v.status for v in found] == [PASS, FAIL, *[NOT_APPLICABLE] * (len(found) - 2)]
    assert len(found) == len(check(Mean())) - 1  # no first score, the rest is listed


def test_scores_for_no_image_at_all_are_a_failure_that_tells_the_reason():
    class Silent(Mean):
        def score(self, batch):
            return RewardOutput(torch.full((len(batch),), torch.nan), info={"problem": ["no quotes"] * len(batch)})

    assert "no image got a score (no quotes)" in failures(Silent())["finite scores"]


def test_a_function_and_a_small_batch_limit_are_checked_alike():
    def redness(images, prompts, metadata):
        return images[:, 0].mean(dim=(1, 2))

    redness.max_batch = 1
    assert failures(FunctionReward("redness", redness)) == {}


def test_a_given_batch_is_used_and_left_as_it_was():
    batch = sample_batch()
    batch = dataclasses.replace(batch.select(torch.arange(2)), prompts=["something", "else"])
    kept = batch.images.clone()
    assert statuses(Mean(), batch)["finite scores"] == PASS
    assert torch.equal(batch.images, kept)
    with pytest.raises(RewardError, match="at least 2 images"):
        check(Mean(), batch.select(torch.arange(1)))
