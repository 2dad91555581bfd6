"""The gate from criteria to aspects to one score."""

from __future__ import annotations

import pytest
import torch

from rewards import RewardError
from rewards.criteria import gated_score

ASPECTS = {"content": [0, 3], "quality": [1], "style": [2, 4]}


def test_equal_criteria_are_the_total_whatever_the_gates():
    generator = torch.Generator().manual_seed(0)
    logits, second = torch.randn(6, 5, generator=generator) * 30, torch.randn(6, 3, generator=generator) * 30
    total, aspects = gated_score(torch.full((6, 5), 0.7), logits, ASPECTS, second)
    assert set(aspects) == set(ASPECTS)
    for scores in (total, *aspects.values()):
        torch.testing.assert_close(scores, torch.full((6,), 0.7))


def test_gates_that_say_nothing_average_and_gates_that_are_sure_choose():
    criteria = torch.tensor([[1.0, 2.0, 3.0, 5.0, 9.0]])
    total, aspects = gated_score(criteria, torch.zeros(1, 5), ASPECTS, torch.zeros(1, 3))
    assert [aspects[name].item() for name in ASPECTS] == [3.0, 2.0, 6.0]
    assert total.item() == pytest.approx(11 / 3)
    sure, second = torch.tensor([[0.0, 0.0, 0.0, 1000.0, 0.0]]), torch.tensor([[1000.0, 0.0, 0.0]])
    assert gated_score(criteria, sure, ASPECTS, second)[0].item() == 5.0


def test_the_temperature_flattens_both_gates():
    criteria, logits = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    for temperature in (1.0, 10.0):
        total, _ = gated_score(criteria, logits, {"one": [0, 1]}, torch.zeros(1, 1), temperature)
        assert total.item() == pytest.approx(torch.sigmoid(torch.tensor(2.0 / temperature)).item())


@pytest.mark.parametrize("aspects", [{"a": [0]}, {"a": [0, 1], "b": [1]}, {"a": [0, 1], "b": []}])
def test_each_criterion_belongs_to_one_aspect(aspects):
    with pytest.raises(RewardError, match="share out the 2 criteria"):
        gated_score(torch.zeros(1, 2), torch.zeros(1, 2), aspects, torch.zeros(1, len(aspects)))
