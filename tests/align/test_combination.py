"""Several rewards as one advantage."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from align.advantages import AdvantageConfig, group_advantages
from align.combination import CombineConfig, ConstraintConfig, base_units, combined_advantages, standardised
from align.config import load_config, parse_config
from align.config_checks import without_effect
from align.constraints import advanced, first, multiplier, penalty_share
from align.errors import UserError
from align.evaluate import sample_images
from align.policy_loop import run_iteration
from align.run import start
from align.scoring import Scores
from align.targets import prompt_ids, targets
from align.tracking import write_json

NAN = float("nan")
# so small an eps that worked examples come out even; the smallest std here is a hundredth
PER_GROUP = AdvantageConfig(std="group", eps=1e-9)


def column(*values):
    return torch.tensor(values).unsqueeze(1)


def combined(rewards, weights=None, groups=None, config=None, advantage=PER_GROUP):
    """Advantages of (N, 1) rewards, which are their own final scores, and the stats; batch_norm is off by default."""
    weights = weights or dict.fromkeys(rewards, 1.0)
    groups = torch.zeros(len(next(iter(rewards.values()))), dtype=torch.long) if groups is None else groups
    finals = {name: values[:, -1] for name, values in rewards.items()}
    config = config or CombineConfig(batch_norm=False)
    return combined_advantages(rewards, weights, finals, groups, config, advantage, {})


def test_rewards_that_agree_teach_twice_as_much_as_one_of_them():
    # (0, 1) has mean 1/2 and population std 1/2: advantages -1 and 1, and half of that if the other reward is constant.
    agree, _ = combined({"a": column(0.0, 1.0), "b": column(0.0, 1.0)})
    alone, _ = combined({"a": column(0.0, 1.0), "b": column(3.0, 3.0)})
    torch.testing.assert_close(agree, column(-1.0, 1.0))
    torch.testing.assert_close(alone, column(-0.5, 0.5))


def test_units_do_not_decide_who_wins():
    hps, image_reward = column(0.30, 0.31, 0.32, 0.33), column(1.0, 0.2, 0.9, 0.1)
    found, stats = combined({"hps": hps, "ir": image_reward})
    rescaled, _ = combined({"hps": hps, "ir": 10_000 * image_reward + 7})
    torch.testing.assert_close(found, rescaled, atol=1e-4, rtol=0)  # 10 007 in float32 has a spacing of 1e-3
    # the plain sum follows ImageReward alone: the spec's 0.9997 and -0.535
    total = torch.corrcoef(torch.cat([hps + image_reward, image_reward, hps], dim=1).T.double())
    assert total[0, 1] == pytest.approx(0.9997, abs=1e-4)
    assert total[0, 2] == pytest.approx(-0.535, abs=1e-3)
    both = torch.corrcoef(torch.cat([found, image_reward, hps], dim=1).T.double())
    assert both[0, 1] == pytest.approx(float(both[0, 2]), abs=1e-4)
    assert stats["advantage/hps_share"] == pytest.approx(0.5, abs=1e-4)


def test_a_missing_score_of_one_reward_is_neutral():
    a, b = column(1.0, 2.0, 6.0, 3.0), column(5.0, NAN, 1.0, 3.0)
    weights = {"a": 3.0, "b": -1.0}
    found, _ = combined({"a": a, "b": b}, weights)
    z = (a - 3) / a.std(correction=0)
    assert found[1].item() == pytest.approx(3 / 4 * z[1].item(), abs=1e-6)
    three, _ = combined({"b": b[[0, 2, 3]]})
    torch.testing.assert_close(found[[0, 2, 3]], 3 / 4 * z[[0, 2, 3]] - 1 / 4 * three)


@pytest.mark.parametrize("rule", ["decoupled", "rank"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_sample_without_any_score_has_no_advantage_and_no_influence(rule, batch_norm):
    generator = torch.Generator().manual_seed(1)
    rewards = {name: torch.randn(4, 2, generator=generator) for name in "ab"}
    for values in rewards.values():
        values[2] = NAN
    config = CombineConfig(rule=rule, batch_norm=batch_norm)
    found, _ = combined(rewards, config=config)
    others, _ = combined({name: values[[0, 1, 3]] for name, values in rewards.items()}, config=config)
    assert found[2].tolist() == [0, 0]
    assert torch.equal(found[[0, 1, 3]], others)


def test_a_constant_reward_adds_nothing_and_rounding_noise_next_to_nothing():
    advantage = AdvantageConfig(std="group")
    useful = column(0.1, 0.4, 0.2, 0.9)
    jitter = torch.ones(4, 1) + 1.2e-7 * column(0.0, 1.0, 1.0, 0.0)
    constant, stats = combined({"a": useful, "b": torch.ones(4, 1)}, advantage=advantage)
    assert torch.equal(constant, group_advantages(useful, torch.ones(4, dtype=bool), torch.zeros(4), advantage)[0] / 2)
    assert stats["advantage/b_zero_spread"] == 1
    assert stats["advantage/b_share"] == 0
    noisy, _ = combined({"a": useful, "b": jitter}, advantage=advantage)
    assert 0 < (noisy - constant).abs().max() < 1e-3
    # and where nothing but noise is left, bringing the std to 1 must not bring it back
    found, _ = combined({"a": jitter, "b": jitter}, config=CombineConfig(), advantage=advantage)
    assert 0 < found.abs().max() < 0.01


def test_the_floor_is_in_the_units_of_the_reward_it_names():
    rewards = {"a": column(0.0, 0.02), "b": column(0.0, 2.0)}
    config = CombineConfig(batch_norm=False, std_floor={"a": 0.1})
    found, _ = combined(rewards, config=config)
    torch.testing.assert_close(found, column(-0.55, 0.55))  # (0.01 / 0.1 + 1 / 1) / 2


def test_batch_norm_gives_rewards_that_disagree_a_std_of_one_again():
    generator = torch.Generator().manual_seed(2)
    rewards = {name: torch.randn(64, 1, generator=generator) for name in "abcd"}
    groups = torch.arange(64) // 8
    plain, _ = combined(rewards, groups=groups)
    found, _ = combined(rewards, groups=groups, config=CombineConfig())
    assert plain.std(correction=0) < 0.7
    assert found.std(correction=0) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found / found.norm(), plain / plain.norm())


def test_the_combined_advantage_is_clipped_and_not_its_parts():
    many = torch.zeros(101, 1)
    many[0] = 1.0  # advantage 10 in one reward, about -0.1 elsewhere
    found, _ = combined({"a": many, "b": torch.zeros(101, 1)}, advantage=AdvantageConfig(std="group", clip=4.0))
    assert found[0].item() == 4.0
    softer, _ = combined({"a": many, "b": torch.zeros(101, 1)}, advantage=AdvantageConfig(std="group", clip=5.0))
    assert softer[0].item() == pytest.approx(5.0, abs=0.01)


def test_shares_add_up_to_one_and_tell_who_is_sacrificed():
    a = torch.arange(6.0).unsqueeze(1)
    _, stats = combined({"a": a, "b": -a}, {"a": 3.0, "b": 1.0})
    assert stats["advantage/a_share"] == pytest.approx(1.5)
    assert stats["advantage/b_share"] == pytest.approx(-0.5)


def test_rank_weights_ranks():
    config = CombineConfig(rule="rank", batch_norm=False)
    rewards = {"a": column(0.1, 0.5, 0.5, 0.9), "b": column(1.0, 1e9, 3.0, 2.0)}
    found, _ = combined(rewards, {"a": 1.0, "b": 2.0}, config=config)
    torch.testing.assert_close(found, (column(-1.0, 0, 0, 1) + 2 * column(-1.0, 1, 1 / 3, -1 / 3)) / 3)


def test_a_closed_gate_takes_the_praise_and_leaves_the_blame():
    rewards = {"valid": column(1.0, 0.0, 1.0, 0.0), "nice": column(0.0, 1.0, 1.0, 0.0)}
    config = CombineConfig(batch_norm=False, gates={"valid": 0.5})
    found, stats = combined(rewards, {"valid": 0.0, "nice": 1.0}, config=config)
    torch.testing.assert_close(found, column(-1.0, 0.0, 1.0, -1.0))
    assert stats["gate/valid_open"] == 0.5


def test_flat_groups_are_counted_where_the_combination_is_silent():
    rewards = {"a": column(0.0, 1.0, 2.0, 2.0, 3.0, 3.0), "b": column(1.0, 1.0, 0.0, 5.0, 4.0, 4.0)}
    _, stats = combined(rewards, groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert stats["train/zero_spread_fraction"] == pytest.approx(1 / 3)
    assert stats["advantage/a_zero_spread"] == pytest.approx(2 / 3)


def config(rewards, **settings):
    return parse_config({"rewards": {n: {"type": "brightness", "weight": w} for n, w in rewards.items()}, **settings})


def test_one_weighted_reward_is_a_sum_unless_ranks_or_gates_are_asked_for():
    weights = {"a": 0.5, "watched": 0.0}
    assert not CombineConfig().apart(weights)
    assert CombineConfig().apart({"a": 0.5, "b": 1.0})
    assert not CombineConfig(rule="sum").apart({"a": 0.5, "b": 1.0})
    assert CombineConfig(rule="rank").apart(weights)
    assert CombineConfig(gates={"watched": 0.1}).apart(weights)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"objective": {"type": "reward_difference"}, "sampler": {"kernel": "flow_sde"}}, "reward_difference compares"),
        ({"advantage": {"baseline": "history"}}, "baseline history remembers"),
        ({"credit": {"rule": "turning_point"}}, "turning_point follows"),
    ],
)
def test_what_needs_one_reward_an_image_names_the_sum(settings, line):
    config({"a": 1, "watched": 0}, **settings)
    config({"a": 1, "b": 1}, combine={"rule": "sum"}, **settings)
    with pytest.raises(UserError, match=f"combine.rule: .*{line}.*use combine.rule: sum"):
        config({"a": 1, "b": 1}, **settings)


@pytest.mark.parametrize(
    ("combine", "line"),
    [
        ({"rule": "average"}, "combine.rule"),
        ({"gates": {"bb": 0.5}}, "combine.gates.bb: no reward has this name .did you mean 'b'"),
        ({"std_floor": {"a": -1.0}}, "combine.std_floor.a must be at least 0"),
        ({"rule": "sum", "gates": {"a": 0.5}}, "combine.gates: .*use combine.rule decoupled or rank"),
    ],
)
def test_mistakes_are_told(combine, line):
    with pytest.raises(UserError, match=line):
        config({"a": 1, "b": 1}, combine=combine)


def test_a_gate_with_nothing_behind_it_is_refused():
    with pytest.raises(UserError, match="'a' is the only weighted reward"):
        config({"a": 1, "b": 0}, combine={"gates": {"a": 0.5}})


def test_settings_nobody_reads_are_said():
    lines = without_effect(config({"a": 1}, combine={"batch_norm": False}))
    assert "combine.batch_norm has no effect: only one reward has a weight" in lines
    gradient = {"objective": {"type": "reward_gradient"}, "combine": {"rule": "sum"}}
    assert any(line.startswith("combine.rule has no effect") for line in without_effect(config({"a": 1}, **gradient)))
    ranked = config({"a": 1}, combine={"rule": "rank"}, advantage={"std_floor": 0.1})
    assert "advantage.std_floor has no effect: combine.rule is rank" in without_effect(ranked)


TWO = {"a": {"type": "brightness", "weight": 2.0}, "b": {"type": "brightness", "weight": -0.5}}


@pytest.fixture
def begin(tmp_path, write_config, on_cpu):
    """begin(rewards, changes) -> a run of 2 groups of 4 before its first iteration, on a tiny SD3.5-type pipeline."""

    def make(rewards, **changes):
        return start(
            load_config(write_config(tmp_path, "flow_grpo", {"rewards": rewards, **changes})), Console(quiet=True)
        )

    return make


def scored(run, seed=3, holes=()):
    """The plan of iteration 0, and drawn scores (8, 1) of all rewards; `holes` are (name, sample) without one."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(8, 1, generator=generator) for name in run.config.rewards}
    for name, sample in holes:
        values[name][sample] = NAN
    return run.config.sampler.make_plan(0, 0), Scores(values, {name: ~v.isnan() for name, v in values.items()})


