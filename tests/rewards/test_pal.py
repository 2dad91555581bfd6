"""PAL: ideal points between prototypes, users from the metadata, and weights in its own file."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from rewards import RewardConfig, RewardError, build_reward, checked_score
from rewards.conformance import FAIL, check
from rewards.pal import angle_scores, distance_scores

CPU, FP32 = torch.device("cpu"), torch.float32
WIDTH = 16  # of the tiny CLIP's embeddings


def mlp(prefix, inputs, outputs=6):
    shapes = {"0.weight": (8, inputs), "0.bias": (8,), "2.weight": (outputs, 8), "2.bias": (outputs,)}
    return {f"{prefix}{key}": torch.randn(shape) for key, shape in shapes.items()}


@pytest.fixture
def make_reward(tmp_path, clip_config):
    def make(tensors, name="pal", ready=True, **changes):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        args = {"path": str(tmp_path / f"{name}.safetensors"), "clip": {"config": clip_config, "pretrained": "random"}}
        reward = build_reward("pal", RewardConfig("pal", args=args | changes))
        if ready:
            reward.setup(CPU, FP32)
        return reward

    return make


def pal_a(inputs=WIDTH, k=2):
    return mlp("f.", inputs) | {"prototypes": torch.randn(k, inputs)}


def pal_b(k=2, scale=2.0):
    return mlp("f.", WIDTH) | {key: x for i in range(k) for key, x in mlp(f"g.{i}.", WIDTH).items()} | {
        "logit_scale": torch.tensor(scale)
    }  # fmt: skip


def test_an_image_at_the_ideal_point_gets_the_most_there_is():
    prototypes, weights = torch.randn(3, 5), torch.softmax(torch.randn(4, 3), dim=1)
    ideal = weights @ prototypes
    assert distance_scores(ideal, prototypes, weights).tolist() == [0.0] * 4
    others = torch.randn(4, 5)
    scores = distance_scores(others, prototypes, weights)
    assert (scores < 0).all()
    # the triangle inequality: the farther image is no farther than the nearer one and the way between them
    between = (others - ideal.roll(1, 0)).norm(dim=1)
    assert (-distance_scores(ideal.roll(1, 0), prototypes, weights) <= -scores + between + 1e-5).all()


def test_with_one_prototype_all_users_agree():
    outputs, prototypes = torch.randn(4, 5), torch.randn(1, 5)
    assert torch.equal(distance_scores(outputs, prototypes, torch.ones(4, 1)), -(outputs - prototypes).norm(dim=1))


def test_the_scale_of_the_cosine_counts_up_to_100():
    outputs, weights = torch.tensor([[1.0, 0.0]]), torch.ones(1, 1)
    points = torch.tensor([[[1.0, 1.0]]])
    for scale, expected in ((math.log(10), 10.0), (math.log(100), 100.0), (9.0, 100.0)):
        score = angle_scores(outputs, points, weights, torch.tensor(scale))
        assert score.item() == pytest.approx(expected * math.sqrt(0.5), rel=1e-5)


@pytest.mark.parametrize(
    "tensors", [pal_a(), pal_a(2 * WIDTH, k=3), pal_b(), pal_b(k=1)], ids=["A", "joint", "B", "one"]
)
def test_users_are_mixtures_and_their_spread_is_the_uncertainty(make_reward, make_batch, tensors):
    reward = make_reward(tensors)
    batch = make_batch(4, 32, 32, prompts=["a red circle", "two blue square", "a star", "a ring"])
    k = reward.prototypes
    output = checked_score(reward, batch)
    each = torch.stack([output.components[f"prototype_{i}"] for i in range(k)], dim=1)
    torch.testing.assert_close(output.uncertainty, each.std(dim=1, correction=0))
    first = [1.0] + [0.0] * (k - 1)
    one = checked_score(reward, replace(batch, metadata=[{"user_weights": first}] * 4))
    torch.testing.assert_close(one.scores, each[:, 0])
    even = checked_score(reward, replace(batch, metadata=[{"user_weights": [1 / k] * k}] * 4))
    torch.testing.assert_close(even.scores, output.scores)
    fixed = make_reward(tensors, user_weights=first)
    torch.testing.assert_close(checked_score(fixed, batch).scores, each[:, 0])


def test_weights_that_are_no_mixture_leave_the_image_without_a_score(make_reward, make_batch):
    reward = make_reward(pal_a())
    given = [{"user_weights": w} for w in ([0.5, 0.5], [0.9, 0.9], [1.0], [-1.0, 2.0], "half", [None, 1.0])]
    output = checked_score(reward, make_batch(6, 32, 32, metadata=given))
    assert output.valid.tolist() == [True] + [False] * 5


@pytest.mark.parametrize("tensors", [pal_a(2 * WIDTH), pal_b()], ids=["A", "B"])
def test_it_keeps_the_contract_of_rewards(make_reward, tensors):
    assert [verdict for verdict in check(make_reward(tensors, ready=False)) if verdict.status == FAIL] == []


def test_a_file_that_does_not_fit_is_told(make_reward, tmp_path):
    for tensors, words in (
        (mlp("f.", 5) | {"prototypes": torch.randn(2, 5)}, "f takes 5 features, CLIP gives 16"),
        (mlp("f.", WIDTH) | {"prototypes": torch.randn(2, 5)}, r"prototypes must be of shape \(K, 16\)"),
        (mlp("f.", WIDTH), "holds no PAL model"),
        (mlp("f.", WIDTH) | {"logit_scale": torch.tensor(1.0)}, "there must be networks g.0, g.1"),
        ({"g.0.0.weight": torch.ones(1, 1)}, "holds no PAL model"),
    ):
        with pytest.raises(RewardError, match=words):
            make_reward(tensors)
    with pytest.raises(RewardError, match="user_weights must be 2 numbers"):
        make_reward(pal_a(), user_weights=[1.0])
