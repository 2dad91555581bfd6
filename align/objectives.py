"""Objectives: stored samples and advantages become a loss per element.

Five kinds. `clipped_ratio` scores stored stochastic steps again and pushes their likelihood ratio (Flow-GRPO, arXiv
2505.05470; DanceGRPO, 2505.07818); its KL forms are those of `samplers.kernels`. `forward_process` re-noises finished
images and matches velocities, no trajectory needed (DiffusionNFT, 2509.16117). `reward_difference` compares whole
trajectories of a prompt (PRDP, 2402.08714; in `align.reward_difference`). `reward_gradient` differentiates the reward
through the sampler (`align.backprop_loop`) and has settings of its own, `backprop` and `loss`; so does
`condition_consistency` (`align.control_loop`), which trains a ControlNet on real images. All functions are pure, work in float32
(float64 if given float64) and return losses of shape (B,) with detached diagnostics.

Notation: x_t = (1 - t) x_0 + t noise, t = 1 is pure noise, velocity target v = noise - x_0, mean(.) over all but the
batch dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from align.reward_difference import StepReduction

ObjectiveType = Literal[
    "clipped_ratio", "forward_process", "reward_difference", "reward_gradient", "condition_consistency"
]
KlForm = Literal["exact_mean", "flow_grpo_code", "velocity_mse"]
RatioRepair = Literal["off", "guard"]
LossSpace = Literal["x0_adaptive", "v"]
TimeSampling = Literal["grid", "stratified"]

_CLIPPED_RATIO_FIELDS = ("clip_range", "kl_beta", "kl_form", "ratio_repair")
_REWARD_DIFFERENCE_FIELDS = ("pair_beta", "step_clip", "reduce_steps")
# Keeps the adaptive weight finite when a branch fits its sample exactly (released code of arXiv 2509.16117).
_WEIGHT_FLOOR = 1e-5
# Separates the draws of training times from every other use of the same (seed, iteration, sample).
_TIMES_STREAM = 0x74696D65


@dataclass
class ObjectiveConfig:
    """What is minimised. Fields of the other type must stay at their defaults, so that none is silently ignored."""

    type: ObjectiveType = "clipped_ratio"
    """"clipped_ratio" (policy gradient on stored steps), "forward_process" (velocity matching on finished images),
    "reward_difference" (regression on pairs of trajectories), "reward_gradient" (a differentiable reward's gradient
    through the sampler; see `backprop` and `loss`) or "condition_consistency" (a ControlNet on real images, by how well its
    one-step images keep the condition; see `consistency`)."""

    clip_range: float = 1e-4
    """clipped_ratio: half width of the clip; scale it as 1 / latent size (flow_sde 1e-4, cps 1e-5; 2505.05470)."""
    kl_beta: float = 0.04
    """clipped_ratio: weight of the KL to the reference, 0 is off (GenEval and OCR .04, PickScore .01; 2505.05470)."""
    kl_form: KlForm = "flow_grpo_code"
    """clipped_ratio: "exact_mean", "flow_grpo_code" (goes with the published weights) or "velocity_mse"."""
    ratio_repair: RatioRepair = "off"
    """clipped_ratio: "off", or "guard" for the centred ratio of GRPO-Guard (arXiv 2510.22319)."""

    pair_beta: float = 3e-6
    """reward_difference: KL weight beta, in units of the reward (large prompt sets 3e-6, small ones 3e-5; 2402.08714)."""
    step_clip: float = 1e-4
    """reward_difference: half width of the stepwise clip; scale it as 1 / latent size (large prompt sets 1e-4, small
    ones with 10 epochs on the same images 1e-6; 2402.08714)."""
    reduce_steps: StepReduction = "mean"
    """reward_difference: "mean" over steps (the appendix of 2402.08714) or "sum" (its equations)."""

    beta: float = 1.0
    """forward_process: guidance of the implicit policies; beta adv_max is the KL temperature (1 or .1; 2509.16117)."""
    adv_max: float = 5.0
    """forward_process: advantage at which a sample counts as certainly good (code of 2509.16117)."""
    loss_space: LossSpace = "x0_adaptive"
    """forward_process: "x0_adaptive" (clean-image error over its own mean size, 2509.16117) or "v" (plain error)."""
    ref_coef: float = 0.01
    """forward_process: weight of mean (v - v_ref)^2; .01-.1 brakes drift, the 1e-4 of 2509.16117 does not."""
    times_per_sample: int = 4
    """forward_process: times trained per image, 0 for all in range but one (2509.16117 trains T - 1 of T)."""
    time_range: float = 0.9
    """forward_process: noisiest fraction of the grid times in use, (0, 1]; the cleanest can teach blur (2510.08425)."""
    time_sampling: TimeSampling = "grid"
    """forward_process: "grid" (random, no repeats, 2509.16117) or "stratified" (one time from each equal part)."""
    share_noise: bool = False
    """forward_process: one noise per (group, time) for all its images (2510.08425); lowers the push's variance."""
    old_decay_start: int = 0
    """forward_process: iteration from which the old policy lags (75 for OCR; 2509.16117)."""
    old_decay_slope: float = 0.001
    """forward_process: growth of the old policy's decay per iteration (.0075 for OCR; 2509.16117)."""
    old_decay_max: float = 0.5
    """forward_process: largest decay of the old policy, [0, 1); 0 copies the weights every iteration (2509.16117)."""

    @property
    def penalty(self) -> str | None:
        """The field that weighs the penalty towards the base, of the objectives that have one by sample."""
        return {"clipped_ratio": "kl_beta", "forward_process": "ref_coef"}.get(self.type)

    def validate(self, num_steps: int | None = None) -> list[str]:
        """Return one line per error; empty when the settings are usable.

        Args:
            num_steps: sampling steps T, to check the number of training times against; None skips that check.
        """
        errors = [
            f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}"
            for name, choices in (
                ("type", ObjectiveType),
                ("kl_form", KlForm),
                ("ratio_repair", RatioRepair),
                ("loss_space", LossSpace),
                ("time_sampling", TimeSampling),
                ("reduce_steps", StepReduction),
            )
            if getattr(self, name) not in get_args(choices)
        ]
        for name, legal, rule in (
            ("clip_range", self.clip_range > 0, "above 0"),
            ("kl_beta", self.kl_beta >= 0, "at least 0"),
            ("pair_beta", self.pair_beta > 0, "above 0"),
            ("step_clip", self.step_clip > 0, "above 0"),
            ("beta", self.beta > 0, "above 0"),
            ("adv_max", self.adv_max > 0, "above 0"),
            ("ref_coef", self.ref_coef >= 0, "at least 0"),
            ("times_per_sample", self.times_per_sample >= 0, "at least 0 (0 means all in range but one)"),
            ("time_range", 0 < self.time_range <= 1, "in (0, 1]"),
            ("old_decay_start", self.old_decay_start >= 0, "at least 0"),
            ("old_decay_slope", self.old_decay_slope >= 0, "at least 0"),
            ("old_decay_max", 0 <= self.old_decay_max < 1, "in [0, 1)"),
        ):
            if not (legal and math.isfinite(getattr(self, name))):
                errors.append(f"{name} must be {rule}, got {getattr(self, name)}")
        return errors + self._conflicts(num_steps)

    def _conflicts(self, num_steps: int | None) -> list[str]:
        """Settings that are legal one by one but cannot act together."""
        errors = []
        for item in fields(self) if self.type in get_args(ObjectiveType) else ():
            owner = (
                "clipped_ratio"
                if item.name in _CLIPPED_RATIO_FIELDS
                else "reward_difference"
                if item.name in _REWARD_DIFFERENCE_FIELDS
                else "forward_process"
            )
            if item.name != "type" and owner != self.type and getattr(self, item.name) != item.default:
                errors.append(f"{item.name} has no effect with type {self.type}: remove it or set type to {owner}")
        if self.type != "forward_process":
            return errors
        if self.old_decay_max > 0 and self.old_decay_slope == 0:
            errors.append("old_decay_slope 0 keeps the old policy's decay at 0: raise it, or set old_decay_max to 0")
        if num_steps is None or not 0 < self.time_range <= 1:
            return errors
        in_range = _times_in_range(num_steps, self.time_range)
        if self.times_per_sample > in_range:
            errors.append(
                f"times_per_sample {self.times_per_sample} is more than the {in_range} times that time_range "
                f"{self.time_range} leaves of {num_steps} steps: lower it or raise time_range"
            )
        return errors


