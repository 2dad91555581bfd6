"""Weights on advantages: they sum to zero, cancel when all are equal, and come after the last normalisation."""

from __future__ import annotations

import math

import pytest
import torch

from align.advantages import AdvantageConfig, group_advantages, weighted_centre
from align.combination import CombineConfig, combined_advantages
from align.config import parse_config
from align.config_checks import without_effect
from align.errors import UserError
from align.uncertainty import UncertaintyConfig, confidence, effective_size

NAN = float("nan")
# so small an eps that worked examples come out even
PER_GROUP = AdvantageConfig(std="group", eps=1e-12)
THREE = torch.tensor([0.0, math.log(2), math.log(4)], dtype=torch.float64)
ONE_GROUP = torch.zeros(3, dtype=torch.long)


def weighted(rewards, uncertainty, groups, settings=None, advantage=PER_GROUP):
    """Advantages (N, S) before the clip, in float32 as the library keeps them."""
    settings = settings or UncertaintyConfig(mode="weight", eta=0.0)
    found = confidence(uncertainty, ~rewards[:, -1].isnan(), groups, settings)
    everyone = torch.ones(len(groups), dtype=torch.bool)
    plain, _ = group_advantages(rewards, everyone, groups, advantage, found.baseline, found.doubt)
    return found.applied(plain.double())


def batch(groups=5, size=6, steps=1):
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(groups * size, steps, generator=generator)
    doubt = torch.rand(groups * size, generator=generator, dtype=torch.float64) * 3
    return rewards, doubt, torch.arange(groups * size) // size


