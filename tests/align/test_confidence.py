"""Uncertainty in a run: units from the base model's images, weights, a gated penalty, and an exact continuation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file

from align.collect import collect
from align.confidence import FILE, doubtful_metrics, doubts, ensemble_spread
from align.config import load_config
from align.errors import UserError
from align.inference import chosen_rewards, load_target
from align.objectives import ObjectiveConfig, forward_process_loss
from align.run import start
from align.runfolder import metric_rows
from align.scoring import RewardFailure, Scores, component_key, extra_means, gather_scores, uncertainty_key
from align.targets import prompt_ids, targets
from align.train import _evaluate_base
from align.uncertainty import UncertaintyConfig
from align.updates import clipped_ratio_pairs, micro_batches

NAN = float("nan")
ALL = torch.ones(8, dtype=torch.bool)
NEAR = f"{Path(__file__).parents[1] / 'e2e' / 'near_reward.py'}:score"
MEMBERS = {"bright": {"type": "brightness"}, "small": {"type": "jpeg"}}
REWARDS = {
    "committee": {"type": "ensemble", "args": {"members": MEMBERS, "objective": "mean"}},
    "near": {"type": NEAR, "weight": 0.0, "args": {"target": 0.527}},
}
BOTH = {"mode": "weight", "sources": ["native", "rank_disagreement"], "auxiliaries": ["near"]}


@pytest.fixture
def configure(tmp_path, write_config):
    """configure(uncertainty, **changes) -> a configuration with a committee and a watched reward."""

    def make(uncertainty, **changes):
        return write_config(tmp_path, "flow_grpo", {"rewards": REWARDS, "uncertainty": uncertainty, **changes})

    return make


@pytest.fixture
def begin(configure, on_cpu):
    def make(uncertainty, **changes):
        return start(load_config(configure(uncertainty, **changes)), Console(quiet=True))

    return make


def test_a_gated_penalty_goes_on_where_it_was(tmp_path, write_config, train_here):
    gate = {"mode": "gate_kl", "sources": ["native", "rank_disagreement"], "auxiliaries": ["near"]}
    changes = {"rewards": REWARDS, "uncertainty": gate, "train": {"iterations": 4}, "checkpoint": {"every": 2}}
    changes["objective"] = {"ref_coef": 1.0}
    path = write_config(tmp_path, "nft", changes)
    train_here(path, "name=whole")
    train_here(path, "name=cut", "train.iterations=2")
    train_here(path, "name=cut")
    ends = [load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    rows = [row for row in metric_rows(tmp_path / "whole" / "metrics.jsonl")[0] if row["kind"] == "train"]
    assert all(row["uncertainty/gated"] == 1 / 8 for row in rows)  # at least one of 8
    assert len({row["uncertainty/gate_fraction"] for row in rows}) > 1


def test_a_continued_run_ends_like_one_that_was_not_stopped(configure, tmp_path, train_here):
    changes = {"train": {"iterations": 6}, "checkpoint": {"every": 2}, "eval": {"every": 0, "prompts": 4}}
    path = configure(BOTH, **changes)
    train_here(path, "name=whole")
    train_here(path, "name=cut", "train.iterations=2")
    before = (tmp_path / "cut" / FILE).read_text()
    train_here(path, "name=cut")
    assert (tmp_path / "cut" / FILE).read_text() == before == (tmp_path / "whole" / FILE).read_text()
    ends = [load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    whole, cut = (
        [row for row in metric_rows(tmp_path / name / "metrics.jsonl")[0] if row["kind"] == "train"]
        for name in ("whole", "cut")
    )
    keys = [key for key in whole[0] if key.startswith(("uncertainty/", "weight/", "ensemble/", "reward/"))]
    assert {
        "uncertainty/mean", "uncertainty/q90", "uncertainty/frac_floor", "uncertainty/corr_reward", "weight/ess",
        "ensemble/std_mean", "reward/committee/bright", "reward/committee/small", "uncertainty/native/committee",
        "uncertainty/rank_disagreement",
    } <= set(keys)  # fmt: skip
    assert [{k: row.get(k) for k in keys} for row in whole] == [{k: row.get(k) for k in keys} for row in cut]
    # the unit of the committee is the base model: there its members have mean 0 and std 1
    base = torch.tensor(json.loads((tmp_path / "whole" / "eval" / "base.json").read_text())["scores"]["committee"])
    assert float(base.mean()) == pytest.approx(0.0, abs=1e-5)
    # other commands find these units in the run's folder
    rewards = chosen_rewards(load_target(str(tmp_path / "whole")), [])
    assert not rewards["committee"].needs_reference


def test_without_uncertainty_weights_change_nothing_and_with_it_they_do(begin):
    found = {}
    for name, settings in {
        "off": {"mode": "off"},
        "idle": {"mode": "weight", "kappa": 0.0, "eta": 0.0},
        "on": {"mode": "weight", "kappa": 3.0},
    }.items():
        run = begin(settings)
        _evaluate_base_quietly(run)
        found[name] = targets(run, run.config.sampler.make_plan(0, 0), drawn(), {}).advantages
    assert torch.equal(found["off"], found["idle"])
    assert not torch.equal(found["off"], found["on"])
    sums = found["on"].view(2, 4, -1).sum(1)
    assert sums.abs().max() < 1e-4


def _evaluate_base_quietly(run):
    class Silent:
        def log(self, *_):
            pass

    run.tracker = Silent()
    _evaluate_base(run)


def drawn(seed=3):
    """Scores (8, 1) of both rewards, and an uncertainty of one of them of the size of the base model's."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(8, 1, generator=generator) for name in REWARDS}
    extras = {uncertainty_key("committee"): torch.rand(8, 1, generator=generator) * 3}
    return Scores(values, {name: ~v.isnan() for name, v in values.items()}, extras)


