"""How several weighted rewards become one advantage: as one sum, each on its own scale, or by rank.

    sum         R = sum_k w_k r_k, then one advantage of R (Flow-GRPO, arXiv 2505.05470; DiffusionNFT, 2509.16117)
    decoupled   A_k of each reward, then sum_k w_k A_k / sum_k |w_k| (GDPO, arXiv 2601.05242)
    rank        the same with u_k in [-1, 1], the rank of r_k in its group, for A_k

In a sum the reward with the widest spread decides, whatever its weight was meant to say, unless the rewards are brought
to the base model's units first. A missing score makes the whole sum missing; apart, it is neutral: the others' parts stand.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from align.advantages import AdvantageConfig, group_advantages, weighted_centre
from align.errors import UserError
from align.schema import nearest
from align.scoring import Scores
from align.uncertainty import Confidence
from rewards.combine import gated, ranks
from rewards.registry import RewardConfig
from rewards.uncertainty import STD_FLOOR

CombineRule = Literal["sum", "decoupled", "rank"]
ConstraintKind = Literal["at_least", "equal"]
Standardise = Literal["none", "reference"]
PAR_FLOOR = 0.05
"""Least `advantage.std_floor` of shaped rewards: dividing by the std of a saturated group would undo the bound."""

_LEAST_STD = 0.1
"""Least std that `batch_norm` divides by. Where all rewards hardly differ, eps and floors made the advantages small, and
must not be undone."""


@dataclass
class ParConfig:
    """Rewards as preference over the base model's images of the same prompt (PAR, arXiv 2502.18770)."""

    enabled: bool = False
    """Train mean_m sigmoid(slope (r - r_m) / s) in place of every weighted reward r; r_m are the scores of reference
    images, s is the std of the base model's held-out scores."""
    slope: float = 1.0
    """Slope of the sigmoid (2502.18770: 1, for differences of about 1, to which s brings every reward)."""
    images: int = 4
    """Reference images per prompt, made when it first comes up (2502.18770: 10, and 1 is enough)."""

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = [] if self.slope > 0 else [f"slope must be above 0, got {self.slope}"]
        return errors + ([] if self.images >= 1 else [f"images must be at least 1, got {self.images}"])


@dataclass
class ConstraintConfig:
    """Rewards with a value to reach, and multipliers that follow how far they are from it (arXiv 2310.04373)."""

    values: dict[str, float] = field(default_factory=dict)
    """Reward -> the mean it should reach, in its raw units; one to three std of the base model above its mean, and below
    where a held-out reward begins to fall."""
    kind: ConstraintKind = "equal"
    """equal: the multiplier is tanh(eta) and turns against a reward that overshoots (xi-PPO, best in 2310.04373).
    at_least: sigmoid(eta), which only fades (mu-PPO)."""
    lr: float = 0.1
    """Step of eta per iteration and std of the base model's held-out scores (2310.04373: .1, in raw units)."""
    momentum: float = 0.1
    """Momentum of eta (released code of arXiv 2310.04373)."""
    initial: float = 0.1
    """First multiplier, in (0, 1)."""
    lowest: float = -0.2
    """equal: least multiplier, so that a value set too low cannot turn a reward round."""
    decay: float = 0.9
    """Decay of the running mean of a reward that is held against its value."""

    def validate(self, rewards: Mapping[str, RewardConfig]) -> list[str]:
        """Return one line per error, given the rewards of the run; empty when the settings are usable."""
        errors = []
        for name in self.values:
            if name not in rewards:
                errors.append(f"values.{name}: no reward has this name{nearest(name, rewards)}")
            elif rewards[name].weight <= 0:
                errors.append(f"values.{name}: its multiplier scales its weight, which must be above 0")
        if self.kind not in get_args(ConstraintKind):
            errors.append(f"kind must be one of {', '.join(get_args(ConstraintKind))}, got {self.kind!r}")
        if not self.lr > 0:
            errors.append(f"lr must be above 0, got {self.lr}")
        if not 0 < self.initial < 1:
            errors.append(f"initial must be in (0, 1), got {self.initial}")
        if not -1 < self.lowest <= 0:
            errors.append(f"lowest must be in (-1, 0], got {self.lowest}")
        return errors + [
            f"{key} must be in [0, 1), got {getattr(self, key)}"
            for key in ("momentum", "decay")
            if not 0 <= getattr(self, key) < 1
        ]


