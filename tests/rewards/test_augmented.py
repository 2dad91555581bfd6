"""A reward asked about mild changes of an image: the same score, and how steady it is."""

from __future__ import annotations

import pytest
import torch

from rewards import Reward, RewardConfig, RewardError, RewardOutput, build_reward, checked_score
from rewards.augmented import view
from rewards.conformance import FAIL, check
from rewards.debug import BrightnessReward


class Corner(Reward):
    """The value of the first pixel, and the brightness of the left half above the right one."""

    def score(self, batch):
        half = batch.images.shape[-1] // 2
        sides = batch.images[..., :half].mean(dim=(1, 2, 3)) - batch.images[..., half:].mean(dim=(1, 2, 3))
        return RewardOutput(torch.where(sides.abs() < 1e-6, torch.nan, sides), {"pixel": batch.images[:, 0, 0, 0]})


def augmented(**args):
    reward = build_reward("steady", RewardConfig(type="augmented", args=args))
    reward.setup(torch.device("cpu"), torch.float32)
    return reward


def test_the_score_is_that_of_the_image_and_brightness_moves_with_its_level(make_batch):
    images = torch.stack([torch.full((3, 16, 16), level) for level in (0.0, 0.2, 0.4)])
    batch = make_batch(3, images=images)
    output = checked_score(augmented(type="brightness", views=2), batch)
    assert torch.equal(output.scores, checked_score(BrightnessReward(), batch).scores)
    # a flat image only gets 3 % brighter and darker: of (1, 1.03, .97) the population std is .03 sqrt(2/3)
    expected = torch.tensor([0.0, 0.2, 0.4]) * 0.03 * (2 / 3) ** 0.5
    torch.testing.assert_close(output.uncertainty, expected, atol=1e-6, rtol=0)


def test_views_are_mild_keep_their_shape_and_differ(make_batch):
    images = make_batch(2, 40, 72).images
    views = [view(images, number) for number in range(8)]
    assert all(v.shape == images.shape and v.min() >= 0 and v.max() <= 1 for v in views)
    smooth = torch.linspace(0.3, 0.7, 72).expand(2, 3, 40, 72)
    # at most .03 x .7 by brightness, and 5 % of .4 by the cut
    assert all((view(smooth, number) - smooth).abs().max() < 0.042 for number in range(8))
    for number in range(8):
        assert all(not torch.equal(views[number], views[other]) for other in range(number))


def test_a_mirror_is_only_held_up_if_asked(make_batch):
    ramp = torch.linspace(0.2, 0.8, 32).expand(1, 3, 32, 32)
    batch = make_batch(1, images=ramp)
    kind = f"{__file__}:Corner"
    plain, mirrored = (checked_score(augmented(type=kind, flip=flip), batch) for flip in (False, True))
    assert plain.uncertainty is not None
    assert mirrored.uncertainty is not None
    assert plain.uncertainty.item() < 0.05
    assert mirrored.uncertainty.item() > 0.2
    assert torch.equal(plain.components["pixel"], batch.images[:, 0, 0, 0])


def test_where_a_view_has_no_score_the_uncertainty_is_missing_and_the_score_stands(make_batch):
    # halves that are equal have no score; the cut makes them unequal, so the image alone misses, and the other way round
    images = torch.full((2, 3, 32, 32), 0.5)
    images[1, :, :, 0] += 0.2
    output = checked_score(augmented(type=f"{__file__}:Corner"), make_batch(2, images=images))
    assert output.scores.isnan().tolist() == [True, False]
    assert output.uncertainty is not None
    assert output.uncertainty.isnan()[0]


def test_it_keeps_the_contract_of_rewards_and_tells_mistakes():
    assert [v for v in check(augmented(type="brightness")) if v.status == FAIL] == []
    with pytest.raises(RewardError, match="views must be a positive integer"):
        augmented(type="brightness", views=0)
    with pytest.raises(RewardError, match="put its members into augmented"):
        augmented(type="ensemble", args={"members": {"a": {"type": "brightness"}}})
