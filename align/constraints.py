"""Weights that follow how far each reward is from a value it should reach (arXiv 2310.04373).

A reward stands for what is wanted only up to a point. A constraint names it, and a multiplier in the place of a fixed
weight grows while the reward is short of it and falls beyond. The multipliers after each iteration are kept in the run's
folder, so that a run continued from an earlier checkpoint finds those of its iteration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from align.combination import ConstraintConfig, base_units
from align.run import Run
from align.scoring import Scores
from align.tracking import write_json

_FILE = "constraints.json"

Follower = dict[str, float]
"""`eta`, its `velocity`, and, once there was a score, the running `mean` of the reward."""


def multiplier(eta: float, config: ConstraintConfig) -> float:
    """tanh(eta), at least `lowest`, or sigmoid(eta) (released code of arXiv 2310.04373)."""
    return max(math.tanh(eta), config.lowest) if config.kind == "equal" else 1 / (1 + math.exp(-eta))


def first(config: ConstraintConfig) -> Follower:
    """Where a multiplier starts: at `initial`."""
    odds = config.initial / (1 - config.initial)
    return {"eta": math.atanh(config.initial) if config.kind == "equal" else math.log(odds), "velocity": 0.0}


def advanced(follower: Follower, mean: float, value: float, unit: float, config: ConstraintConfig) -> Follower:
    """One step of gradient descent with momentum of eta on multiplier(eta) (J - value) / unit (arXiv 2310.04373).

    mean: of the reward over the iteration, which enters its running mean J; NaN changes nothing.
    """
    if math.isnan(mean):
        return follower
    running = config.decay * follower.get("mean", mean) + (1 - config.decay) * mean
    now = multiplier(follower["eta"], config)
    slope = 1 - now**2 if config.kind == "equal" else now * (1 - now)
    velocity = config.momentum * follower["velocity"] + slope * (running - value) / unit
    eta = follower["eta"] - config.lr * velocity
    if config.kind == "equal":  # not below where it acts, or it would take long to come back
        eta = max(eta, math.atanh(config.lowest))
    return {"eta": eta, "velocity": velocity, "mean": running}


def penalty_share(multipliers: Mapping[str, float]) -> float:
    """(N - sum) / N of the N multipliers: what is left of the penalty towards the base (arXiv 2310.04373); 1 without any.

    The further all rewards are from their values the less it counts; it is full, or more, where they are reached.
    """
    return 1 - sum(multipliers.values()) / max(1, len(multipliers))


def follow(run: Run, scores: Scores, metrics: dict[str, float]) -> dict[str, float]:
    """Multipliers of this iteration by reward, none without constraints; moves them on for the next and stores them.

    scores: raw, of all samples of the iteration.
    """
    config, iteration, path = run.config.combine.constraints, run.counters.iteration, run.config.run_dir / _FILE
    if not config.values:
        return {}
    # one process reads, and only what is older than this iteration: a continued run may find what it had lost
    found: list[Any] = [_before(path, iteration) if run.main else None]
    stored: dict[str, dict[str, Follower]] = broadcast_object_list(found)[0]
    newest = stored[max(stored, key=int)] if stored else {}
    units = base_units(run.config.run_dir, list(config.values))
    used, after = {}, {}
    for name, value in config.values.items():
        follower = newest.get(name) or first(config)
        used[name] = multiplier(follower["eta"], config)
        after[name] = advanced(follower, scores.mean(name), value, units[name][1], config)
        metrics[f"constraint/{name}"] = used[name]
        if "mean" in after[name]:
            metrics[f"constraint/{name}_gap"] = after[name]["mean"] - value
    objective = run.config.objective
    if objective.penalty is not None and getattr(objective, objective.penalty) > 0:
        metrics["constraint/penalty"] = penalty_share(used)
    if run.main:
        write_json(path, stored | {str(iteration + 1): after})
    return used


def _before(path: Path, iteration: int) -> dict[str, dict[str, Follower]]:
    """What was stored for iterations up to `iteration`, by iteration; nothing if there is no file."""
    if iteration == 0 or not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return {number: followers for number, followers in data.items() if int(number) <= iteration}