@dataclass
class CombineConfig:
    """How several weighted rewards are trained together. Of it, `batch_norm` and `std_floor` do not act on a single one, nor
    does it matter then whether `rule` is sum or decoupled."""

    rule: CombineRule = "decoupled"
    """sum: of the raw scores, then one advantage. decoupled: each reward's own advantage, then their weighted mean
    (GDPO, 2601.05242). rank: the weighted mean of ranks in the group, for scores of unknown scale or heavy tails."""
    standardise: Standardise = "none"
    """sum: "reference" sums (r - mean) / std, with mean and std of the base model's scores on the held-out prompts. They
    stay fixed, so that weights keep their meaning as the policy moves."""
    batch_norm: bool = True
    """decoupled, rank: bring the combined advantages of an iteration back to a std of 1 (2601.05242), which the mean of
    rewards that disagree lowers; by a factor of at most 10. Not applied with constraints."""
    std_floor: dict[str, float] = field(default_factory=dict)
    """decoupled: least std divided by, of the rewards named, in their own units; of the others `advantage.std_floor`. A
    tenth of the base model's std in a group keeps noise of a reward that is nearly constant from being amplified."""
    gates: dict[str, float] = field(default_factory=dict)
    """Reward -> threshold, highest priority first: rewards behind it only raise the advantage of images whose score is
    above it (G-RA, 2508.10548). A gate may have weight 0."""
    par: ParConfig = field(default_factory=ParConfig)
    constraints: ConstraintConfig = field(default_factory=ConstraintConfig)

    def validate(self, rewards: Mapping[str, RewardConfig]) -> list[str]:
        """Return one line per error, given the rewards of the run; empty when the settings are usable."""
        errors = [f"par.{line}" for line in self.par.validate()]
        errors += [f"constraints.{line}" for line in self.constraints.validate(rewards)]
        if self.rule not in get_args(CombineRule):
            errors.append(f"rule must be one of {', '.join(get_args(CombineRule))}, got {self.rule!r}")
        if self.standardise not in get_args(Standardise):
            errors.append(f"standardise must be one of {', '.join(get_args(Standardise))}, got {self.standardise!r}")
        for key, named in (("std_floor", self.std_floor), ("gates", self.gates)):
            errors += [f"{key}.{n}: no reward has this name{nearest(n, rewards)}" for n in named if n not in rewards]
        errors += [f"std_floor.{n} must be at least 0, got {v}" for n, v in self.std_floor.items() if not v >= 0]
        for key, used in (("gates", self.gates), ("constraints", self.constraints.values)):
            if used and self.rule == "sum":
                errors.append(f"{key}: they act on each reward's own advantage; use combine.rule decoupled or rank")
        first = next(iter(self.gates), None)
        if first in rewards and not [n for n, entry in rewards.items() if entry.weight != 0 and n != first]:
            errors.append(f"gates: '{first}' is the only weighted reward, so there is none behind its gate")
        return errors

    def apart(self, weights: Mapping[str, float]) -> bool:
        """Whether rewards of these weights get advantages of their own; if not, their weighted sum gets one."""
        several = sum(weight != 0 for weight in weights.values()) > 1
        own = several or bool(self.gates) or bool(self.constraints.values)
        return self.rule == "rank" or (self.rule == "decoupled" and own)


