"""How far each sample's reward is trusted, and what follows: weights on advantages, or a KL penalty where it is doubtful.

    U~  = clip((U - q50) / (q90 - q50), 0, u_max)     q of the base model's images; several sources: the largest
    w   = max(exp(-kappa U~), w_min)                  Ctrl-U's weight (arXiv 2410.11236), of a whole image; no gradient
    x_i = r_i - eta std_group(r) (U~_i - mean U~)     the counterpart of Ctrl-U's penalty on the uncertainty
    A_i = (x_i - sum w x / sum w) / std_w             so that sum w A is 0 in every group
    A_i <- clip(A_i w_i / mean w, -clip, clip)

The weight comes after the last normalisation, which would cancel a common factor. All of this is ours: no published work
weights the advantages of an image model this way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from align.schema import nearest
from rewards.registry import RewardConfig
from rewards.uncertainty import normalised, trust

UncertaintyMode = Literal["off", "weight", "gate_kl"]
Source = Literal["native", "rank_disagreement"]
Renormalise = Literal["global", "group", "none"]
WARM_UP = 4
"""Iterations whose uncertainties give the quantiles of a source that the base evaluation cannot measure."""
PAST = 20
"""Iterations that the gated share is compared with (arXiv 2512.24138)."""


@dataclass
class UncertaintyConfig:
    """How far rewards are trusted. The pessimism of an ensemble is no mode: it is the `objective` of that reward."""

    mode: UncertaintyMode = "off"
    """weight: doubtful images count less. gate_kl: only the most doubtful images feel the penalty towards the base
    (GARDO, 2512.24138), `objective.kl_beta` of clipped_ratio and `objective.ref_coef` of forward_process."""
    sources: list[Source] = field(default_factory=lambda: ["native"])
    """native: what a reward says itself, as an ensemble does. rank_disagreement: how much better than by `auxiliaries` an
    image ranks in its group. Of several, the largest after each is normalised."""
    native_of: list[str] = field(default_factory=list)
    """native: names of rewards whose uncertainty counts, of any weight; empty: all of weight other than 0 that have one."""
    auxiliaries: list[str] = field(default_factory=list)
    """rank_disagreement: names of rewards of weight 0."""
    kappa: float = 1.0
    """weight: how fast the weight falls with the uncertainty (Ctrl-U: 1)."""
    w_min: float = 0.1
    """weight: least weight, in (0, 1]."""
    eta: float = 0.1
    """weight: how many standard deviations of its group a reward is lowered for each unit of uncertainty, lest doubtful
    images be of no consequence."""
    u_max: float = 5.0
    """weight: largest normalised uncertainty."""
    renormalise: Renormalise = "global"
    """weight: over which images the mean weight is made 1: all of the iteration, each group, or none. With "group" a group
    that is doubtful as a whole keeps its full strength."""
    weighted_baseline: bool = True
    """weight: the weights also enter mean and std of the group, so that they do not push all its images one way."""
    positive_only: bool = False
    """weight: only advantages above 0 are weighted, as hacking is over-estimation; by the weights themselves, without the
    weighted baseline, so that they praise nothing more."""
    shuffled: bool = False
    """weight: deal the uncertainties of an iteration to its images at random: the control that any effect of knowing which
    images are doubtful must beat."""
    per_step: bool = False
    """weight, with a rule of credit that gives steps their own rewards: a step also counts by the uncertainty of the two
    completions around it, mean 1 over the steps of an image (ours). Costs nothing, they are scored already."""
    gate_fraction: float = 0.1
    """gate_kl: first share of the images that is gated; it then follows the uncertainty."""
    gate_min: float = 0.02
    """gate_kl: least share."""
    gate_max: float = 0.2
    """gate_kl: largest share."""
    detach_weight: bool = True
    """weight, with reward_gradient: no gradient through the weight, only through the penalty. false: as Ctrl-U's code."""

    def validate(self, rewards: Mapping[str, RewardConfig]) -> list[str]:
        """Return one line per error, given the rewards of the run; empty when the settings are usable."""
        if self.mode == "off":
            return []
        errors = [] if self.sources else ["sources: name at least one, native or rank_disagreement"]
        for key in ("native_of", "auxiliaries"):
            names = getattr(self, key)
            errors += [f"{key}: no reward '{n}'{nearest(n, rewards)}" for n in names if n not in rewards]
        if "rank_disagreement" in self.sources:
            if not self.auxiliaries:
                errors.append(
                    "auxiliaries: rank_disagreement compares with other rewards; name one of weight 0 or more"
                )
            for name in self.auxiliaries:
                if name in rewards and rewards[name].weight != 0:
                    errors.append(
                        f"auxiliaries: '{name}' is trained, so it does not judge the others; give it weight 0"
                    )
        for key, legal, rule in (
            ("kappa", self.kappa >= 0, "at least 0"),
            ("w_min", 0 < self.w_min <= 1, "in (0, 1]"),
            ("eta", self.eta >= 0, "at least 0"),
            ("u_max", self.u_max > 0, "above 0"),
            ("gate_min", 0 < self.gate_min <= self.gate_max <= 1, "above 0 and at most gate_max, and that at most 1"),
            ("gate_fraction", self.gate_min <= self.gate_fraction <= self.gate_max, "between gate_min and gate_max"),
        ):
            if not (legal and math.isfinite(getattr(self, key))):
                errors.append(f"{key} must be {rule}, got {getattr(self, key)}")
        return errors