def test_one_weighted_reward_keeps_its_advantages_bit_for_bit(begin):
    rewards = {"a": {"type": "brightness", "weight": 0.3}, "watched": {"type": "brightness", "weight": 0}}
    found, metrics = {}, {}
    for rule in ("sum", "decoupled"):
        run = begin(rewards, combine={"rule": rule})
        plan, scores = scored(run, holes=[("a", 5), ("watched", 2)])
        metrics[rule] = {}
        found[rule] = targets(run, plan, scores, metrics[rule])
    expected, _ = group_advantages(
        (0.3 * scores.values["a"]).expand(-1, len(plan.stochastic)),
        torch.ones(8, dtype=torch.bool),
        torch.arange(8) // 4,
        run.config.advantage,
    )
    assert torch.equal(found["sum"].advantages, expected)
    assert torch.equal(found["decoupled"].advantages, expected)
    assert metrics["sum"] == metrics["decoupled"]


def test_several_rewards_train_by_their_own_advantages_and_a_missing_score_skips_nothing(begin):
    run = begin(TWO, combine={"batch_norm": False})
    plan, scores = scored(run, holes=[("b", 0), ("b", 1), ("b", 5)])  # 3 of 8: more than max_invalid_fraction
    metrics = {}
    found = targets(run, plan, scores, metrics)
    everyone, groups = torch.ones(8, dtype=torch.bool), torch.arange(8) // 4
    own = {n: group_advantages(v[:, 0], everyone, groups, run.config.advantage)[0] for n, v in scores.values.items()}
    torch.testing.assert_close(found.advantages[:, 0], (2 * own["a"] - 0.5 * own["b"]) / 2.5)
    assert found.advantages.shape == (8, len(plan.stochastic))
    complete = [2, 3, 4, 6, 7]
    total = (2 * scores.values["a"] - 0.5 * scores.values["b"])[complete]
    assert metrics["reward/mean"] == pytest.approx(float(total.mean()), abs=1e-6)
    assert metrics["reward/invalid_fraction"] == 0
    assert metrics["advantage/a_share"] + metrics["advantage/b_share"] == pytest.approx(1)
    as_sum = begin(TWO, combine={"rule": "sum"})
    assert targets(as_sum, plan, scores, {}) is None  # there the three have no reward at all


