"""Scores as every process sees them: missing ones, failures, order."""

import pytest
import torch
from accelerate import Accelerator

from align.errors import UserError
from align.prompts import Prompt
from align.scoring import gather_scores, score_local, try_score
from rewards.base import Reward, RewardError, RewardOutput
from rewards.combine import combine
from rewards.function import FunctionReward

PROMPTS = [Prompt("a", {"n": 1}), Prompt("b", {"n": 2}), Prompt("c", {"n": 3}), Prompt("d", {"n": 4})]
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def from_metadata(images, prompts, metadata):
    return [None if row["n"] == 2 else float(row["n"]) for row in metadata]


class Unsure(Reward):
    """Has a number for the last image, and says itself that it does not count."""

    def score(self, batch):
        return RewardOutput(torch.ones(len(batch)), valid=torch.arange(len(batch)) < len(batch) - 1)


def local(**rewards):
    named = {k: FunctionReward(k, r) if callable(r) and not isinstance(r, Reward) else r for k, r in rewards.items()}
    return try_score(named, IMAGES, PROMPTS, [0, 0, 1, 1], 0)


def test_a_missing_score_is_invalid_and_never_a_number(accelerator):
    scores = gather_scores(accelerator, local(f=from_metadata, u=Unsure()), ["f", "u"], [0, 1, 2, 3], 4)
    assert scores.valid["f"].tolist() == [True, False, True, True]
    assert scores.values["f"].isnan().tolist() == [False, True, False, False]
    assert scores.mean("f") == pytest.approx((1 + 3 + 4) / 3)
    assert scores.valid["u"].tolist() == [True, True, True, False]
    assert scores.values["u"].isnan().tolist() == [False, False, False, True]
    # a sample counts only where every trained reward has a score
    total, valid = combine(scores.values, scores.valid, {"f": 1.0, "u": 0.5})
    assert valid.tolist() == [True, False, True, False]
    assert total[valid].tolist() == [1.5, 3.5]


def test_scores_land_at_their_global_index(accelerator):
    scores = gather_scores(accelerator, local(f=from_metadata), ["f"], [5, 0, 3, 1], 6)
    assert scores.values["f"].nan_to_num(-1).tolist() == [-1, 4, -1, 3, -1, 1]
    assert scores.valid["f"].tolist() == [False, True, False, True, False, True]


def test_the_average_of_no_scores_is_no_number(accelerator):
    scores = gather_scores(accelerator, {"f": torch.zeros(0)}, ["f"], [], 0)
    assert scores.mean("f") != scores.mean("f")


def test_rewards_see_prompts_metadata_groups_and_the_iteration():
    seen = {}

    class Spy(Reward):
        def score(self, batch):
            seen.update(
                prompts=batch.prompts, metadata=batch.metadata, groups=batch.group_ids.tolist(), step=batch.step
            )
            return RewardOutput(batch.images.mean(dim=(1, 2, 3)))

    found = score_local({"spy": Spy()}, IMAGES, PROMPTS, [7, 7, 9, 9], 3)
    assert seen == {
        "prompts": ["a", "b", "c", "d"],
        "metadata": [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}],
        "groups": [7, 7, 9, 9],
        "step": 3,
    }
    torch.testing.assert_close(found["spy"], IMAGES.mean(dim=(1, 2, 3)))


def broken(images, prompts, metadata):
    raise ValueError("no such file: model.bin")


def wrong_length(images, prompts, metadata):
    return [1.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [(broken, "failed: ValueError: no such file: model.bin"), (wrong_length, "returned 1 scores for 4 images")],
)
def test_a_broken_reward_travels_to_the_collective_and_stops_the_run_with_its_own_words(accelerator, function, words):
    problem = local(mine=function)
    assert isinstance(problem, RewardError)
    with pytest.raises(UserError) as caught:
        gather_scores(accelerator, problem, ["mine"], [0, 1, 2, 3], 4)
    assert "reward 'mine'" in str(caught.value)
    assert words in str(caught.value)


def test_a_reward_without_any_score_is_broken_not_zero(accelerator):
    found = local(mine=lambda images, prompts, metadata: [None] * 4)
    with pytest.raises(UserError, match=r"^reward 'mine' has no score for any of 4 images \(all NaN\): repair"):
        gather_scores(accelerator, found, ["mine"], [0, 1, 2, 3], 4)


def test_scores_of_several_states_keep_their_columns_and_report_the_final_one(accelerator):
    table = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), 6.0]])
    scores = gather_scores(accelerator, {"f": table}, ["f"], [2, 0], 3, (3,))
    assert torch.equal(scores.values["f"][[2, 0]].nan_to_num(-1), table.nan_to_num(-1))
    assert scores.valid["f"].tolist() == [[True, False, True], [False] * 3, [True] * 3]
    assert scores.mean("f") == 4.5
