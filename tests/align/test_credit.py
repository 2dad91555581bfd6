import pytest
import torch

from align.advantages import AdvantageConfig, group_advantages
from align.credit import terminal


def test_terminal_gives_every_step_the_final_score_and_keeps_missing_ones_missing():
    scores = torch.tensor([0.25, float("nan"), -1.0])
    rewards = terminal(scores, 4)
    assert rewards.shape == (3, 4)
    assert torch.equal(rewards[0], torch.full((4,), 0.25))
    assert torch.equal(rewards[2], torch.full((4,), -1.0))
    assert rewards[1].isnan().all()


def test_terminal_step_advantages_equal_the_advantages_of_the_scores():
    scores, groups = torch.rand(12, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    valid = torch.ones(12, dtype=torch.bool)
    per_step, _ = group_advantages(terminal(scores, 3), valid, groups, AdvantageConfig())
    per_image, _ = group_advantages(scores, valid, groups, AdvantageConfig())
    assert torch.equal(per_step, per_image.unsqueeze(1).expand(12, 3))


@pytest.mark.parametrize(("shape", "steps"), [((2, 3), 2), ((2,), 0)])
def test_terminal_refuses_wrong_shapes(shape, steps):
    with pytest.raises(ValueError, match="credit: "):
        terminal(torch.zeros(shape), steps)
