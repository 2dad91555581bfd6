"""Which steps of a sampling chain carry gradient, drawn for every sample: the settings and the laws of the methods.

T steps on a grid of T + 1 times. A sample's chain runs from step `first` to its `last`; where that is not the grid's last
step, it jumps from there to the grid's end by the one-step estimate of the clean image. K of its steps are *active*: their
network call is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from samplers.noise import keyed_generator

GRADIENT_STREAM = 0x67726164


@dataclass
class BackpropConfig:
    """How the gradient of a reward runs back through the sampler (objective.type reward_gradient)."""

    steps: Literal["last", "spread", "late_biased"] = "last"
    """Active steps: the last K (DRaFT-K, 2309.17400; AlignProp, 2310.03739), K at an equal distance from a random start
    (DRTune, 2405.00760), or K drawn without replacement, later ones more likely (FlowBP-Sparse, 2606.11075)."""
    truncation: Literal["fixed", "gaussian", "uniform", "per_step_bernoulli"] = "fixed"
    """K of `last`: fixed at k, or random for each image (gaussian: the released AlignProp; uniform: on 1..T-1); or each
    step by itself, step i with probability (i + 1) / (T + 1) (per_step_bernoulli: AlignProp as it was in trl)."""
    k: int = 1
    """Active steps of truncation fixed, and of spread and late_biased."""
    truncation_mean: float = 0.84
    """gaussian: mean of the number of steps cut off, as a fraction of T (42 of 50 in AlignProp)."""
    truncation_std: float = 0.1
    """gaussian: its standard deviation, as a fraction of T (5 of 50)."""
    late_bias: float = 1.0
    """late_biased: step i is drawn with weight (i + 1)^late_bias (1 for SD3.5, 2 for FLUX.1; 2606.11075)."""
    grad_rescale: float = 0.0
    """Share rho of the step length left out that the active steps make up for: their gradient is multiplied by
    1 + rho (sum |dt| / sum over active |dt| - 1) (0.5 for SD3.5, 1 for FLUX.1; 2606.11075)."""
    cut_ratio: float = 0.0
    """r: a chain stops at a step drawn from the last round(r T) and jumps to the clean image from there (ReFL: the last 10 of
    40, 2304.05977; DRTune 0.4). 0: chains are never cut."""
    jacobian: bool = True
    """Whether gradient also runs through the network's input, from an active step to those before it (false: DRTune)."""
    guidance_gradient: Literal["both", "cond_only", "off"] = "both"
    """With guidance g, what an active step differentiates: both predictions; the conditional one, times g, at half the cost;
    or the conditional one as if there were no guidance."""
    lv_draws: int = 0
    """Further copies of each final image, noised to the last step and denoised again, whose gradients are averaged with its
    own (DRaFT-LV: 2, 2309.17400)."""
    partial_tau: float | None = None
    """Start from a real image of the prompt, noised, and run only this fraction of the steps (InstructVideo: 0.6,
    2312.12490). The prompt file then names an image a prompt. null: start from noise."""
    adjoint_clip: float = 0.0
    """Largest growth of the gradient's norm from the image back through the steps, per image; 0: no limit."""
    velocity_penalty: float = 0.0
    """Weight w of w mean((v - v_ref)^2) at the active steps, with v_ref of the base model: holds the policy near it. v is
    the velocity, or with guidance_gradient cond_only and off the conditional prediction alone. Costs one more forward
    for each active step, and one more backward where `jacobian` joins several."""

    def first_step(self, num_steps: int) -> int:
        """Step at which chains begin: 0, or with `partial_tau` the one that leaves round(tau T) steps to run."""
        return 0 if self.partial_tau is None else num_steps - round(self.partial_tau * num_steps)

    def stop_window(self, num_steps: int) -> int:
        """Number of last steps that a chain may stop at; at least 1, the last."""
        return max(1, round(self.cut_ratio * num_steps))

    def most_active(self, num_steps: int) -> int:
        """Largest K that can be drawn."""
        length = num_steps - self.first_step(num_steps)
        if self.steps != "last" or self.truncation == "fixed":
            return min(self.k, length)
        return length if self.truncation == "per_step_bernoulli" else length - 1

    def validate(self, num_steps: int) -> list[str]:
        """Every error, one line each, leading with the field."""
        errors = []
        for name, legal, rule in (
            ("k", self.k >= 1, "at least 1"),
            ("truncation_mean", 0 < self.truncation_mean < 1, "in (0, 1)"),
            ("truncation_std", 0 < self.truncation_std <= 1, "in (0, 1]"),
            ("late_bias", self.late_bias >= 0, "at least 0"),
            ("grad_rescale", 0 <= self.grad_rescale <= 1, "in [0, 1]"),
            ("cut_ratio", 0 <= self.cut_ratio < 1, "in [0, 1)"),
            ("lv_draws", self.lv_draws >= 0, "at least 0"),
            ("partial_tau", self.partial_tau is None or 0 < self.partial_tau <= 1, "in (0, 1], or null"),
            ("adjoint_clip", self.adjoint_clip >= 0, "at least 0"),
            ("velocity_penalty", self.velocity_penalty >= 0, "at least 0"),
        ):
            if not legal:
                errors.append(f"{name}: must be {rule}, got {getattr(self, name)}")
        return errors or self._conflicts(num_steps)

    def _conflicts(self, num_steps: int) -> list[str]:
        errors = []
        length = num_steps - self.first_step(num_steps)
        if length < 1:
            return [f"partial_tau: {self.partial_tau} of {num_steps} steps leaves none to run; use a larger one"]
        shortest = length - self.stop_window(num_steps) + 1
        if shortest < 1:
            return [
                f"cut_ratio: {self.cut_ratio} of {num_steps} steps is more than the {length} that run"
            ]
        if (self.steps != "last" or self.truncation == "fixed") and self.k > shortest:
            errors.append(f"k: {self.k} active steps, but a chain may have only {shortest}; use fewer")
        if self.steps == "last" and self.truncation in ("gaussian", "uniform") and length < 2:
            errors.append(f"truncation: {self.truncation} draws K from 1 to T - 1, and T is {length}; use fixed")
        if self.truncation == "gaussian":
            rare = [n for n in range(max(2, shortest), length + 1) if self._legal_share(n) < 0.01]
            if rare:  # the draws would go on for ever
                errors.append(
                    f"truncation_mean: {self.truncation_mean} +- {self.truncation_std} of {rare[0]} steps is hardly ever 1 to "
                    f"{rare[0] - 1} steps to cut off; use a larger truncation_std, or the mean 0.84"
                )
        if self.steps != "last" and self.truncation != "fixed":
            errors.append(f"truncation: {self.truncation} belongs to steps last, and steps is {self.steps}; use fixed")
        if self.lv_draws and (
            self.cut_ratio or self.steps != "last" or self.truncation != "fixed" or self.k != 1
        ):
            errors.append("lv_draws: copies of the last step go with k 1, steps last, truncation fixed, no early stop")
        return errors

    def _legal_share(self, length: int) -> float:
        """Share of the gaussian's draws that leave a chain of `length` steps 1 to length - 1 of them."""
        law = NormalDist(self.truncation_mean * length, self.truncation_std * length)
        return law.cdf(length) - law.cdf(1)