def test_quantiles_of_what_needs_groups_come_from_the_first_iterations_and_then_stay(begin):
    run = begin({"mode": "weight", "sources": ["rank_disagreement"], "auxiliaries": ["near"]})
    groups, seen = torch.arange(8) // 4, []
    for seed in range(6):
        scores, metrics = drawn(seed), {}
        doubts(run, scores, scores.values["committee"][:, 0], ALL, groups, metrics)
        seen.append(run.trust.quantiles.get("rank_disagreement"))
    assert seen[:3] == [None] * 3
    assert seen[3] is not None
    assert seen[3] == seen[4] == seen[5]
    assert run.trust.pools == {}


def test_what_is_logged_of_eight_images_of_a_group_has_known_values(begin):
    run = begin({"mode": "weight"})
    run.trust.quantiles, run.trust.units = {"native/committee": [1.0, 3.0]}, {"committee": 1.0}
    doubt = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 11.0])  # over the unit of 2: 0, .5, ..., 3.5; 5
    reward = torch.tensor([*doubt[:8].exp(), NAN])  # of the ninth, the most doubtful, nothing is known
    scores = Scores({}, {}, {uncertainty_key("committee"): doubt})
    weights = [math.exp(-u) for u in (0, 0.5, 1, 1.5, 2)] + [0.1] * 3  # exp(-2.5) = .082
    expected = {
        "uncertainty/mean": 1.75,
        "uncertainty/q90": 3.15,  # .9 x 7 = 6.3: from the seventh, 3, three tenths of the way to the eighth, 3.5
        "uncertainty/frac_floor": 3 / 8,
        "weight/ess": sum(weights) ** 2 / sum(w**2 for w in weights),
    }
    for final, correlation in ((reward, 1.0), (torch.cat([reward[:8].flip(0), reward[8:]]), -1.0)):
        metrics: dict[str, float] = {}
        doubts(run, scores, final, ~final.isnan(), torch.zeros(9, dtype=torch.long), metrics)
        assert metrics.pop("uncertainty/corr_reward") == pytest.approx(correlation)
        assert metrics.pop("uncertainty/native/committee") == pytest.approx(47 / 9)
        assert metrics == pytest.approx(expected)
    # where the reward's own gradient is trained, of every image that is scored
    told = {uncertainty_key("committee"): torch.tensor([*doubt[:8], NAN])}
    assert doubtful_metrics(run, told) == pytest.approx(expected)


