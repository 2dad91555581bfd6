"""The adversarial reward: its losses, its snapshot, what an update changes, and that processes are no matter."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from rewards import RewardConfig, RewardError, build_reward, checked_score
from rewards.adversarial import cross_entropy_loss, drawn_patches, hinge_loss
from rewards.backbone import load_backbone
from rewards.conformance import FAIL, check

CPU, FP32 = torch.device("cpu"), torch.float32


def alone(x):
    """The sum over the processes of a run of one process."""
    return x


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Folder of a DINOv2 of two layers whose 9 patches of 14 pixels tell images apart."""
    torch.manual_seed(3)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(image_size=42, patch_size=14, layerscale_value=1.0, **size))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(5 if "embedding" in name else 2)
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_reward(dino):
    def make(**changes):
        args = {"backbone": str(dino), "hidden": 16, "patches": 4, "lr": 1e-2, "every": 1} | changes
        reward = build_reward("like", RewardConfig("adversarial", args=args))
        reward.setup(CPU, FP32)
        return reward

    return make


def test_a_head_that_says_nothing_has_the_known_losses():
    nothing = torch.zeros(5)
    assert hinge_loss(nothing, nothing).item() == 1.0
    assert cross_entropy_loss(nothing, nothing).item() == pytest.approx(1.3862944, abs=1e-6)
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -7.0])).item() == 0.0
    assert hinge_loss(torch.tensor([0.5]), torch.tensor([-1.0])).item() == pytest.approx(0.25)


def test_the_score_is_the_weighted_head_on_scaled_tokens_of_the_drawn_patches(make_reward, make_batch, dino):
    reward = make_reward(seed=5)
    batch = make_batch(4, 42, 42, step=7)
    with torch.no_grad():
        states = Dinov2Model.from_pretrained(dino)(load_pixels(batch.images)).last_hidden_state
    unit = states / states.pow(2).mean(dim=-1, keepdim=True).sqrt()
    values = reward.head(unit).squeeze(-1)
    rows = [drawn_patches(9, 4, 5, 7, int(g)) + 1 for g in batch.group_ids]
    local = torch.stack([value[row].mean() for value, row in zip(values, rows, strict=True)])
    found = checked_score(reward, batch)
    torch.testing.assert_close(found.scores, 0.7 * values[:, 0] + 0.3 * local, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.components["local"], local, atol=1e-5, rtol=1e-5)


