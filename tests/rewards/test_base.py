"""What `checked_score` promises of every reward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewards import Reward, RewardBatch, RewardError, RewardOutput, checked_score, to_uint8


class Table(Reward):
    """Scores given by the row number in the metadata; remembers the size of each call."""

    name = "table"

    def __init__(self, scores: list[float] | Tensor, max_batch: int = 64) -> None:
        self.scores = torch.as_tensor(scores)
        self.max_batch = max_batch
        self.calls: list[list[int]] = []

    def score(self, batch: RewardBatch) -> RewardOutput:
        rows = [entry["row"] for entry in batch.metadata]
        self.calls.append(rows)
        scores = self.scores[rows]
        return RewardOutput(scores, {"double": 2 * scores}, uncertainty=scores.abs(), info={"rows": rows})


class Broken(Reward):
    name = "broken"

    def __init__(self, result: object) -> None:
        self.result = result

    def score(self, batch: RewardBatch) -> RewardOutput:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result  # type: ignore[return-value]


def test_to_uint8_rounds_and_saturates():
    k = torch.arange(256)
    assert torch.equal(to_uint8(k / 255), k.to(torch.uint8))
    assert torch.equal(to_uint8((k[:-1] + 0.6) / 255), (k[:-1] + 1).to(torch.uint8))
    assert to_uint8(torch.tensor([-0.5, 1.7])).tolist() == [0, 255]


@pytest.mark.parametrize("max_batch", [1, 3, 5, 64])
def test_chunks_return_every_field_in_the_order_of_the_batch(make_batch, max_batch):
    scores = torch.randn(11, generator=torch.Generator().manual_seed(1))
    reward = Table(scores, max_batch)
    output = checked_score(reward, make_batch(11))
    assert torch.equal(output.scores, scores)
    assert torch.equal(output.components["double"], 2 * scores)
    assert output.uncertainty is not None
    assert torch.equal(output.uncertainty, scores.abs())
    assert output.info["rows"] == list(range(11))
    assert max(len(call) for call in reward.calls) == min(max_batch, 11)


def test_one_silent_chunk_does_not_silence_the_doubts_of_the_others(make_batch):
    class Sometimes(Reward):
        """Does not say how sure it is where a service gave no answer."""

        max_batch = 2

        def score(self, batch: RewardBatch) -> RewardOutput:
            if "lost" in batch.prompts:
                return RewardOutput(torch.full((len(batch),), torch.nan))
            return RewardOutput(torch.ones(len(batch)), uncertainty=torch.full((len(batch),), 0.5))

    output = checked_score(Sometimes(), make_batch(5, prompts=["a", "b", "lost", "lost", "c"]))
    assert output.uncertainty is not None
    torch.testing.assert_close(output.uncertainty, torch.tensor([0.5, 0.5, torch.nan, torch.nan, 0.5]), equal_nan=True)
    assert checked_score(Sometimes(), make_batch(3, prompts=["lost"] * 3)).uncertainty is None


def test_a_groupwise_reward_always_sees_whole_groups(make_batch):
    groups = torch.tensor([7, 2, 7, 2, 5, 7, 5, 9])
    reward = Table(torch.arange(8.0), max_batch=4)
    reward.kind = "groupwise"
    output = checked_score(reward, make_batch(8, group_ids=groups))
    assert torch.equal(output.scores, torch.arange(8.0))
    for group in groups.unique().tolist():
        rows = {row for row in range(8) if groups[row] == group}
        assert sum(rows <= set(call) for call in reward.calls) == 1
    assert max(len(call) for call in reward.calls) <= 4


def test_a_missing_score_is_nan_and_invalid_never_zero(make_batch):
    reward = Table([1.0, float("nan"), 3.0, 4.0])
    output = checked_score(reward, make_batch(4))
    assert output.valid.tolist() == [True, False, True, True]
    assert torch.isnan(output.scores).tolist() == [False, True, False, False]


def test_an_invalid_mark_hides_the_number(make_batch):
    reward = Broken(RewardOutput(torch.tensor([1.0, 2.0]), valid=torch.tensor([False, True])))
    output = checked_score(reward, make_batch(2))
    assert torch.isnan(output.scores[0])
    assert output.scores[1] == 2.0


def test_missing_scores_are_counted_and_a_batch_without_any_is_legal(make_batch):
    nan = float("nan")
    assert checked_score(Table([nan, nan, nan, 1.0], max_batch=2), make_batch(4)).valid.sum() == 1
    assert not checked_score(Table([nan] * 4, max_batch=2), make_batch(4)).valid.any()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (RewardOutput(torch.zeros(4, 1)), r"returned shape \(4, 1\), expected \(4,\): .*flatten"),
        (RewardOutput(torch.zeros(3)), r"returned shape \(3,\), expected \(4,\)"),
        (RewardOutput(torch.zeros(4, dtype=torch.bfloat16)), r"torch.bfloat16 scores, expected torch.float32"),
        (RewardOutput(torch.zeros(4, dtype=torch.float64)), r"torch.float64 scores, expected torch.float32"),
        (RewardOutput(torch.tensor([0.0, torch.inf, 0.0, 0.0])), r"returned inf for image 1"),
        (RewardOutput(torch.zeros(4), {"part": torch.zeros(2)}), r"component 'part' of shape \(2,\)"),
        (RewardOutput(torch.zeros(4), uncertainty=torch.tensor([0.0, -1.0, 0.0, 0.0])), r"negative uncertainty"),
        (RewardOutput(torch.zeros(4), uncertainty=torch.tensor([0.0, torch.inf, 0.0, 0.0])), r"infinite uncertainty"),
        (RewardOutput([0.0] * 4), r"scores of type list, expected a tensor"),
        (torch.zeros(4), r"returned Tensor, expected a RewardOutput"),
        (KeyError("target"), r"failed: KeyError: 'target'"),
    ],
)
def test_a_broken_reward_stops_with_one_line_that_names_it(make_batch, result, message):
    with pytest.raises(RewardError, match=f"^reward 'broken' .*{message}") as caught:
        checked_score(Broken(result), make_batch(4))
    assert "\n" not in str(caught.value)


def test_a_reward_must_not_write_to_the_images(make_batch):
    class Inverts(Reward):
        name = "inverts"

        def score(self, batch: RewardBatch) -> RewardOutput:
            return RewardOutput(batch.images.mul_(-1).mean(dim=(1, 2, 3)))

    with pytest.raises(RewardError, match="reward 'inverts' wrote to the images"):
        checked_score(Inverts(), make_batch(2))


def test_gradients_flow_only_through_a_differentiable_reward(make_batch):
    class Mean(Reward):
        name = "mean"
        max_batch = 2

        def score(self, batch: RewardBatch) -> RewardOutput:
            return RewardOutput(batch.images.mean(dim=(1, 2, 3)))

    batch = make_batch(5)
    batch.images.requires_grad_()
    reward = Mean()
    assert not checked_score(reward, batch).scores.requires_grad
    reward.differentiable = True
    checked_score(reward, batch).scores.sum().backward()
    pixels = batch.images[0].numel()
    assert torch.allclose(batch.images.grad, torch.full_like(batch.images, 1 / pixels))


def test_a_false_claim_of_differentiability_is_refused(make_batch):
    reward = Table(torch.arange(4.0))
    reward.differentiable = True
    batch = make_batch(4)
    batch.images.requires_grad_()
    with pytest.raises(RewardError, match="reward 'table' says it is differentiable"):
        checked_score(reward, batch)


def test_a_missing_score_puts_no_nan_into_the_gradient_of_the_others(make_batch):
    class Half(Reward):
        name = "half"
        differentiable = True

        def score(self, batch: RewardBatch) -> RewardOutput:
            return RewardOutput(batch.images.mean(dim=(1, 2, 3)), valid=torch.tensor([True, False]))

    batch = make_batch(2)
    batch.images.requires_grad_()
    output = checked_score(Half(), batch)
    output.scores[output.valid].sum().backward()
    assert torch.isfinite(batch.images.grad).all()
    assert batch.images.grad[1].abs().max() == 0


def test_a_batch_with_unequal_lengths_or_wrong_images_is_refused(make_batch):
    with pytest.raises(RewardError, match="4 images to score came with 3 prompts"):
        make_batch(4, prompts=["a"] * 3)
    with pytest.raises(RewardError, match=r"float \(B, 3, H, W\)"):
        make_batch(4, images=torch.zeros(4, 16, 16, 3))
    with pytest.raises(RewardError, match=r"torch.uint8"):
        make_batch(4, images=torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
