"""Remembered scores: the same as fresh ones, asked for once, forgotten in the order of their last use."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from rewards import Reward, RewardConfig, RewardError, RewardOutput, build_reward, checked_score, to_uint8
from rewards.cache import cache_key
from rewards.debug import BrightnessReward

SERVICE = runpy.run_path(str(Path(__file__).with_name("service.py")))


class Counting(Reward):
    """Brightness, with all that an output can have; it notes the size of each batch, and has no score of 'none'."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.sizes: list[int] = []

    def score(self, batch):
        self.sizes.append(len(batch))
        means = self.factor * batch.images.mean(dim=(1, 2, 3))
        scores = torch.where(torch.tensor([p == "none" for p in batch.prompts]), torch.nan, means)
        return RewardOutput(scores, components={"twice": 2 * means}, uncertainty=means / 10)


class Groups(Counting):
    kind = "groupwise"


def cached(kind: str = f"{__file__}:Counting", **args):
    reward = build_reward("kept", RewardConfig(type="cached", args={"type": kind, **args}))
    reward.setup(torch.device("cpu"), torch.float32)
    return reward


def test_the_second_answer_is_the_first_without_a_call(make_batch):
    reward, batch = cached(args={"factor": 3.0}), make_batch(4)
    first, second = checked_score(reward, batch), checked_score(reward, batch)
    assert reward.inner.sizes == [4]
    fresh = Counting(3.0).score(make_batch(4, images=to_uint8(batch.images).float().div(255)))
    for output in (first, second):
        assert torch.equal(output.scores, fresh.scores)
        assert torch.equal(output.components["twice"], fresh.components["twice"])
        assert torch.equal(output.uncertainty, fresh.uncertainty)


def test_only_new_images_are_judged_and_equal_ones_once(make_batch):
    reward, batch = cached(), make_batch(4)
    checked_score(reward, batch.select(torch.tensor([1, 3])))
    output = checked_score(reward, batch.select(torch.tensor([0, 1, 2, 0, 3])))
    assert reward.inner.sizes == [2, 2]
    assert torch.equal(output.scores[[0, 1, 2, 4]], checked_score(cached(), batch).scores)
    assert output.scores[3] == output.scores[0]


def test_images_that_round_alike_score_alike_whichever_came_first(make_batch):
    batch = make_batch(2)
    near = make_batch(2, images=to_uint8(batch.images).float().div(255) + 0.4 / 255)
    one, two = cached(), cached()
    assert torch.equal(checked_score(one, batch).scores, checked_score(two, near).scores)
    assert torch.equal(checked_score(one, near).scores, checked_score(two, batch).scores)
    assert one.inner.sizes == two.inner.sizes == [2]


def test_a_missing_score_is_asked_for_again(make_batch):
    reward, batch = cached(), make_batch(2, prompts=["none", "some"])
    for _ in range(2):
        assert checked_score(reward, batch).valid.tolist() == [False, True]
    assert reward.inner.sizes == [2, 1]


def test_the_least_recently_used_goes_first(make_batch):
    reward, batch = cached(size=2), make_batch(3)
    rows = [batch.select(torch.tensor([i])) for i in range(3)]
    for i in (0, 1, 0, 2):  # 1 is now the one that was not used for longest
        checked_score(reward, rows[i])
    assert len(reward.inner.sizes) == 3
    checked_score(reward, rows[0])
    assert len(reward.inner.sizes) == 3
    checked_score(reward, rows[1])
    assert len(reward.inner.sizes) == 4


def test_a_batch_above_the_size_is_answered_in_full(make_batch):
    assert checked_score(cached(size=2), make_batch(5)).valid.all()


def test_the_key_tells_apart_what_a_score_may_depend_on():
    pixels = torch.zeros(3, 2, 4, dtype=torch.uint8)
    other = pixels.clone()
    other[2, 1, 3] = 1
    keys = [
        cache_key(b"a", pixels, "p", {"x": 1}),
        cache_key(b"b", pixels, "p", {"x": 1}),
        cache_key(b"a", other, "p", {"x": 1}),
        cache_key(b"a", pixels.reshape(3, 4, 2), "p", {"x": 1}),
        cache_key(b"a", pixels, "q", {"x": 1}),
        cache_key(b"a", pixels, "p", {"x": 2}),
        cache_key(b"a", pixels, "p", {"x": "1"}),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(b"a", pixels, "p", {"y": 1, "x": 2}) == cache_key(b"a", pixels, "p", {"x": 2, "y": 1})


def test_it_spares_a_service_its_requests(make_batch):
    with SERVICE["served"](BrightnessReward()) as url, SERVICE["proxy"](url, lambda number, body: None) as front:
        reward = cached("remote", args={"url": front.url, "batch": 2})
        first = checked_score(reward, make_batch(6)).scores
        assert front.calls == 3
        assert torch.equal(checked_score(reward, make_batch(6)).scores, first)
        assert front.calls == 3
        assert reward.uses_prompt is False  # as the service told


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"type": f"{__file__}:Groups"}, "compares whole groups"),
        ({"type": "jpeg", "size": 0}, "size must be a positive integer"),
        ({"type": "jpeg", "args": {"qualiti": 3}}, "unknown argument 'qualiti'; did you mean 'quality'"),
        ({"type": "jepg"}, "did you mean 'jpeg'"),
    ],
)
def test_arguments(args, reason):
    with pytest.raises(RewardError, match=reason):
        build_reward("kept", RewardConfig(type="cached", args=args))