def test_only_rewards_and_never_eval_rewards_reach_the_advantages(begin):
    measured = {"eval_rewards": {"held_out": {"type": "jpeg"}}}
    run = begin(TWO, **measured)
    plan, scores = scored(run)
    before = targets(run, plan, scores, {})
    scores.values["held_out"] = torch.randn(8, 1)
    scores.valid["held_out"] = torch.ones(8, 1, dtype=torch.bool)
    assert torch.equal(targets(run, plan, scores, {}).advantages, before.advantages)


@pytest.mark.parametrize("rule", ["decoupled", "rank"])
def test_step_rewards_are_combined_step_by_step_in_a_real_iteration(begin, rule):
    rewards = {"a": {"type": "brightness"}, "b": {"type": "jpeg", "args": {"divisor": 0.1}}}
    run = begin(rewards, combine={"rule": rule, "gates": {"a": 0.4}}, credit={"rule": "gain"})
    before = [p.detach().clone() for p in run.parameters]
    metrics = run_iteration(run, lambda *_: None)
    assert {"advantage/a_share", "advantage/b_zero_spread", "gate/a_open", "reward/a", "reward/b"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(p, q) for p, q in zip(before, run.parameters, strict=True))


def test_a_sum_in_the_base_models_units_has_its_mean_and_spread(begin):
    run = begin(TWO, combine={"rule": "sum", "standardise": "reference"})
    plan, scores = scored(run, holes=[("b", 6)])
    with pytest.raises(UserError, match="no evaluation of the base model"):
        targets(run, plan, scores, {})
    base = {"a": [1.0, 3.0, None, 2.0], "b": [-100.0, 100.0, 0.0, 0.0], "held_out": [0.0] * 4}
    write_json(run.config.run_dir / "eval" / "base.json", {"scores": base})
    metrics = {}
    found = targets(run, plan, scores, metrics)
    a, b = (scores.values[name][:, 0] for name in "ab")
    expected = 2 * (a - 2) / math.sqrt(2 / 3) - 0.5 * b / math.sqrt(5000)
    torch.testing.assert_close(found.rewards, expected, equal_nan=True)
    assert metrics["reward/mean"] == pytest.approx(float(expected.nanmean()), abs=1e-6)
    write_json(run.config.run_dir / "eval" / "base.json", {"scores": base | {"b": [0.5, 0.5, None, 0.5]}})
    with pytest.raises(UserError, match="scores of reward 'b' do not differ"):
        targets(run, plan, scores, {})


