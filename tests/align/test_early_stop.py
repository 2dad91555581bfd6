"""When a watched reward ends a run, and which weights are then the best."""

from __future__ import annotations

import math

import pytest
import torch

from align.config import CONFIG_DIR, load_config
from align.early_stop import EarlyStopConfig, Verdict, Watch, judge
from align.errors import UserError
from align.train import notes
from rewards.registry import RewardConfig

TRAINED = {"proxy": RewardConfig("clip"), "logged": RewardConfig("jpeg", weight=0.0)}
WATCHED = {"verifier": RewardConfig("verifier")}


def means(*values: float) -> list[tuple[int, float]]:
    """Evaluations every 10 iterations, the base's first."""
    return [(10 * i, value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # the margin is 1 % of the base's .5: .005 below the best
        ((0.5, 0.6, 0.596), Verdict(best=10, bar=10, bad=0)),
        ((0.5, 0.6, 0.594), Verdict(best=10, bar=10, bad=1)),
        # above the base all the time, and still past its best
        ((0.5, 0.6, 0.55, 0.54, 0.53), Verdict(best=10, bar=10, bad=3)),
        # in a row
        ((0.5, 0.6, 0.55, 0.54, 0.6, 0.53), Verdict(best=40, bar=40, bad=1)),
        # never as good as the base, whose weights are no result
        ((0.5, 0.3, 0.4, 0.2), Verdict(best=20, bar=0, bad=3)),
        # within the margin below the base: not bad, and the last of equals is the best
        ((0.5, 0.499, 0.499), Verdict(best=20, bar=0, bad=0)),
        # a margin is a margin of negative means too
        ((-0.5, -0.4, -0.404, -0.406), Verdict(best=10, bar=10, bad=1)),
        ((-0.5, -0.6), Verdict(best=10, bar=0, bad=1)),
        # no score says nothing: the row of bad ones goes on where it was
        ((0.5, 0.6, 0.5, math.nan, 0.5), Verdict(best=10, bar=10, bad=2)),
        ((0.5, math.nan), Verdict(best=None, bar=0, bad=0)),
        ((0.5,), Verdict(best=None, bar=0, bad=0)),
        ((), Verdict(best=None, bar=0, bad=0)),
    ],
)
def test_the_rule(values, expected):
    assert judge(means(*values), drop=0.01) == expected


def test_the_margin_grows_with_the_base_and_not_with_the_best():
    # base 10: a drop of .09 is within 1 % of it, one of .11 is not, wherever the best is
    for best in (11.0, 1000.0):
        assert judge(means(10.0, best, best - 0.09), drop=0.01).bad == 0
        assert judge(means(10.0, best, best - 0.11), drop=0.01).bad == 1


def test_without_a_margin_any_fall_is_bad_and_a_constant_reward_is_not():
    assert judge(means(0.5, 0.5, 0.5), drop=0).bad == 0
    assert judge(means(0.5, 0.5, 0.4999), drop=0).bad == 1
    assert judge(means(0.0, 0.0, -1e-6), drop=0.5).bad == 1  # of a base of 0 there is no margin


def watch(weight: torch.nn.Parameter, **measured: int) -> Watch:
    return Watch(EarlyStopConfig("verifier", patience=2), measured, [weight])


def live(weight: torch.nn.Parameter, value: float) -> None:
    with torch.no_grad():
        weight.fill_(value)


def followed(weight: torch.nn.Parameter, one: Watch, *values: float) -> None:
    """Add the values of the base and of iterations 1, 2, ..., at which the weight is 1, 2, ..."""
    for i, value in enumerate(values, start=len(one.means)):
        live(weight, float(i))
        one.add(i, value)


def test_it_stops_after_patience_and_holds_the_best_weights():
    weight = torch.nn.Parameter(torch.zeros(2))
    one = watch(weight)
    followed(weight, one, 0.5, 0.6, 0.7, 0.6)
    assert not one.stopped
    followed(weight, one, 0.6)
    assert one.stopped
    assert one.reason() == "verifier was below its best (0.7 at iteration 2) for 2 evaluations"
    assert one.choice() == "where verifier was highest (0.7, the base's 0.5)"
    with one.weights.applied():
        assert weight.tolist() == [2.0, 2.0]
    assert weight.tolist() == [4.0, 4.0]