@dataclass(frozen=True)
class GradientPlan:
    """Chains of B samples; T steps."""

    first: int
    """Step at which all begin."""
    last: Tensor
    """(B,) int64: the step that ends at the grid's end, T - 1 or an earlier one that jumps there."""
    active: Tensor
    """(B, T) bool: steps whose network call is differentiated."""
    weight: Tensor
    """(B,) float32: factor of the gradient of a sample's active steps."""

    def __len__(self) -> int:
        return len(self.last)

    def take(self, rows: Tensor) -> GradientPlan:
        """The samples at `rows` alone."""
        return GradientPlan(self.first, self.last[rows], self.active[rows], self.weight[rows])


def draw_plan(config: BackpropConfig, grid: Tensor, samples: Sequence[int], seed: int, iteration: int) -> GradientPlan:
    """Chains of `samples` (global indices) on `grid` (T+1,): a function of (seed, iteration, sample) only."""
    num_steps = len(grid) - 1
    first = config.first_step(num_steps)
    last, active = [], torch.zeros(len(samples), num_steps, dtype=torch.bool)
    for row, sample in enumerate(samples):
        rng = keyed_generator(seed=seed, iteration=iteration, sample=sample, stream=GRADIENT_STREAM)
        stop = num_steps - 1 - int(rng.integers(config.stop_window(num_steps)))
        active[row, [first + i for i in draw_active(config, stop - first + 1, rng)]] = True
        last.append(stop)
    ends = torch.tensor(last, dtype=torch.int64)
    return GradientPlan(first, ends, active, gradient_weights(grid, first, ends, active, config.grad_rescale))