def test_the_unit_of_a_metric_does_not_decide_and_rounding_is_no_difference(tmp_path):
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(64, generator=generator) for name in "ab"}
    scores = {name: torch.randn(8, 1, generator=generator) for name in "ab"}

    def total(factor, noise=1.0):
        stored = {"a": factor * base["a"], "b": 0.5 + noise * base["b"]}
        now = {"a": factor * scores["a"], "b": 0.5 + noise * scores["b"]}
        write_json(tmp_path / "eval" / "base.json", {"scores": {n: v.tolist() for n, v in stored.items()}})
        units = base_units(tmp_path, ["a", "b"])
        found = standardised(Scores(now, {n: ~v.isnan() for n, v in now.items()}), units).values
        return 0.6 * found["a"] + found["b"]

    torch.testing.assert_close(total(1000.0), total(1.0), atol=1e-5, rtol=1e-5)
    # differences of a few float32 steps, 6e-8 at .5, are divided by the floor of 1e-6 and not by their own std
    alone = 0.6 * (scores["a"] - base["a"].mean()) / base["a"].std(correction=0)
    stored, now = ((0.5 + 1e-7 * x["b"]).double() for x in (base, scores))
    floored = (now - stored.mean()).float() / 1e-6
    torch.testing.assert_close(total(1.0, noise=1e-7), alone + floored, atol=1e-5, rtol=1e-5)