def test_a_reward_that_falls_from_the_start_is_said_to_be_below_the_base():
    weight = torch.nn.Parameter(torch.zeros(2))
    one = watch(weight)
    followed(weight, one, 0.5, 0.4, 0.3)
    assert one.reason() == "verifier was below its best (0.5, the base's) for 2 evaluations"
    with one.weights.applied():
        assert weight.tolist() == [1.0, 1.0]


def test_a_restored_watch_goes_on_as_the_first():
    weight, again = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    one, other = watch(weight, seed=1), watch(again, seed=1)
    followed(weight, one, 0.5, 0.7, 0.6)
    tensors, state = one.state()
    assert list(tensors) == ["best.0"]
    assert other.restore({k: v.clone() for k, v in tensors.items()}, state)
    assert other.means == one.means
    for watched, parameter in ((one, weight), (other, again)):
        followed(parameter, watched, 0.6)
        assert watched.stopped
        with watched.weights.applied():
            assert parameter.tolist() == [1.0, 1.0]


def test_a_missing_score_is_null_in_a_checkpoint():
    one = watch(torch.nn.Parameter(torch.zeros(2)))
    assert one.restore({}, {"measured": {}, "means": [[0, 0.5], [1, None]]})
    assert math.isnan(one.means[1][1])
    assert one.verdict == Verdict(best=None, bar=0, bad=0)


def test_scores_that_were_measured_in_another_way_are_not_compared():
    weight = torch.nn.Parameter(torch.zeros(2))
    one, other = watch(weight, num_steps=4), watch(weight, num_steps=8)
    followed(weight, one, 0.5, 0.4, 0.3)
    assert not other.restore(*one.state())
    assert not other.stopped
    assert other.means == []


def test_more_patience_lets_the_same_evaluations_go_on():
    weight = torch.nn.Parameter(torch.zeros(2))
    one = watch(weight)
    followed(weight, one, 0.5, 0.4, 0.3)
    patient = Watch(EarlyStopConfig("verifier", patience=3), {}, [weight])
    assert patient.restore(*one.state())
    assert one.stopped
    assert not patient.stopped


def test_a_base_without_a_score_is_refused():
    with pytest.raises(UserError, match=r"early_stop\.reward: 'verifier' has no score for the base's images"):
        watch(torch.nn.Parameter(torch.zeros(1))).add(0, math.nan)


@pytest.mark.parametrize("name", [None, "verifier", "logged"])
def test_what_is_not_trained_may_be_watched(name):
    assert EarlyStopConfig(name).validate(TRAINED, WATCHED, eval_every=10) == []


def test_every_mistake_is_told():
    def errors(every: int = 10, **settings) -> list[str]:
        return EarlyStopConfig(**settings).validate(TRAINED, WATCHED, every)

    assert errors(reward="verifer") == ["reward: no reward 'verifer' (did you mean 'verifier'?)"]
    assert errors(reward="zzz") == ["reward: no reward 'zzz'; not trained here: logged, verifier"]
    (line,) = errors(reward="proxy")
    assert line.startswith("reward: 'proxy' is trained")
    assert errors(reward="verifier", every=0) == [
        "reward: it is watched in the evaluations during the run; set eval.every above 0"
    ]
    assert errors(drop=-0.1, patience=0) == [
        "drop: must not be negative, got -0.1",
        "patience: must be at least 1, got 0",
    ]
    assert errors(every=0) == []  # nothing is watched


@pytest.mark.parametrize(("reward", "told"), [("proxy", True), ("verifier", False)])
def test_a_member_of_the_trained_ensemble_is_a_poor_watch(reward, told):
    config = load_config(CONFIG_DIR / "playground" / "ensemble.yaml", [f"early_stop.reward={reward}"])
    assert any("'proxy' is a part of what is trained and rises with it" in line for line in notes(config)) == told
