"""Several rewards as one that knows how sure it is: mean, worst case, or mean less variance (arXiv 2310.02743)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, nearest
from rewards.registry import RewardConfig, build_reward
from rewards.uncertainty import STD_FLOOR, EnsembleObjective, Variance, aggregate, spread

_MEMBER_KEYS = ("type", "args", "max_batch")


class EnsembleReward(Reward):
    """A committee of rewards: its score is what `objective` makes of theirs, its uncertainty their population std.

    Members of other scales cannot be compared, so each is brought to (R - mean) / std of its scores on the base model's
    images first. These numbers come from the base evaluation that begins a run and stay fixed; outside a run, `reference`
    names the file that a run wrote. Where one member has no score, the committee has none: what is left of it would not
    compare with the whole. Components are the members' standardised scores. Gradients flow if they do through all members.
    """

    name = "ensemble"

    def __init__(
        self,
        members: Mapping[str, Mapping[str, Any]],
        objective: EnsembleObjective = "uwo",
        coefficient: float | None = None,
        variance: Variance | None = None,
        standardise: str = "reference",
        reference: str | None = None,
    ) -> None:
        """members: name -> {type, args, max_batch}, at least one, as in `rewards` of a configuration.

        objective: "mean", "wco" (the lowest member) or "uwo" (mean - coefficient x variance). coefficient: of uwo, by default
        .1; .5 to choose among images (2310.02743). variance: of uwo, "population" (by k, the default) or "unbiased" (by k - 1).
        standardise: "reference", or "none" for members that share a unit. reference: the uncertainty.json of a run.
        """
        for key, given in (("coefficient", coefficient), ("variance", variance)):
            if given is not None and objective in ("mean", "wco"):
                raise RewardError(f"{key} has no effect with objective {objective}: leave it out")
        coefficient = 0.1 if coefficient is None else coefficient
        variance = "population" if variance is None else variance
        self.objective, self.coefficient, self.variance = objective, coefficient, variance
        for key, value, options in (
            ("objective", objective, get_args(EnsembleObjective)),
            ("variance", variance, get_args(Variance)),
            ("standardise", standardise, ("reference", "none")),
        ):
            if value not in options:
                raise RewardError(f"{key} must be one of {', '.join(options)}, got {value!r}")
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not coefficient >= 0:
            raise RewardError(f"coefficient must be at least 0, got {coefficient!r}")
        if not isinstance(members, Mapping) or not members:
            raise RewardError("members must map names to rewards, as in members: {a: {type: clip, args: {...}}}")
        if standardise == "none" and reference is not None:
            raise RewardError("reference has no effect with standardise none: leave it out")
        self.members = {str(name): _member(str(name), entry) for name, entry in members.items()}
        rewards = list(self.members.values())
        self.kind = "groupwise" if any(reward.kind == "groupwise" for reward in rewards) else "pointwise"
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.max_batch = max(reward.max_batch for reward in rewards)
        self._describe()
        self._standardised = standardise == "reference"
        self._file = reference
        self._units: dict[str, tuple[float, float]] | None = None

    def _describe(self) -> None:
        self.uses_prompt = any(reward.uses_prompt for reward in self.members.values())
        self.deterministic = all(reward.deterministic for reward in self.members.values())

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set up the members. Raises RewardError if one cannot be, or `reference` does not hold all of them."""
        for name, reward in self.members.items():
            reward.name = f"{self.name}/{name}"  # so that its errors name it
            reward.setup(device, dtype)
        self._describe()
        if self._file is not None:
            self.use_reference(_read(Path(self._file), self.name, self.members))

    def enable_checkpointing(self) -> None:
        for reward in self.members.values():
            reward.enable_checkpointing()

    @property
    def needs_reference(self) -> bool:
        return self._standardised and self._units is None and self._file is None

    def reference_scores(self, batch: RewardBatch) -> dict[str, Tensor]:
        """Raw scores (B,) of every member, detached."""
        with torch.no_grad():
            return {name: checked_score(reward, batch).scores for name, reward in self.members.items()}

    def use_reference(self, statistics: Mapping[str, Mapping[str, float]]) -> None:
        """Take mean and std of every member. Raises RewardError if one is missing or its scores did not differ."""
        missing = [name for name in self.members if name not in statistics]
        if missing:
            raise RewardError(
                f"reward '{self.name}': no score of the base model's images by member {', '.join(missing)}, so there is no "
                "unit; leave it out, or use other prompts.eval"
            )
        for name in self.members:
            if not statistics[name]["std"] > STD_FLOOR:
                raise RewardError(
                    f"reward '{self.name}': the base model's scores of member '{name}' do not differ, so they give no "
                    "unit; leave it out, use more eval.prompts, or set standardise none"
                )
        self._units = {name: (statistics[name]["mean"], statistics[name]["std"]) for name in self.members}

    def score(self, batch: RewardBatch) -> RewardOutput:
        if self._standardised and self._units is None:
            raise RewardError(
                f"reward '{self.name}' has no reference statistics: a run measures them in its base evaluation; elsewhere "
                "name a run's uncertainty.json in args.reference, or set args.standardise to none"
            )
        scores = torch.stack([self._standard(name, batch) for name in self.members])
        total = aggregate(scores, self.objective, self.coefficient, self.variance)
        known = ~total.detach().isnan()  # a member's NaN makes the mean and the lowest NaN
        # nothing is known of how sure it is where it has no score, and an uncertainty must be a number
        return RewardOutput(
            total,
            components=dict(zip(self.members, scores.detach(), strict=True)),
            uncertainty=torch.where(known, spread(torch.where(known, scores, 0.0)), torch.nan),
        )

    def _standard(self, name: str, batch: RewardBatch) -> Tensor:
        """Standardised scores (B,) float32 of one member, on the device of the images."""
        scores = checked_score(self.members[name], batch).scores
        if self._units is None:
            return scores
        mean, std = self._units[name]
        return (scores - mean) / std


def _member(name: str, entry: Mapping[str, Any]) -> Reward:
    if not isinstance(entry, Mapping):
        raise RewardError(f"members.{name}: expected {{type, args}}, got {entry!r}")
    unknown = [key for key in entry if key not in _MEMBER_KEYS]
    if unknown:
        hint = nearest(str(unknown[0]), _MEMBER_KEYS) or f"; known: {', '.join(_MEMBER_KEYS)}"
        raise RewardError(f"members.{name}: unknown key '{unknown[0]}'{hint}")
    reward = build_reward(f"members.{name}", RewardConfig(**entry))
    if reward.needs_reference:
        raise RewardError(f"members.{name}: an ensemble cannot be a member of an ensemble")
    return reward


def _read(path: Path, name: str, members: Mapping[str, Reward]) -> Mapping[str, Mapping[str, float]]:
    """Statistics in a run's file of the reward of this name, or of one that has all members. Raises RewardError."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["rewards"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RewardError(f"reward '{name}': reference {path} is not the uncertainty.json of a run") from error
    fitting: list[Mapping[str, Mapping[str, float]]] = [s for s in stored.values() if all("std" in s.get(m, {}) for m in members)]
    if not fitting:
        raise RewardError(f"reward '{name}': {path} has no reward with the members {', '.join(members)}")
    found: Mapping[str, Mapping[str, float]] = stored[name] if stored.get(name) in fitting else fitting[0]
    return found