def test_weights_over_their_mean():
    found = confidence(THREE, torch.ones(3, dtype=torch.bool), ONE_GROUP, UncertaintyConfig(mode="weight"))
    torch.testing.assert_close(found.weights, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    expected = torch.tensor([12 / 7, 6 / 7, 3 / 7], dtype=torch.float64)  # the mean is 7/12
    torch.testing.assert_close(found.factor, expected)
    assert effective_size(found.weights) == pytest.approx(1.75**2 / 1.3125)


def test_a_worked_example_and_the_bias_of_an_unweighted_baseline():
    rewards = torch.tensor([[3.0], [2.0], [1.0]])
    settings = UncertaintyConfig(mode="weight", eta=0.0, renormalise="none")
    found = weighted(rewards, THREE, ONE_GROUP, settings)
    # weighted mean 17/7; deviations 4/7 -3/7 -10/7; weighted variance (16 + 4.5 + 25)/49/1.75 = 26/49
    sd = math.sqrt(26) / 7
    assert sd == pytest.approx(0.7284314, abs=1e-6)
    expected = torch.tensor([[4 / 7 / sd], [-3 / 14 / sd], [-5 / 14 / sd]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert abs(float(found.sum())) < 1e-6  # advantages are float32 before the weight; without a division they are not:
    weights = torch.tensor([[1.0], [0.5], [0.25]], dtype=torch.float64)
    centred = weights * weighted_centre(rewards, torch.ones(3, 1, dtype=torch.bool), ONE_GROUP, weights[:, 0], None)
    assert centred.flatten().tolist() == pytest.approx([4 / 7, -3 / 14, -5 / 14], abs=1e-12)
    assert abs(float(centred.sum())) < 1e-12
    plain = UncertaintyConfig(mode="weight", eta=0.0, renormalise="none", weighted_baseline=False)
    biased = weighted(rewards, THREE, ONE_GROUP, plain) * math.sqrt(2 / 3)  # in units of the reward
    assert float(biased.sum()) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("renormalise", ["global", "group", "none"])
@pytest.mark.parametrize("scope", ["group", "global"])
def test_advantages_sum_to_zero_in_every_group_and_step(renormalise, scope):
    rewards, doubt, groups = batch(steps=3)
    rewards[4] = NAN
    settings = UncertaintyConfig(mode="weight", eta=0.1, renormalise=renormalise)
    found = weighted(rewards, doubt, groups, settings, AdvantageConfig(std=scope))
    sums = torch.zeros(5, 3, dtype=torch.float64).index_add(0, groups, found)
    assert sums.abs().max() < 1e-5  # of about 6 numbers in float32
    assert (found[4] == 0).all()
    assert found.abs().max() > 0.5


@pytest.mark.parametrize("renormalise", ["global", "group"])
def test_equal_uncertainty_changes_nothing(renormalise):
    rewards, _, groups = batch()
    doubt = torch.full((30,), 1.3, dtype=torch.float64)
    everyone = torch.ones(30, dtype=torch.bool)
    plain, _ = group_advantages(rewards, everyone, groups, AdvantageConfig())
    found = weighted(
        rewards, doubt, groups, UncertaintyConfig(mode="weight", renormalise=renormalise), AdvantageConfig()
    )
    torch.testing.assert_close(found.float(), plain, atol=1e-5, rtol=1e-5)


def test_a_doubtful_group_keeps_its_strength_only_if_renormalised_by_itself():
    rewards, _, groups = batch()
    doubt = torch.where(groups == 0, 2.0, 0.0).double()
    settings = UncertaintyConfig(mode="weight", eta=0.0)
    plain = weighted(rewards, torch.zeros(30, dtype=torch.float64), groups, settings)
    whole = weighted(rewards, doubt, groups, settings)
    alone = weighted(rewards, doubt, groups, UncertaintyConfig(mode="weight", eta=0.0, renormalise="group"))
    torch.testing.assert_close(alone, plain)
    mean = (24 + 6 * math.exp(-2)) / 30
    torch.testing.assert_close(whole[:6], plain[:6] * math.exp(-2) / mean)
    torch.testing.assert_close(whole[6:], plain[6:] / mean)


def test_no_kappa_and_no_eta_is_no_uncertainty_bit_for_bit():
    rewards, doubt, groups = batch(steps=2)
    settings = UncertaintyConfig(mode="weight", kappa=0.0, eta=0.0)
    plain, _ = group_advantages(rewards, torch.ones(30, dtype=torch.bool), groups, AdvantageConfig())
    assert torch.equal(weighted(rewards, doubt, groups, settings, AdvantageConfig()).float(), plain)


def test_equal_weights_change_no_bit_of_ranks():
    """Also where they tie and scores are missing: an image without a signal keeps exactly 0."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(30) // 6
    arguments = (groups, CombineConfig(rule="rank"), AdvantageConfig(), {})
    settings, zeros = UncertaintyConfig(mode="weight", eta=0.0, kappa=0.0), 0
    for _ in range(40):
        parts = {name: torch.randn(30, 1, generator=generator).round(decimals=1) for name in "ab"}
        parts["a"][torch.randint(30, (2,), generator=generator)] = NAN
        scores = {name: values[:, -1] for name, values in parts.items()}
        doubt = 3 * torch.rand(30, generator=generator, dtype=torch.float64)
        trusted = confidence(doubt, torch.ones(30, dtype=torch.bool), groups, settings)
        plain, weighed = (
            combined_advantages(parts, {"a": 1.0, "b": 2.0}, scores, *arguments, found)[0] for found in (None, trusted)
        )
        assert torch.equal(weighed, plain)
        zeros += int((plain == 0).sum())
    assert zeros > 0


def test_a_steep_weight_leaves_the_least_weight_but_to_the_certain():
    doubt = torch.tensor([0.0, 0.01, 3.0, 0.0], dtype=torch.float64)
    found = confidence(
        doubt, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), UncertaintyConfig(kappa=1e6)
    )
    assert found.weights.tolist() == [1.0, 0.1, 0.1, 1.0]


def test_no_gradient_passes_through_weights():
    doubt = THREE.clone().requires_grad_()
    found = confidence(doubt, torch.ones(3, dtype=torch.bool), ONE_GROUP, UncertaintyConfig())
    assert found.baseline is not None
    assert found.doubt is not None
    assert not any(x.requires_grad for x in (found.weights, found.baseline, found.doubt, found.factor))


def test_doubt_lowers_a_reward_by_standard_deviations_of_its_group():
    # rewards 0 and 2: mean 1, std 1; one unit of doubt at eta .5 leaves the second at 1.5
    rewards, doubt = torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 1.0], dtype=torch.float64)
    settings = UncertaintyConfig(mode="weight", kappa=0.0, eta=0.5)
    exact = AdvantageConfig(std="group", eps=1.0)
    found = weighted(rewards, doubt, torch.zeros(2, dtype=torch.long), settings, exact)
    expected = 0.75 / 1.75
    torch.testing.assert_close(found, torch.tensor([[-expected], [expected]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_doubt_that_a_whole_group_shares_lowers_nothing():
    rewards, _, groups = batch()
    settings = UncertaintyConfig(mode="weight", kappa=0.0, eta=0.5)
    plain, _ = group_advantages(rewards, torch.ones(30, dtype=torch.bool), groups, AdvantageConfig(std="global"))
    found = weighted(rewards, groups.double(), groups, settings, AdvantageConfig(std="global"))
    torch.testing.assert_close(found.float(), plain)


def test_equal_rewards_teach_nothing_however_doubtful():
    rewards = torch.full((6, 1), 0.1)
    doubt = torch.rand(6, dtype=torch.float64) * 5
    found = weighted(rewards, doubt, torch.arange(6) // 3, UncertaintyConfig(mode="weight"), AdvantageConfig())
    assert (found == 0).all()


def test_the_order_of_the_samples_is_no_matter():
    rewards, doubt, groups = batch()
    settings = UncertaintyConfig(mode="weight")
    found = weighted(rewards, doubt, groups, settings)
    order = torch.randperm(30)
    torch.testing.assert_close(weighted(rewards[order], doubt[order], groups[order], settings), found[order])


def test_only_praise_is_weighted_if_asked():
    rewards, doubt, groups = batch()
    settings = UncertaintyConfig(mode="weight", eta=0.0, positive_only=True)  # whatever renormalise says
    plain, _ = group_advantages(rewards, torch.ones(30, dtype=torch.bool), groups, PER_GROUP)
    found = weighted(rewards, doubt, groups, settings)
    weights = torch.exp(-doubt).clamp_min(0.1).unsqueeze(1)
    torch.testing.assert_close(found, torch.where(plain > 0, plain * weights, plain.double()))


@pytest.mark.parametrize("rule", ["decoupled", "rank"])
def test_several_rewards_sum_to_zero_after_weights_and_are_clipped_last(rule):
    rewards, doubt, groups = batch()
    other, _, _ = batch()
    parts = {"a": rewards, "b": other.flip(0)}
    scores = {name: values[:, -1] for name, values in parts.items()}
    found = confidence(doubt, torch.ones(30, dtype=torch.bool), groups, UncertaintyConfig(mode="weight"))
    arguments = (parts, {"a": 1.0, "b": 2.0}, scores, groups, CombineConfig(rule=rule))
    advantages, _ = combined_advantages(*arguments, AdvantageConfig(), {}, found)
    sums = torch.zeros(5, 1).index_add(0, groups, advantages)
    assert sums.abs().max() < 1e-5
    assert advantages.abs().max() > 0.3
    clipped, _ = combined_advantages(*arguments, AdvantageConfig(clip=0.3), {}, found)
    torch.testing.assert_close(clipped, advantages.clamp(-0.3, 0.3))


@pytest.mark.parametrize("rule", ["decoupled", "rank"])
@pytest.mark.parametrize(("weight", "multipliers"), [(1.0, {}), (-1.0, {}), (1.0, {"a": -0.2})])
def test_doubt_speaks_against_an_image_whichever_way_its_reward_is_trained(rule, weight, multipliers):
    rewards, groups = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(4, dtype=torch.long)
    config = UncertaintyConfig(mode="weight", kappa=0.0, eta=0.3)
    for doubtful in range(4):
        doubt = torch.zeros(4, dtype=torch.float64)
        doubt[doubtful] = 1.0
        trusted = confidence(doubt, torch.ones(4, dtype=torch.bool), groups, config)
        plain, lowered = (
            combined_advantages(
                {"a": rewards}, {"a": weight}, {"a": rewards[:, 0]}, groups, CombineConfig(rule=rule, batch_norm=False),
                PER_GROUP, multipliers, found,
            )[0]
            for found in (None, trusted)
        )  # fmt: skip
        assert lowered[doubtful] < plain[doubtful]
        assert abs(float(lowered.sum())) < 1e-6


def settings(changes):
    data = {"rewards": {"a": {"type": "brightness"}, "w": {"type": "jpeg", "weight": 0.0}}, "preset": []}
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    return data


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"uncertainty": {"mode": "weight", "sources": []}}, "uncertainty.sources: name at least one"),
        (
            {"uncertainty": {"mode": "weight", "sources": ["rank_disagreement"]}},
            "auxiliaries: rank_disagreement compares",
        ),
        (
            {"uncertainty": {"mode": "weight", "sources": ["rank_disagreement"], "auxiliaries": ["a"]}},
            "auxiliaries: 'a' is trained",
        ),
        ({"uncertainty": {"mode": "weight", "native_of": ["aa"]}}, "native_of: no reward 'aa'"),
        ({"uncertainty": {"mode": "weight", "w_min": 0.0}}, r"w_min must be in \(0, 1\]"),
        ({"uncertainty": {"mode": "gate_kl", "gate_fraction": 0.5}}, "gate_fraction must be between"),
        ({"uncertainty": {"mode": "weight"}, "advantage": {"baseline": "history"}}, "keeps past rewards alone"),
        (
            {"uncertainty": {"mode": "weight"}, "objective": {"type": "reward_difference"}},
            "reward_difference regresses on raw rewards",
        ),
        ({"uncertainty": {"mode": "weight", "per_step": True}}, "credit.rule terminal completes no states"),
        (
            {"uncertainty": {"mode": "weight", "per_step": True, "native_of": ["w"]}, "credit": {"rule": "gain"}},
            "uncertainty.per_step: 'w' has weight 0",
        ),
        (
            {
                "uncertainty": {"mode": "weight", "per_step": True},
                "credit": {"rule": "gain"},
                "sampler": {"plan": "window", "window_size": 1},
            },
            "weighs steps against each other, and only 1 is stochastic",
        ),
        (
            {
                "uncertainty": {"mode": "gate_kl", "sources": ["rank_disagreement"], "auxiliaries": ["w"]},
                "advantage": {"baseline": "history"},
                "train": {"group_size": 1},
            },
            "rank_disagreement compares the images of a group",
        ),
        ({"uncertainty": {"mode": "gate_kl"}, "objective": {"kl_beta": 0.0}}, "objective.kl_beta, which is 0"),
        (
            {"uncertainty": {"mode": "gate_kl"}, "objective": {"type": "reward_gradient"}},
            "has no penalty by sample",
        ),
        (
            {"uncertainty": {"mode": "weight"}, "objective": {"type": "reward_gradient"}, "loss": {"equalise": True}},
            "loss.equalise brings them back",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes, line):
    with pytest.raises(UserError, match=line):
        parse_config(settings(changes))


def test_settings_nobody_reads_are_said():
    idle = parse_config(settings({"uncertainty": {"kappa": 2.0, "gate_min": 0.01}}))
    assert [line for line in without_effect(idle) if line.startswith("uncertainty")] == [
        "uncertainty.kappa has no effect: uncertainty.mode is off",
        "uncertainty.gate_min has no effect: uncertainty.mode is off",
    ]
    changes = {
        "mode": "weight",
        "gate_min": 0.01,
        "auxiliaries": ["w"],
        "positive_only": True,
        "weighted_baseline": False,
        "renormalise": "group",
    }
    weights = parse_config(settings({"uncertainty": changes}))
    assert [line for line in without_effect(weights) if line.startswith("uncertainty")] == [
        "uncertainty.gate_min has no effect: uncertainty.mode is weight",
        "uncertainty.weighted_baseline has no effect: uncertainty.positive_only is true",
        "uncertainty.renormalise has no effect: uncertainty.positive_only is true",
        "uncertainty.auxiliaries has no effect: rank_disagreement is no source",
    ]