def clipped_ratio_loss(
    log_prob: Tensor, log_prob_old: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A r, -A clip(r, 1 - c, 1 + c)) with r = exp(log_prob - log_prob_old) (arXiv 2505.05470).

    Args:
        log_prob: (B,) log-probs of the stored steps under the trained weights, mean over latent dims; or a repaired
            log-ratio (`guard_log_ratio`) with zeros as `log_prob_old`.
        log_prob_old: (B,) log-probs stored when the steps were sampled.
        advantages: (B,).
        clip_range: half width c > 0.

    Returns:
        loss (B,), and {"ratio": r, "clipped": 1 where the clip removes the gradient, else 0}, each (B,) detached.
    """
    advantages = advantages.detach()
    ratio = (log_prob - log_prob_old.detach()).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    moved = ratio.detach()
    clipped = ((advantages > 0) & (moved > 1 + clip_range)) | ((advantages < 0) & (moved < 1 - clip_range))
    return loss, {"ratio": moved, "clipped": clipped.to(moved.dtype)}


def guard_log_ratio(sample: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """Centred log-ratio mean(z (mean - mean_old)), z = (sample - mean_old) / std, of GRPO-Guard (arXiv 2510.22319).

    Equals std (log_prob - log_prob_old) + mean((mean - mean_old)^2) / (2 std) for Gaussian log-probs. It is zero on
    average over z even when the policy has moved, where the plain log-ratio sits below zero and is clipped unevenly.
    In this form no two large terms cancel.

    Args:
        sample: (B, ...) stored next states.
        mean: (B, ...) transition means of the trained weights.
        mean_old: (B, ...) transition means of the weights that sampled.
        std: (B,) true transition std, above 0.

    Returns:
        (B,) log-ratios; the gradient flows through `mean` only.
    """
    mean, mean_old = _full(mean), _full(mean_old).detach()
    noise = (_full(sample).detach() - mean_old) / _wide(std, mean)
    return _mean(noise * (mean - mean_old))


def forward_process_loss(
    v_theta: Tensor,
    v_old: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    v_ref: Tensor | None = None,
    pull: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """adv_max (r l+ + (1 - r) l-) / beta + ref_coef mean((v_theta - v_ref)^2) (DiffusionNFT, arXiv 2509.16117).

    Implicit policies v+- = v_old +- beta (v_theta - v_old), r from `optimality_probability`. With "v", l+- is
    mean((v+- - v)^2). With "x0_adaptive" it is mean(e^2) / w for e = x0_hat(v+-) - x_0 and w = max(mean|e|, 1e-5)
    held constant, each branch with its own w.

    Args:
        v_theta, v_old, v_ref: (B, ...) velocities of the trained, old and reference weights at x_t (`noised_state`),
            with the same conditioning and guidance. v_ref is needed if ref_coef > 0; otherwise it is only measured.
        x0: (B, ...) final latents as they were decoded for the reward.
        noise: (B, ...) fresh standard normal noise.
        t: (B,) times in (0, 1].
        advantages: (B,) group advantages.
        config: uses beta, adv_max, loss_space, ref_coef.
        pull: (B,) factors of the term of v_ref (`uncertainty.mode: gate_kl`, `combine.constraints`); None: 1.

    Returns:
        loss (B,), and detached (B,) diagnostics: `probability` r, `loss_plus`, `loss_minus`, `displacement`
        mean((v_theta - v_old)^2), `old_square` mean(v_old^2); with "x0_adaptive" also `weight_plus`, `weight_minus`;
        with v_ref also `ref_mse` and `norm_ratio` |v_theta| / |v_ref|.

    Raises:
        ValueError: if ref_coef > 0 and v_ref is missing.
    """
    if config.ref_coef > 0 and v_ref is None:
        raise ValueError("objective: ref_coef above 0 needs the reference velocity v_ref")
    v_theta, v_old = _full(v_theta), _full(v_old).detach()
    target = (_full(noise) - _full(x0)).detach()
    probability = optimality_probability(advantages, config.adv_max)
    step = config.beta * (v_theta - v_old)
    residual = v_old - target
    diagnostics = {
        "probability": probability,
        "displacement": _mean((v_theta.detach() - v_old).square()),
        "old_square": _mean(v_old.square()),
    }
    losses = []
    for name, error in (("plus", residual + step), ("minus", residual - step)):
        if config.loss_space == "x0_adaptive":
            # x0_hat(v+-) - x_0 is -t (v+- - v); formed this way nothing cancels at small t.
            error = _wide(t, error) * error
            weight = _mean(error.detach().abs()).clamp_min(_WEIGHT_FLOOR)
            diagnostics[f"weight_{name}"] = weight
            losses.append(_mean(error.square()) / weight)
        else:
            losses.append(_mean(error.square()))
        diagnostics[f"loss_{name}"] = losses[-1]
    loss = config.adv_max * (probability * losses[0] + (1 - probability) * losses[1]) / config.beta
    if v_ref is not None:
        v_ref = _full(v_ref).detach()
        ref_mse = _mean((v_theta - v_ref).square())
        diagnostics["ref_mse"] = ref_mse
        diagnostics["norm_ratio"] = (_mean(v_theta.detach().square()) / _mean(v_ref.square())).sqrt()
        loss = loss + config.ref_coef * (ref_mse if pull is None else pull * ref_mse)
    return loss, {name: value.detach() for name, value in diagnostics.items()}


def optimality_probability(advantages: Tensor, adv_max: float) -> Tensor:
    """r = clip(A / adv_max / 2 + 1/2, 0, 1), how surely each sample (B,) is a good one (code of arXiv 2509.16117)."""
    return (advantages.detach() / adv_max / 2 + 0.5).clamp(0, 1)


def noised_state(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise for latents (B, ...) and times t (B,) in [0, 1]."""
    x0, noise = _full(x0), _full(noise)
    t = _wide(t, x0)
    return (1 - t) * x0 + t * noise