def test_a_whole_run_standardises_by_its_own_base_evaluation(tmp_path, write_config, train_here):
    rewards = {"a": {"type": "brightness"}, "b": {"type": "jpeg", "weight": 0.5}}
    changes = {"rewards": rewards, "combine": {"rule": "sum", "standardise": "reference"}, "train": {"iterations": 1}}
    train_here(write_config(tmp_path, "flow_grpo", changes))
    base = json.loads((tmp_path / "run" / "eval" / "base.json").read_text())["scores"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["kind"] == "train")
    z = {n: (row[f"reward/{n}"] - np.mean(base[n])) / np.std(base[n]) for n in base}
    assert row["reward/mean"] == pytest.approx(z["a"] + 0.5 * z["b"], rel=1e-4)


PAR = {"combine": {"par": {"enabled": True, "images": 2}}, "advantage": {"std_floor": 0.05}}


def test_shaped_rewards_are_preference_over_the_base_models_images_of_the_same_prompt(begin):
    run = begin({"a": {"type": "brightness"}}, **PAR)
    base = {"a": [0.1, 0.3]}  # mean 0.2, std 0.1
    write_json(run.config.run_dir / "eval" / "base.json", {"scores": base})
    with torch.no_grad():
        for parameter in run.parameters:  # references are the base model's, whatever the adapter has become
            parameter.add_(1.0)
    weights = [p.detach().clone() for p in run.parameters]
    plan, scores = scored(run)
    metrics = {}
    found = targets(run, plan, scores, metrics)
    stored = json.loads((run.config.run_dir / "references.json").read_text())["scores"]
    prompts = [run.train_prompts[i] for i in prompt_ids(run, 0)]
    for group, prompt in enumerate(prompts):
        texts = [prompt.text] * 2
        with run.model.reference():
            images = sample_images(
                run.model, texts, [2 * group, 2 * group + 1], 2, 1.0, run.config.train.seed + 0x504152
            )
        references = stored[json.dumps([prompt.text, {}])]["a"]
        torch.testing.assert_close(torch.tensor(references), images.mean(dim=(1, 2, 3)).cpu())
        own = scores.values["a"][4 * group : 4 * group + 4]
        expected = ((own - torch.tensor(references)) / 0.1).sigmoid().mean(dim=1)
        torch.testing.assert_close(found.rewards[4 * group : 4 * group + 4], expected)
    assert metrics["reward/a_par"] == pytest.approx(float(found.rewards.mean()), abs=1e-6)
    assert run.counters.nfe == 2 * 2 * 2  # prompts, images, steps
    assert all(torch.equal(p, q) for p, q in zip(weights, run.parameters, strict=True))
    again = targets(run, plan, scores, {})
    assert run.counters.nfe == 8  # the references were there
    assert torch.equal(again.advantages, found.advantages)