def test_several_sources_count_by_the_most_doubtful(begin):
    run = begin(BOTH)
    run.trust.quantiles = {"native/committee": [0.0, 1.0], "rank_disagreement": [0.0, 1.0]}
    groups, scores = torch.arange(8) // 4, drawn()
    final = scores.values["committee"][:, 0]
    both = doubts(run, scores, final, ALL, groups, {}).confidence
    each = []
    for source in BOTH["sources"]:
        run.config.uncertainty.sources = [source]
        each.append(doubts(run, scores, final, ALL, groups, {}).confidence)
    assert both is not None
    assert torch.equal(both.weights, torch.minimum(each[0].weights, each[1].weights))
    assert not torch.equal(both.weights, each[0].weights)
    assert not torch.equal(both.weights, each[1].weights)


def test_shuffled_weights_are_the_same_ones_elsewhere(begin):
    run = begin({"mode": "weight", "shuffled": True})
    run.trust.quantiles = {"native/committee": [0.0, 1.0]}
    groups, scores = torch.arange(8) // 4, drawn()
    final, found = scores.values["committee"][:, 0], []
    for shuffled, iteration in ((False, 0), (True, 0), (True, 0), (True, 1)):
        run.config.uncertainty.shuffled, run.counters.iteration = shuffled, iteration
        found.append(doubts(run, scores, final, ALL, groups, {}).confidence.weights)
    plain, once, again, later = found
    assert torch.equal(once, again)
    assert not torch.equal(once, later)
    assert not torch.equal(once, plain)
    assert torch.equal(once.sort().values, plain.sort().values)


def test_silence_gives_no_quantiles(begin):
    run = begin({"mode": "weight", "sources": ["rank_disagreement"], "auxiliaries": ["near"]})
    groups = torch.arange(8) // 4
    for seed in range(6):
        scores = drawn(seed)
        if seed < 4:
            scores.values["near"][:] = NAN
        found = doubts(run, scores, scores.values["committee"][:, 0], ALL, groups, {}).confidence
        assert found is not None
        assert (found.weights == 1).all() == (seed < 4)
    assert "rank_disagreement" not in run.trust.quantiles
    assert len(run.trust.pools["rank_disagreement"]) == 2


@pytest.mark.parametrize("mode", ["weight", "gate_kl"])
def test_an_image_that_lacks_one_of_several_rewards_is_trusted_by_what_is_known_of_it(begin, mode):
    """Rewards of an advantage of their own may each be for some prompts only; the sum of all is then known of none."""
    run = begin({"mode": mode, "eta": 0.0, "kappa": 1.0}, objective={"kl_beta": 0.04})
    run.trust.quantiles = {"native/committee": [0.0, 1.0]}
    doubt = torch.zeros(8, 1)
    doubt[5] = 2.0
    scores = drawn()
    scores.extras[uncertainty_key("committee")] = doubt
    found = doubts(run, scores, torch.full((8,), NAN), ALL, torch.arange(8) // 4, {})
    if mode == "gate_kl":
        assert found.gated is not None
        assert found.gated.tolist() == [i == 5 for i in range(8)]
    else:
        assert found.confidence is not None
        expected = doubt[:, 0].neg().exp().double()
        torch.testing.assert_close(found.confidence.factor, expected / expected.mean())


def test_a_reward_that_does_not_say_how_sure_it_is_is_named(begin):
    run = begin({"mode": "weight"}, rewards={"plain": {"type": "brightness"}})
    with pytest.raises(UserError, match="native, and plain says nothing of how sure it is"):
        _evaluate_base_quietly(run)


def test_the_penalty_is_that_of_the_gated_samples_alone():
    generator = torch.Generator().manual_seed(0)
    v, old, x0, noise, ref = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(5))
    t, advantages = torch.full((4,), 0.5), torch.randn(4, generator=generator)
    gated = torch.tensor([True, False, False, True])

    def losses(coef, pull=None):
        config = ObjectiveConfig(type="forward_process", ref_coef=coef)
        return forward_process_loss(v, old, x0, noise, t, advantages, config, ref, pull)[0]

    assert torch.equal(losses(0.5, gated.float()), torch.where(gated, losses(0.5), losses(0.0)))
    assert (losses(0.5) > losses(0.0)).all()