@dataclass
class Confidence:
    """How far each of N samples is trusted (mode weight), equal on every process. (N,) float64, without gradient."""

    weights: Tensor
    """In [w_min, 1]."""
    baseline: Tensor | None
    """Weights of the group's mean and std; None: all count equally."""
    doubt: Tensor | None
    """Standard deviations of its group by which a reward is lowered; None: 0."""
    factor: Tensor
    """Weights over their mean; with `positive_only` the weights."""
    positive_only: bool = False

    def statistics(self, sign: float = 1.0) -> tuple[Tensor | None, Tensor | None]:
        """`weights` and `doubt` of `align.advantages.group_advantages`; sign: -1 of a reward that is trained downwards."""
        return self.baseline, None if self.doubt is None else sign * self.doubt

    def applied(self, advantages: Tensor) -> Tensor:
        """Advantages (N, S) float64 times the weights; not yet clipped."""
        factor = self.factor.unsqueeze(1)
        return advantages * torch.where(advantages > 0, factor, 1.0) if self.positive_only else advantages * factor


def confidence(uncertainty: Tensor, known: Tensor, groups: Tensor, config: UncertaintyConfig) -> Confidence:
    """Weights of samples with a normalised uncertainty (N,), see the equations above.

    known: (N,) bool, the samples with a reward, over which the mean weight is taken; groups: (N,) integers.
    """
    doubtful = uncertainty.detach().double()
    weights = trust(doubtful, config.kappa, config.w_min)
    mean = torch.ones_like(weights)
    if config.renormalise != "none" and not config.positive_only:
        scope = groups if config.renormalise == "group" else torch.zeros_like(groups)
        _, index = torch.unique(scope, return_inverse=True)
        zeros = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.float64)
        count = zeros.index_add(0, index, known.double())
        total = zeros.index_add(0, index, weights * known)
        mean = torch.where(count > 0, total / count.clamp_min(1), 1.0)[index]
    # equal weights are none, and are not to change the last bits of a mean
    equal = len(weights) == 0 or bool((weights == weights[0]).all())
    return Confidence(
        weights,
        weights if config.weighted_baseline and not config.positive_only and not equal else None,
        config.eta * doubtful if config.eta > 0 else None,
        weights / mean,
        config.positive_only,
    )


@dataclass(frozen=True)
class DoubtfulLoss:
    """loss_i w_i + eta s U~_i: a differentiable reward's loss where the reward is in doubt (Ctrl-U, arXiv 2410.11236).

    The penalty keeps the network from making images doubtful, as that alone would lower the weighted loss. It is in units
    of s, the std of the base model's scores (ours), and has a gradient if the uncertainty has.
    """

    config: UncertaintyConfig
    q50: float
    q90: float
    unit: float

    def level(self, uncertainty: Tensor) -> Tensor:
        """Normalised uncertainty U~ (B,)."""
        return normalised(uncertainty, self.q50, self.q90, self.config.u_max)

    def __call__(self, losses: Tensor, uncertainty: Tensor, sign: float = 1.0) -> Tensor:
        """Losses (B,) of the uncertainties (B,); sign: -1 if they are then multiplied by something negative."""
        level = self.level(uncertainty)
        weights = trust(level, self.config.kappa, self.config.w_min)
        if self.config.detach_weight:
            weights = weights.detach()
        return losses * weights + sign * self.config.eta * self.unit * level


def effective_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2: how many equally weighted samples these weights (N,) are worth."""
    return float(weights.sum().square() / weights.square().sum())


@dataclass
class TrustState:
    """What is fixed at the base model or follows a run, equal on every process; kept in its checkpoints."""

    rewards: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Reward -> what `Reward.use_reference` was given."""
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    """Source -> median and 90 % quantile of its uncertainty."""
    units: dict[str, float] = field(default_factory=dict)
    """Reward with an uncertainty -> std of the base model's scores."""
    pools: dict[str, list[list[float]]] = field(default_factory=dict)
    """Source -> its uncertainties in the iterations so far, while these give the quantiles."""
    gate_fraction: float | None = None
    """gate_kl: share to gate next; None before the first iteration."""
    levels: dict[str, float] = field(default_factory=dict)
    """Reward with an uncertainty -> mean of it over the base model's images."""
    gate_past: list[float] = field(default_factory=list)
    """gate_kl: mean positive uncertainty of the last iterations."""

    def restored(self, stored: Mapping[str, Any]) -> None:
        """Take over what a checkpoint or a run's uncertainty.json holds."""
        for name in vars(self):
            if name in stored:
                setattr(self, name, stored[name])