def test_a_continued_run_with_references_ends_like_one_that_was_not_stopped(tmp_path, write_config, train_here):
    changes = {**PAR, "train": {"iterations": 4}, "checkpoint": {"every": 2}, "eval": {"every": 0}}
    rewards = {"a": {"type": "brightness"}, "b": {"type": "jpeg"}}
    path = write_config(tmp_path, "flow_grpo", {"rewards": rewards, **changes})
    train_here(path, "name=whole")
    train_here(path, "name=cut", "train.iterations=2")
    train_here(path, "name=cut")
    ends = [load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_shaped_rewards_need_a_floor():
    with pytest.raises(UserError, match="set advantage.std_floor to 0.05 or more, got 0"):
        config({"a": 1}, combine={"par": {"enabled": True}})
    with pytest.raises(UserError, match="combine.par.images must be at least 1"):
        config({"a": 1}, combine={"par": {"enabled": True, "images": 0}}, advantage={"std_floor": 0.1})


def test_multipliers_step_as_in_the_released_code():
    # J - value = 0.3 - 0.44 = -0.14, lr 0.1, no momentum: the sigmoid's slope at 0 is 1/4, that of tanh 1
    for kind, eta, factor in (("at_least", 0.0035, 0.5008750), ("equal", 0.014, 0.0139991)):
        settings = ConstraintConfig(kind=kind, momentum=0.0)
        after = advanced({"eta": 0.0, "velocity": 0.0}, 0.3, 0.44, 1.0, settings)
        assert after["eta"] == pytest.approx(eta, abs=1e-12)
        assert multiplier(after["eta"], settings) == pytest.approx(factor, abs=1e-7)
        assert advanced({"eta": 0.2, "velocity": 0.0}, 0.44, 0.44, 1.0, settings)["eta"] == 0.2
        assert advanced({"eta": 0.2, "velocity": 0.0}, 0.45, 0.44, 1.0, settings)["eta"] < 0.2
        assert multiplier(first(settings)["eta"], settings) == pytest.approx(0.1)
        # the unit of a reward does not decide how fast its multiplier moves
        thousand = advanced({"eta": 0.0, "velocity": 0.0}, 300.0, 440.0, 1000.0, settings)
        assert thousand["eta"] == pytest.approx(after["eta"])
        assert advanced(after, NAN, 0.44, 1.0, settings) == after


def test_a_multiplier_follows_a_running_mean_with_momentum():
    # .9 x .3 + .1 x .5 = .32, so the gradients are -.14 and -.12 (1 - tanh^2(.014)) = -.1199765; to the second step a
    # tenth of the first is added: .014 + .1 (.1199765 + .1 x .14) = .0273976
    once = advanced({"eta": 0.0, "velocity": 0.0}, 0.3, 0.44, 1.0, ConstraintConfig())
    twice = advanced(once, 0.5, 0.44, 1.0, ConstraintConfig())
    assert [once["eta"], twice["eta"], twice["mean"]] == pytest.approx([0.014, 0.0273976, 0.32], abs=1e-7)


def test_a_multiplier_turns_against_an_overshoot_no_further_than_its_limit_and_comes_back_at_once():
    settings = ConstraintConfig()
    follower = first(settings)
    for _ in range(50):
        follower = advanced(follower, 5.0, 0.0, 1.0, settings)
    assert multiplier(follower["eta"], settings) == pytest.approx(-0.2)
    follower = {**follower, "mean": -1.0}
    for _ in range(4):
        follower = advanced(follower, -1.0, 0.0, 1.0, settings)
    assert multiplier(follower["eta"], settings) > 0


def test_the_multiplier_scales_a_rewards_part_and_the_whole_with_it():
    rewards = {"a": column(0.0, 1.0), "b": column(1.0, 0.0)}
    finals = {name: values[:, 0] for name, values in rewards.items()}
    settings = (torch.zeros(2), CombineConfig(), PER_GROUP, {"b": 0.25})
    found, _ = combined_advantages(rewards, {"a": 1.0, "b": 1.0}, finals, *settings)
    torch.testing.assert_close(found, column(-0.375, 0.375))  # (1 - 0.25) / 2


def test_what_constraints_do_not_ask_for_goes_to_the_penalty():
    assert penalty_share({"a": 0.6, "b": 0.1}) == pytest.approx(1.3 / 2)
    assert penalty_share({"a": -0.2}) == pytest.approx(1.2)
    assert penalty_share({}) == 1


def test_with_constraints_images_feel_what_is_left_of_the_penalty(begin):
    constraints = {"values": {"a": 9.0}, "initial": 0.25}
    run = begin(TWO, combine={"constraints": constraints}, objective={"kl_beta": 0.04})
    plan, scores = scored(run)
    write_json(run.config.run_dir / "eval" / "base.json", {"scores": {name: [0.0, 1.0] for name in TWO}})
    metrics = {}
    found = targets(run, plan, scores, metrics)
    assert found.pull.tolist() == pytest.approx([0.75] * 8)
    assert metrics["constraint/penalty"] == pytest.approx(0.75)
    gate = {"mode": "gate_kl", "sources": ["rank_disagreement"], "auxiliaries": ["b"], "gate_fraction": 0.2}
    watched = {"a": TWO["a"], "b": {**TWO["b"], "weight": 0.0}}
    gated = begin(watched, combine={"constraints": constraints}, objective={"kl_beta": 0.04}, uncertainty=gate)
    found = targets(gated, plan, scores, {})
    assert sorted(found.pull.tolist()) == pytest.approx([0.0] * 7 + [0.75])


def test_a_continued_run_with_constraints_ends_like_one_that_was_not_stopped(tmp_path, write_config, train_here):
    changes = {"train": {"iterations": 4}, "checkpoint": {"every": 2}, "eval": {"every": 0}}
    changes["combine"] = {"constraints": {"values": {"a": 0.9}}}
    rewards = {"a": {"type": "brightness"}, "b": {"type": "jpeg"}}
    path = write_config(tmp_path, "flow_grpo", {"rewards": rewards, **changes})
    train_here(path, "name=whole")
    train_here(path, "name=cut", "train.iterations=3")  # the third iteration is lost again: its checkpoint is deleted
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    assert checkpoints[0].name.endswith("2")
    train_here(path, "name=cut")
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    factors = [row["constraint/a"] for row in rows if row["kind"] == "train"]
    assert factors[0] == pytest.approx(0.1)
    assert factors == sorted(factors)  # far below its value, the reward gains weight
    assert len(set(factors)) == 4
    shares = [row["constraint/penalty"] for row in rows if row["kind"] == "train"]
    assert shares == pytest.approx([1 - factor for factor in factors])
    ends = [load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_mistaken_constraints_are_told():
    for settings, line in (
        ({"values": {"c": 1.0}}, "combine.constraints.values.c: no reward has this name"),
        ({"values": {"b": 1.0}}, "combine.constraints.values.b: .*must be above 0"),
        ({"values": {"a": 1.0}, "initial": 1.0}, "combine.constraints.initial must be in"),
        ({"values": {"a": 1.0}, "decay": 1.0}, "combine.constraints.decay must be in"),
    ):
        with pytest.raises(UserError, match=line):
            config({"a": 1, "b": -1}, combine={"constraints": settings})
