"""A committee of rewards: what it makes of their scores, how sure it is, and the units it waits for."""

from __future__ import annotations

import json

import pytest
import torch

from rewards import Reward, RewardConfig, RewardError, RewardOutput, build_reward, checked_score
from rewards.conformance import FAIL, check
from rewards.uncertainty import reference_statistics

NAN = float("nan")


class Channel(Reward):
    """Mean of one colour channel, in a unit of one's own; no score of the prompt "none"."""

    differentiable = True
    uses_prompt = False

    def __init__(self, channel: int, factor: float = 1.0, shift: float = 0.0) -> None:
        self.channel, self.factor, self.shift = channel, factor, shift

    def score(self, batch):
        means = batch.images[:, self.channel].mean(dim=(1, 2))
        missing = torch.tensor([prompt == "none" for prompt in batch.prompts])
        return RewardOutput(torch.where(missing, torch.nan, self.factor * means + self.shift))


def committee(factor: float = 1.0, **args):
    kind = f"{__file__}:Channel"
    members = {
        "red": {"type": kind, "args": {"channel": 0}},
        "green": {"type": kind, "args": {"channel": 1, "factor": factor}},
        "blue": {"type": kind, "args": {"channel": 2, "shift": 3.0}},
    }
    reward = build_reward("committee", RewardConfig(type="ensemble", args={"members": members, **args}))
    reward.setup(torch.device("cpu"), torch.float32)
    return reward


def fitted(batch, **args):
    reward = committee(**args)
    reward.use_reference(reference_statistics(reward.reference_scores(batch)))
    return reward


def test_it_scores_in_the_units_of_the_base_models_images(make_batch):
    base, batch = make_batch(16, seed=1), make_batch(4)
    means, reference = batch.images.mean(dim=(2, 3)), base.images.mean(dim=(2, 3))
    z = (means - reference.mean(0)) / reference.std(0, correction=0)
    for objective, expected in (
        ("mean", z.mean(1)),
        ("wco", z.amin(1)),
        ("uwo", z.mean(1) - 0.1 * z.var(1, correction=0)),
    ):
        found = checked_score(fitted(base, objective=objective), batch)
        torch.testing.assert_close(found.scores, expected, atol=1e-4, rtol=1e-4)
        assert found.uncertainty is not None
        torch.testing.assert_close(found.uncertainty, z.std(1, correction=0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.components["green"], z[:, 1], atol=1e-4, rtol=1e-4)


def test_the_unit_of_a_member_decides_nothing(make_batch):
    base, batch = make_batch(16, seed=1), make_batch(4)
    for objective in ("mean", "wco", "uwo"):
        plain, scaled = (checked_score(fitted(base, factor=f, objective=objective), batch) for f in (1.0, 500.0))
        torch.testing.assert_close(scaled.scores, plain.scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scaled.uncertainty, plain.uncertainty, atol=1e-4, rtol=1e-4)
    raw = [checked_score(committee(factor=f, standardise="none"), batch).scores for f in (1.0, 500.0)]
    assert (raw[0] - raw[1]).abs().min() > 1


def test_where_a_member_is_silent_so_is_the_committee(make_batch):
    base = make_batch(8, seed=1)
    batch = make_batch(3, prompts=["a", "none", "b"])
    for objective in ("mean", "wco", "uwo"):
        output = checked_score(fitted(base, objective=objective), batch)
        assert output.scores.isnan().tolist() == [False, True, False]
        assert output.uncertainty is not None
        assert output.uncertainty.isnan().tolist() == [False, True, False]


def test_before_it_has_units_it_says_what_to_do(make_batch):
    reward = committee()
    assert reward.needs_reference
    with pytest.raises(
        RewardError, match=r"'committee' has no reference statistics: .*args\.reference.*standardise"
    ) as told:
        checked_score(reward, make_batch(2))
    assert "\n" not in str(told.value)
    reward.use_reference({name: {"mean": 0.0, "std": 1.0} for name in reward.members})
    assert not reward.needs_reference
    with pytest.raises(RewardError, match="no score of the base model's images by member blue"):
        committee().use_reference({name: {"mean": 0.0, "std": 1.0} for name in ("red", "green")})
    with pytest.raises(RewardError, match="member 'red' do not differ"):
        committee().use_reference({name: {"mean": 0.0, "std": 0.0} for name in reward.members})
    assert not committee(standardise="none").needs_reference


def test_a_runs_file_serves_outside_of_it(make_batch, tmp_path):
    base, batch, path = make_batch(16, seed=1), make_batch(4), tmp_path / "uncertainty.json"
    statistics = reference_statistics(committee().reference_scores(base))
    path.write_text(json.dumps({"rewards": {"other": {"red": {}}, "mine": statistics}}))
    found = checked_score(committee(reference=str(path)), batch)
    assert torch.equal(found.scores, checked_score(fitted(base), batch).scores)
    path.write_text(json.dumps({"rewards": {"other": dict.fromkeys(statistics, {})}}))
    with pytest.raises(RewardError, match="has no reward with the members red, green, blue"):
        committee(reference=str(path))
    with pytest.raises(RewardError, match="is not the uncertainty.json of a run"):
        committee(reference=str(tmp_path / "none.json"))


def test_gradients_reach_the_images_through_score_and_uncertainty(make_batch):
    base, batch = make_batch(16, seed=1), make_batch(4)
    for take in (lambda output: output.scores, lambda output: output.uncertainty):
        images = batch.images.clone().requires_grad_()
        output = checked_score(fitted(base), make_batch(4, images=images))
        (gradient,) = torch.autograd.grad(take(output).sum(), images)
        assert gradient.isfinite().all()
        assert gradient.abs().amax() > 0


def test_it_keeps_the_contract_of_rewards():
    verdicts = check(committee(standardise="none"))
    assert [v for v in verdicts if v.status == FAIL] == []
    # a committee with a member of which pixels are hidden is not differentiable as a whole
    mixed = build_reward(
        "mixed",
        RewardConfig(
            type="ensemble",
            args={"members": {"a": {"type": "brightness"}, "b": {"type": "jpeg"}}, "standardise": "none"},
        ),
    )
    assert not mixed.differentiable
    assert [v for v in check(mixed) if v.status == FAIL] == []


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"members": {}}, "members must map names to rewards"),
        ({"members": {"a": {"type": "brightness", "weight": 2}}}, "members.a: unknown key 'weight'"),
        ({"members": {"a": {"type": "brigtness"}}}, "members.a.*did you mean 'brightness'"),
        ({"members": {"a": {"type": "brightness"}}, "objective": "median"}, "objective must be one of mean, wco, uwo"),
        ({"members": {"a": {"type": "brightness"}}, "coefficient": -1}, "coefficient must be at least 0"),
        ({"members": {"a": {"type": "brightness"}}, "variance": "sample"}, "variance must be one of"),
        (
            {"members": {"a": {"type": "brightness"}}, "objective": "wco", "coefficient": 0.1},
            "coefficient has no effect with objective wco",
        ),
        (
            {"members": {"a": {"type": "ensemble", "args": {"members": {"b": {"type": "brightness"}}}}}},
            "cannot be a member",
        ),
    ],
)
def test_mistakes_are_told(args, line):
    with pytest.raises(RewardError, match=line) as told:
        build_reward("committee", RewardConfig(type="ensemble", args=args))
    assert "\n" not in str(told.value)


def test_a_committee_that_waits_cannot_be_kept():
    args = {"type": "ensemble", "args": {"members": {"a": {"type": "brightness"}}}}
    with pytest.raises(RewardError, match="cache its members"):
        build_reward("kept", RewardConfig(type="cached", args=args))