def last_step_plan(count: int, num_steps: int) -> GradientPlan:
    """Chains of the last step alone, which is active: the copies of DRaFT-LV (arXiv 2309.17400)."""
    active = torch.zeros(count, num_steps, dtype=torch.bool)
    active[:, -1] = True
    return GradientPlan(num_steps - 1, torch.full((count,), num_steps - 1), active, torch.ones(count))


def draw_active(config: BackpropConfig, length: int, rng: np.random.Generator) -> list[int]:
    """Active steps of a chain of `length` steps, rising, counted from its beginning."""
    if config.steps == "spread":
        stride = max(1, length // config.k)
        start = int(rng.integers(length - (config.k - 1) * stride))
        return [start + n * stride for n in range(config.k)]
    if config.steps == "late_biased":
        weights = np.arange(1, length + 1, dtype=np.float64) ** config.late_bias
        return sorted(int(i) for i in rng.choice(length, config.k, replace=False, p=weights / weights.sum()))
    if config.truncation == "per_step_bernoulli":
        kept = rng.integers(0, length + 1, size=length) <= np.arange(length)
        return [int(i) for i in np.flatnonzero(kept)]
    return list(range(length - draw_length(config, length, rng), length))


def draw_length(config: BackpropConfig, length: int, rng: np.random.Generator) -> int:
    """K of steps `last` for a chain of `length` steps.

    gaussian and uniform draw the number of steps that are cut off, b = int(Normal(mean T, std T)) or uniform on 0..T-1,
    again until 1 <= b <= T - 1, and K = T - b (released code of arXiv 2310.03739).
    """
    if config.truncation == "fixed" or length == 1:
        return min(config.k, length)
    while True:
        if config.truncation == "uniform":
            cut = int(rng.integers(length))
        else:
            cut = int(rng.normal(config.truncation_mean * length, config.truncation_std * length))
        if 1 <= cut <= length - 1:
            return length - cut


def gradient_weights(grid: Tensor, first: int, last: Tensor, active: Tensor, rescale: float) -> Tensor:
    """(B,) float32 `g = 1 + rescale (sum |dt| / sum over active |dt| - 1)` (arXiv 2606.11075); 1 without active steps.

    grid (T+1,), last (B,), active (B, T). The jump of a chain that is cut counts with its own length.
    """
    times = grid.double().cpu()
    steps = (times[:-1] - times[1:]).expand(len(last), -1).clone()
    steps.scatter_(1, last[:, None], (times[last] - times[-1])[:, None])
    kept = (steps * active).sum(dim=1)
    whole = times[first] - times[-1]
    return torch.where(kept > 0, 1 + rescale * (whole / kept.clamp_min(1e-12) - 1), 1.0).float()
