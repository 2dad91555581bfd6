"""A user's function as a reward: what may come back, and what is said when it may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rewards import FunctionReward, RewardError, checked_score

EXPECTED = torch.tensor([0.5, float("nan"), 2.0])


@pytest.mark.parametrize(
    "result",
    [
        [0.5, None, 2],
        (0.5, float("nan"), 2.0),
        [torch.tensor(0.5), None, np.float32(2)],
        np.array([0.5, np.nan, 2.0]),
        torch.tensor([0.5, torch.nan, 2.0], dtype=torch.float64),
    ],
)
def test_every_usual_sequence_of_numbers_is_accepted(make_batch, result):
    reward = FunctionReward("mine", lambda images, prompts, metadata: result)
    output = checked_score(reward, make_batch(3))
    assert torch.equal(output.scores.nan_to_num(-1), EXPECTED.nan_to_num(-1))
    assert output.scores.dtype is torch.float32
    assert output.valid.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.zeros((8, 1)), r"returned shape \(8, 1\), expected \(8,\): return one number per image"),
        (torch.zeros(()), r"returned shape \(\), expected \(8,\)"),
        ([1.0] * 7, r"returned 7 scores for 8 images"),
        ([[1.0]] * 8, r"returned list as score 0, expected a number or None"),
        (["good"] * 8, r"returned str as score 0"),
        (np.array(["a"] * 8), r"returned an array of <U1"),
        (1.0, r"returned float, expected a list or tensor of 8 numbers"),
        (None, r"returned NoneType"),
        ({"score": [1.0] * 8}, r"returned dict"),
        (torch.zeros(8, dtype=torch.float16), r"torch.float16 scores, expected torch.float32"),
    ],
)
def test_anything_else_is_one_clear_line(make_batch, result, message):
    reward = FunctionReward("mine", lambda images, prompts, metadata: result)
    with pytest.raises(RewardError, match=f"^reward 'mine' .*{message}") as caught:
        checked_score(reward, make_batch(8))
    assert "\n" not in str(caught.value)


def test_the_function_gets_images_prompts_metadata_and_its_arguments(make_batch):
    def score(images, prompts, metadata, *, factor):
        return [factor * (len(prompt) + entry["row"]) for prompt, entry in zip(prompts, metadata, strict=True)]

    output = checked_score(FunctionReward("mine", score, {"factor": 10}), make_batch(3))
    assert output.scores.tolist() == [80.0, 90.0, 100.0]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_function_can_declare_itself_differentiable(make_batch, as_list):
    def score(images, prompts, metadata):
        means = images.mean(dim=(1, 2, 3))
        return list(means) if as_list else means

    score.differentiable = True
    batch = make_batch(3)
    batch.images.requires_grad_()
    checked_score(FunctionReward("mine", score), batch).scores.sum().backward()
    assert batch.images.grad.abs().min() > 0