def load_pixels(images):
    """As ImageNet networks are trained."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std


def test_patches_are_one_draw_for_a_group_and_another_for_the_next_group_and_iteration():
    draws = [
        drawn_patches(100, 8, 0, step, group).tolist() for step, group in ((0, 0), (0, 0), (0, 1), (1, 0), (-1, 0))
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4
    assert sorted(drawn_patches(5, 8, 0, 0, 0).tolist()) == [0, 1, 2, 3, 4]


def test_it_keeps_the_contract_of_rewards(make_reward, dino):
    args = {"backbone": str(dino), "hidden": 16, "patches": 4}
    reward = build_reward("adversarial", RewardConfig("adversarial", args=args))
    assert [verdict for verdict in check(reward) if verdict.status == FAIL] == []


@pytest.mark.parametrize("loss", ["hinge", "cross_entropy"])
def test_updates_learn_to_tell_the_two_kinds_apart(make_reward, make_batch, loss):
    reward = make_reward(loss=loss, steps=5)
    bright, dark = make_batch(8, 42, 42, seed=1).images * 0.5 + 0.5, make_batch(8, 42, 42, seed=2)
    dark = replace(dark, images=dark.images * 0.5)
    before = {key: value.clone() for key, value in reward.backbone.network.state_dict().items()}
    first = reward.update(dark, bright, alone)
    for step in range(1, 8):
        last = reward.update(replace(dark, step=step), bright, alone)
    assert first["accuracy"] < 1.0
    assert last["accuracy"] == 1.0
    assert last["loss"] < 0.5 * first["loss"]
    assert last["gap"] > abs(first["gap"])
    unseen = make_batch(4, 42, 42, seed=9)
    high = checked_score(reward, replace(unseen, images=unseen.images * 0.5 + 0.5)).scores
    assert (high > checked_score(reward, replace(unseen, images=unseen.images * 0.5)).scores).all()
    after = reward.backbone.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(p.requires_grad for p in reward.head.parameters())


def test_the_policys_own_iterations_measure_and_change_nothing(make_reward, make_batch):
    reward = make_reward(every=3)
    assert [reward.policy_turn(i) for i in range(6)] == [False, False, True, False, False, True]
    batch, real = make_batch(4, 42, 42, step=2), make_batch(4, 42, 42, seed=5).images
    before = {key: value.clone() for key, value in reward.state_dict().items()}
    assert set(reward.update(batch, real, alone)) == {"accuracy", "loss", "gap"}
    assert {key: value.tolist() for key, value in reward.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    reward.update(replace(batch, step=0), real, alone)
    assert not torch.equal(reward.state_dict()["head.0.weight"], before["head.0.weight"])


def test_scores_come_from_one_state_until_the_next_update(make_reward, make_batch):
    reward, batch = make_reward(), make_batch(4, 42, 42)
    before = checked_score(reward, batch).scores
    pieces = [checked_score(reward, batch.select(rows)).scores for rows in torch.arange(4).split(1)]
    torch.testing.assert_close(torch.cat(pieces), before)
    reward.update(batch, make_batch(4, 42, 42, seed=5).images, alone)
    assert (checked_score(reward, batch).scores != before).all()


def test_a_restored_reward_goes_on_bit_for_bit(make_reward, make_batch):
    whole, first = make_reward(), make_reward()
    batches = [(make_batch(4, 42, 42, seed=i, step=i), make_batch(4, 42, 42, seed=50 + i).images) for i in range(4)]
    for batch, real in batches:
        whole.update(batch, real, alone)
    for batch, real in batches[:2]:
        first.update(batch, real, alone)
    second = make_reward()
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for batch, real in batches[2:]:
        second.update(batch, real, alone)
    expected, found = whole.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    with pytest.raises(RewardError, match="another"):
        make_reward(hidden=8).load_state_dict(expected)


def test_uneven_shares_of_two_processes_train_like_one(make_reward, make_batch):
    batch, real = make_batch(8, 42, 42, step=3), make_batch(8, 42, 42, seed=5).images
    whole = make_reward(steps=2)
    expected = whole.update(batch, real, alone)
    shares, found = [torch.arange(0, 3), torch.arange(3, 8), torch.arange(0)], {}
    rewards = [make_reward(steps=2) for _ in shares]
    barrier, board = threading.Barrier(len(shares)), {}

    def process(rank):
        def total(x):
            board[rank] = x
            barrier.wait(60)
            summed = sum(board[i] for i in range(len(shares)))
            barrier.wait(60)
            return summed

        found[rank] = rewards[rank].update(batch.select(shares[rank]), real[shares[rank]], total)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rank in range(len(shares)):
        assert found[rank] == pytest.approx(expected, abs=1e-5)
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(rewards[rank].state_dict()[key], value, atol=1e-5, rtol=1e-4)
            assert torch.equal(rewards[rank].state_dict()[key], rewards[0].state_dict()[key])


def test_an_image_that_is_not_finite_teaches_nothing_and_spoils_nothing(make_reward, make_batch):
    batch, real = make_batch(4, 42, 42), make_batch(4, 42, 42, seed=5).images
    broken, clean = make_reward(), make_reward()
    spoilt = batch.images.clone()
    spoilt[3] = torch.nan
    broken.update(replace(batch, images=spoilt), real, alone)
    clean.update(batch.select(torch.arange(3)), real[:3], alone)
    for key, value in clean.state_dict().items():
        torch.testing.assert_close(broken.state_dict()[key], value)


def test_mistakes_are_told(tmp_path, dino):
    for args, words in (
        ({"loss": "hing"}, "did you mean 'hinge'"),
        ({"every": 0}, "every must be a positive integer"),
        ({"betas": [0.5]}, "betas must be two numbers"),
    ):
        with pytest.raises(RewardError, match=words):
            build_reward("like", RewardConfig("adversarial", args=args))
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        tmp_path
    )
    for given, words in (
        (str(tmp_path), "is of type 'vit'"),
        (str(tmp_path / "none" / "here"), "there is no folder"),
        ("jpeg", "a reward without an image network"),
    ):
        with pytest.raises(RewardError, match=words):
            load_backbone(given, FP32)
