"""Which samples of a group are trained: the published example, thresholds, ties, missing scores."""

import pytest
import torch

from align.history import HistoryConfig, history_advantages, remember
from align.selection import SelectionConfig, extremes, select

EXTREMES = SelectionConfig(rule="extremes")


def everyone(advantages):
    return torch.ones(len(advantages), dtype=torch.bool)


def kept_of(advantages, groups, valid=None, config=EXTREMES):
    values = torch.tensor(advantages)
    ok = everyone(values) if valid is None else torch.tensor(valid)
    kept, _ = select(values.unsqueeze(1).expand(-1, 3), ok, torch.tensor(groups), config)
    return kept.nonzero().flatten().tolist()


def test_the_example_of_two_groups_of_one_prompt():
    """Mean .29, unbiased std .0654217; of six branches three are trained."""
    rewards = torch.tensor([0.30, 0.34, 0.32, 0.20, 0.22, 0.36])
    history = HistoryConfig(entries=0, iterations=8, min_count=1, ddof=1)
    past = remember({}, rewards, everyone(rewards), [0] * 6, 0, history)
    z, _ = history_advantages(rewards, everyone(rewards), [0] * 6, past, history, 1e-8, 5.0)
    assert z.tolist() == pytest.approx([0.1529, 0.7643, 0.4586, -1.3757, -1.0700, 1.0700], abs=1e-4)
    kept, advantages = select(z.unsqueeze(1), everyone(z), torch.tensor([0, 0, 0, 1, 1, 1]), EXTREMES)
    assert kept.nonzero().flatten().tolist() == [1, 3, 5]
    assert advantages[kept, 0].tolist() == pytest.approx([0.7643, -1.3757, 1.0700], abs=1e-4)


def test_the_upper_threshold_is_included_and_the_lower_one_is_not():
    assert kept_of([0.5, 0.0, -0.5], [0, 0, 0]) == [0]
    assert kept_of([0.49, 0.0, -0.51], [0, 0, 0]) == [2]


@pytest.mark.parametrize(
    ("advantages", "kept"),
    [
        ([0.4, 0.1, -0.4], []),
        ([0.9, 0.8, 0.7], [0]),  # the worst is good, and is not trained
        ([-0.9, -0.8, -0.7], [0]),
        ([0.9, 0.0, -0.9], [0, 2]),
        ([0.0, 0.0, 0.0], []),
        ([0.6, 0.6, -0.6], [0, 2]),  # among equals the first
    ],
)
def test_a_group_gives_none_one_or_two(advantages, kept):
    assert kept_of(advantages, [4, 4, 4]) == kept


def test_one_sample_may_be_best_and_worst():
    assert kept_of([0.9], [0]) == [0]
    assert kept_of([-0.9], [0]) == [0]
    assert kept_of([0.2], [0]) == []


def test_a_sample_without_a_score_is_never_kept():
    # its advantage is 0, which would be the worst of the first group
    assert kept_of([0.9, 0.0, 0.6, -3.0], [0, 0, 0, 1], [True, False, True, False]) == [0]
    low = SelectionConfig(rule="extremes", pos_threshold=0.5, neg_threshold=0.5)
    assert kept_of([0.9, 0.0, 0.6], [0, 0, 0], [True, False, True], low) == [0]


def test_groups_may_lie_in_any_order():
    draw = torch.Generator().manual_seed(0)
    advantages, groups = torch.randn(40, generator=draw), torch.arange(40) % 8
    kept = extremes(advantages, everyone(advantages), groups, 0.5, -0.5)
    assert 8 < int(kept.sum()) <= 16
    order = torch.randperm(40, generator=draw)
    shuffled = extremes(advantages[order], everyone(advantages), groups[order], 0.5, -0.5)
    assert torch.equal(shuffled, kept[order])
    for group in range(8):
        rows = (groups == group).nonzero().flatten()
        best, worst = rows[advantages[rows].argmax()], rows[advantages[rows].argmin()]
        expected = {int(best)} if advantages[best] >= 0.5 else set()
        expected |= {int(worst)} if advantages[worst] < -0.5 else set()
        assert set(rows[kept[rows]].tolist()) == expected


def test_weights_act_on_the_advantages_and_not_on_the_choice():
    advantages = torch.tensor([[0.8, 0.8], [0.0, 0.0], [-0.8, -0.8]])
    config = SelectionConfig(rule="extremes", pos_weight=0.5, neg_weight=2.0)
    kept, weighted = select(advantages, everyone(advantages), torch.zeros(3), config)
    assert kept.tolist() == [True, False, True]
    torch.testing.assert_close(weighted, advantages * torch.tensor([[0.5], [2.0], [2.0]]))
    assert weighted.dtype == torch.float32


def test_the_rule_all_keeps_every_sample_and_every_step():
    advantages = torch.tensor([[0.1, -0.2], [0.0, 3.0]])
    kept, weighted = select(advantages, torch.tensor([True, False]), torch.zeros(2), SelectionConfig())
    assert kept.all()
    assert torch.equal(weighted, advantages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule must be one of all, extremes, got 'best'"),
        ({"neg_threshold": 0.6}, "neg_threshold must not be above pos_threshold, got 0.6 and 0.5"),
        ({"pos_weight": -1.0}, "pos_weight must be finite and at least 0, got -1.0"),
        ({"neg_weight": float("inf")}, "neg_weight must be finite and at least 0, got inf"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    assert SelectionConfig(**changes).validate() == [message]