def test_the_kl_term_is_that_of_the_gated_samples_alone(begin):
    run = begin({"mode": "gate_kl", "sources": ["rank_disagreement"], "auxiliaries": ["near"]})
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += 0.05
    prompts = [run.train_prompts[i] for i in prompt_ids(run, 0)]
    batch = collect(run, prompts, list(range(8)), 0, 0, lambda *_: None)
    (pairs,) = micro_batches(range(8), 1, 100)
    advantages = torch.zeros(8, len(batch.plan.stochastic))
    gated = torch.arange(8) < 3

    def losses(pull):
        return clipped_ratio_pairs(run, batch, pairs, advantages, False, pull)[0].detach()

    assert (losses(None) > 0).all()
    assert torch.equal(losses(gated.float()), torch.where(gated, losses(None), 0.0))


def test_steps_count_by_the_doubt_of_the_completions_around_them(begin):
    run = begin({"mode": "weight", "per_step": True}, credit={"rule": "gain"})
    run.trust.quantiles = {"native/committee": [0.0, 1.0]}
    plan = run.config.sampler.make_plan(0, 0)
    steps = len(plan.stochastic)
    values = torch.randn(8, steps + 1, generator=torch.Generator().manual_seed(2))
    watched = torch.cat([torch.full((8, steps), NAN), values[:, -1:]], dim=1)
    doubt = torch.zeros(8, steps + 1)
    doubt[0, 0], doubt[1, -1] = 2.0, 2.0
    scores = Scores(
        {"committee": values, "near": watched},
        {"committee": ~values.isnan(), "near": ~watched.isnan()},
        {uncertainty_key("committee"): doubt},
    )
    metrics = {}
    found = targets(run, plan, scores, metrics)
    assert found.steps is not None
    low = math.exp(-2)
    first = torch.tensor([low, *[1.0] * (steps - 1)], dtype=torch.float64) * steps / (low + steps - 1)
    torch.testing.assert_close(found.steps[0], first)
    torch.testing.assert_close(found.steps[1], first.flip(0))
    assert (found.steps[2:] == 1).all()
    assert metrics["uncertainty/step_00"] == pytest.approx(2 / 8)
    # dealt to other images with the weights of the images, so that nothing is left of knowing which are doubtful
    plain = found.steps
    run.config.uncertainty.shuffled = True
    dealt = targets(run, plan, scores, {}).steps
    assert not torch.equal(dealt, plain)
    assert sorted(dealt.tolist()) == sorted(plain.tolist())
    run.config.uncertainty.shuffled = False
    # of a reward that nothing is known of yet, and one that is silent in this iteration
    quantiles, run.trust.quantiles = run.trust.quantiles, {}
    assert targets(run, plan, scores, {}).steps is None
    run.trust.quantiles = quantiles
    assert targets(run, plan, Scores(scores.values, scores.valid), {}).steps is None
    # a completion's doubt is not the image's
    assert metrics["uncertainty/mean"] == pytest.approx(2 / 8)