def combined_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    scores: Mapping[str, Tensor],
    groups: Tensor,
    config: CombineConfig,
    advantage: AdvantageConfig,
    multipliers: Mapping[str, float],
    confidence: Confidence | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A = clip(sum_k w_k A_k / sum_k |w_k|, -clip, clip), gates and `batch_norm` between (arXiv 2601.05242).

    The parts are centred in their groups before gates, so no mean is taken off again: an image or a group without a
    signal keeps exactly 0, and a gate's cut is not given back.

    Args:
        rewards: name -> (N, S) step rewards of every weighted reward, NaN where missing: neutral, its part is 0.
        weights: name -> weight; those of 0 are not read.
        scores: name -> (N,) float32 raw final scores of at least the gates, NaN where missing.
        groups: (N,) integers, equal for the samples that are compared.
        config, advantage: `advantage` with group baseline; its `std` and `eps` act on each reward.
        multipliers: of the rewards under a constraint, on their parts and not in the sum of weights: the nearer all are
            to their values, the weaker the whole. `batch_norm` is left out then, as it would undo that.
        confidence: how far each sample is trusted, which acts on every part and last of all on their mean.

    Returns:
        advantages (N, S) float32.
        stats: `train/zero_spread_fraction` (share of the groups with two or more images scored whose advantages are
            all 0, mean over steps); of each reward `advantage/<name>_share` and `advantage/<name>_zero_spread`, of each
            gate `gate/<name>_open` (see docs/metrics.md).
    """
    used = {name: float(weight) for name, weight in weights.items() if weight != 0}
    total = sum(abs(weight) for weight in used.values())
    everyone = torch.ones(len(groups), dtype=torch.bool)  # a missing score is NaN in the step rewards
    parts, stats = {}, {}
    for name, weight in used.items():
        floor = config.std_floor.get(name, advantage.std_floor)
        own = dataclasses.replace(advantage, clip=math.inf, std_floor=floor)  # what is clipped is their mean
        factor = weight * multipliers.get(name, 1.0) / total
        # a reward that is trained downwards is doubtful where it is too low
        trusted = confidence.statistics(-1.0 if factor < 0 else 1.0) if confidence is not None else (None, None)
        normalised, found = group_advantages(rewards[name], everyone, groups, own, *trusted)
        if config.rule == "rank":
            normalised = ranks(rewards[name], groups, advantage.min_valid)
            if any(x is not None for x in trusted):
                normalised = weighted_centre(normalised, ~rewards[name].isnan(), groups, *trusted)
        parts[name] = normalised.double() * factor
        stats[f"advantage/{name}_zero_spread"] = found["zero_spread_fraction"]
    if config.gates:
        parts = gated(parts, scores, config.gates, groups)
        for name, threshold in config.gates.items():
            known = scores[name][~scores[name].isnan()]
            stats[f"gate/{name}_open"] = float((known > threshold).double().mean()) if len(known) else 1.0
    combined = torch.stack(list(parts.values())).sum(dim=0)
    square = combined.square().sum()
    for name, part in parts.items():
        stats[f"advantage/{name}_share"] = float((part * combined).sum() / square) if square > 0 else 0.0
    present = torch.stack([~rewards[name].isnan() for name in used]).any(dim=0)
    if config.batch_norm and not multipliers:
        spread = (combined.square().sum(0) / present.sum(0).clamp_min(1)).sqrt()
        combined = combined / spread.clamp_min(_LEAST_STD)
    stats["train/zero_spread_fraction"] = _flat_share(combined, present, groups)
    if confidence is not None:
        combined = confidence.applied(combined)
    return combined.clamp(-advantage.clip, advantage.clip).float(), stats


def base_units(run_dir: Path, names: list[str]) -> dict[str, tuple[float, float]]:
    """name -> mean and population std of the base model's held-out scores, from the evaluation that begins a run.

    Raises: UserError if there is none, or a reward's scores there do not differ.
    """
    path = run_dir / "eval" / "base.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    except OSError as problem:
        raise UserError(
            f"combine: no evaluation of the base model at {path}, which standardise, par and constraints need"
        ) from problem
    units = {}
    for name in names:
        present = torch.tensor([x for x in scores[name] if x is not None], dtype=torch.float64)
        if not len(present) or present.max() == present.min():
            raise UserError(
                f"combine: the base model's held-out scores of reward '{name}' do not differ, so they give standardise, "
                "par and constraints no unit; use none of them, or more eval.prompts"
            )
        # scores that differ by rounding alone must not be spread out to those of a real difference
        units[name] = float(present.mean()), max(float(present.std(correction=0)), STD_FLOOR)
    return units


def standardised(scores: Scores, units: Mapping[str, tuple[float, float]]) -> Scores:
    """(r - mean) / std of the rewards in `units`; the others, and what is missing, as they are."""
    values = {
        name: ((raw.double() - units[name][0]) / units[name][1]).float() if name in units else raw
        for name, raw in scores.values.items()
    }
    return Scores(values, scores.valid, scores.extras)


def any_valid(valid: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Where at least one reward of non-zero weight has a score; `valid`: name -> bool of one shape."""
    return torch.stack([valid[name] for name, weight in weights.items() if weight != 0]).any(dim=0)


def _flat_share(advantages: Tensor, present: Tensor, groups: Tensor) -> float:
    """Share of the groups with two or more images present whose advantages (N, S) are all 0, mean over the columns."""
    _, group = torch.unique(groups, return_inverse=True)
    zeros = torch.zeros(int(group.max()) + 1, advantages.shape[1])
    counted = zeros.index_add(0, group, present.float()) >= 2
    flat = zeros.index_add(0, group, (advantages != 0).float()) == 0
    return float((flat & counted).sum() / counted.sum().clamp_min(1))