def old_policy_decay(n: int, n0: int, slope: float, maximum: float) -> float:
    """Decay eta of the old policy, old <- eta old + (1 - eta) theta after iteration n: 0 before n0, then a ramp
    min((n - n0) slope, maximum) (arXiv 2509.16117; the paper counts iterations, its code optimiser updates)."""
    return 0.0 if n < n0 else min((n - n0) * slope, maximum)


def draw_times(
    grid: Tensor,
    samples: Sequence[int],
    seed: int,
    iteration: int,
    times_per_sample: int,
    time_range: float,
    sampling: TimeSampling = "grid",
) -> Tensor:
    """Draw the training times of each image as indices into the sampler's grid (arXiv 2509.16117).

    The draw of a sample depends on (seed, iteration, sample) only, so it is the same for any split over processes.

    Args:
        grid: (T + 1,) times from noise to 0; the final 0 is never drawn.
        samples: global indices (>= 0) of the images within the iteration.
        seed: run seed, >= 0.
        iteration: >= 0.
        times_per_sample: number m of times per image, or 0 for one less than there are in range.
        time_range: fraction in (0, 1] of the T times to draw from, the noisiest first.
        sampling: "grid", a random permutation cut after m times, so no time repeats within a sample; or
            "stratified", one time from each of m equal parts of the range, in sampling order.

    Returns:
        (len(samples), m) int64 indices in 0..T-1; `grid[indices]` are the times.

    Raises:
        ValueError: if m exceeds the times in range, or for an unknown sampling.
    """
    in_range = _times_in_range(grid.numel() - 1, time_range)
    m = times_per_sample or max(in_range - 1, 1)
    if m > in_range:
        raise ValueError(
            f"objective: times_per_sample {m} exceeds the {in_range} times in range; lower it or raise time_range"
        )
    if sampling not in get_args(TimeSampling):
        choices = ", ".join(get_args(TimeSampling))
        raise ValueError(f"objective: time_sampling must be one of {choices}, got {sampling!r}")
    rows = np.empty((len(samples), m), dtype=np.int64)
    for row, sample in enumerate(samples):
        bits = np.random.Philox(np.random.SeedSequence((seed, iteration, sample, _TIMES_STREAM)))
        if sampling == "grid":
            # Sorting raw bits, not Generator.permutation, whose stream may change between numpy versions.
            rows[row] = np.argsort(bits.random_raw(in_range))[:m]
        else:
            edges = np.arange(m + 1) * in_range // m
            uniform = bits.random_raw(m) / 2.0**64
            rows[row] = np.minimum(edges[:-1] + uniform * np.diff(edges), edges[1:] - 1).astype(np.int64)
    return torch.from_numpy(rows)


def _times_in_range(num_steps: int, time_range: float) -> int:
    # The small term keeps products such as 100 * 0.29 = 28.999999999999996 from losing a time.
    return max(1, math.floor(num_steps * time_range + 1e-9))


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _wide(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _mean(x: Tensor) -> Tensor:
    # Summed in float64, so that the result does not depend on how the batch was cut.
    return x.flatten(1).mean(1, dtype=torch.float64).to(x.dtype)