def test_the_factor_of_a_step_is_outside_the_clip_and_leaves_the_penalty(begin):
    run = begin({"mode": "off"})
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += 0.05
    prompts = [run.train_prompts[i] for i in prompt_ids(run, 0)]
    batch = collect(run, prompts, list(range(8)), 0, 0, lambda *_: None)
    (pairs,) = micro_batches(range(8), 1, 100)
    advantages = torch.randn(8, len(batch.plan.stochastic), generator=torch.Generator().manual_seed(1))

    def losses(scale=1.0, factors=None):
        return clipped_ratio_pairs(run, batch, pairs, scale * advantages, False, None, factors)[0].detach()

    factors = torch.rand(advantages.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    penalty = losses(scale=0.0)
    expected = penalty + (losses() - penalty) * factors[:, 0]
    torch.testing.assert_close(losses(factors=factors), expected.float(), atol=1e-6, rtol=1e-5)
    assert torch.equal(losses(factors=torch.ones_like(factors)), losses())


def test_members_that_disagree_twice_as_much_as_on_the_base_are_told_of(begin):
    run = begin({"mode": "off"})
    _evaluate_base_quietly(run)
    level = run.trust.levels["committee"]
    assert level > 0
    for factor, told in ((1.9, False), (2.1, True)):
        metrics = ensemble_spread(run, {uncertainty_key("committee"): torch.full((8, 1), factor * level)})
        assert metrics["ensemble/std_mean"] == pytest.approx(factor * level, rel=1e-5)
        assert ("spread committee" in run.warned) == told


def test_the_most_overrated_samples_are_gated_and_the_share_is_kept(begin):
    run = begin({"mode": "gate_kl", "sources": ["rank_disagreement"], "auxiliaries": ["near"], "gate_fraction": 0.2})
    groups = torch.zeros(4, dtype=torch.long)
    values = {
        "committee": torch.tensor([[0.9], [0.1], [0.5], [0.7]]),
        "near": torch.tensor([[0.1], [0.9], [0.5], [0.7]]),
    }
    scores = Scores(values, {name: ~v.isnan() for name, v in values.items()})
    metrics = {}
    found = doubts(run, scores, values["committee"][:, 0], ALL[:4], groups, metrics)
    assert found.confidence is None
    assert found.gated is not None
    assert found.gated.tolist() == [True, False, False, False]
    assert metrics["uncertainty/gate_fraction"] == 0.2
    assert metrics["uncertainty/gated"] == 0.25
    assert run.trust.gate_past == [1.0]
    assert vars(run.trust) == json.loads(json.dumps(vars(run.trust)))  # as a checkpoint keeps it


def test_what_rewards_say_beside_their_scores_is_kept_with_them():
    accelerator = Accelerator(cpu=True)
    local = {
        "a": torch.tensor([[1.0, 2.0]]),
        uncertainty_key("a"): torch.tensor([[NAN, 0.5]]),
        component_key("a", "x"): torch.tensor([[3.0, 4.0]]),
    }
    scores = gather_scores(accelerator, local, ["a"], [1], 2, (2,))
    assert set(scores.values) == {"a"}
    torch.testing.assert_close(
        scores.extras[uncertainty_key("a")], torch.tensor([[NAN, NAN], [NAN, 0.5]]), equal_nan=True
    )
    # of the final images only, and of the rewards that are asked for
    assert extra_means(scores.extras, ["a"]) == {"reward/a/uncertainty": 0.5, "reward/a/x": 4.0}
    assert extra_means(scores.extras, ["b"]) == {}


def test_a_reward_that_is_only_watched_may_be_silent_for_an_iteration():
    accelerator = Accelerator(cpu=True)
    local = {"trained": torch.tensor([1.0, 2.0]), "watched": torch.tensor([NAN, NAN])}
    scores = gather_scores(accelerator, local, list(local), [0, 1], 2, required=["trained"])
    assert math.isnan(scores.mean("watched"))
    for required in (["watched"], True):
        with pytest.raises(RewardFailure, match="'watched' has no score for any of 2 images"):
            gather_scores(accelerator, local, list(local), [0, 1], 2, required=required)


def only_cats(images, prompts, metadata):
    """A reward with nothing to say of most prompts."""
    return [float(i.mean()) if "cat" in p else None for i, p in zip(images, prompts, strict=True)]


def test_a_watched_reward_that_is_silent_for_most_prompts_stops_no_run(tmp_path, write_config, train_here):
    rewards = {"bright": {"type": "brightness"}, "cats": {"type": f"{__file__}:only_cats", "weight": 0.0}}
    changes = {"rewards": rewards, "train": {"iterations": 2}, "eval": {"prompts": 4, "during": 2, "every": 1}}
    train_here(write_config(tmp_path, "flow_grpo", changes))
    rows = metric_rows(tmp_path / "run" / "metrics.jsonl")[0]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert len(evaluations) == 3
    assert all(row["eval/cats"] is None for row in evaluations)  # of the first two prompts, none has a cat


def test_the_defaults_are_off_and_legal():
    assert UncertaintyConfig().mode == "off"
    assert UncertaintyConfig(mode="weight").validate({}) == []
