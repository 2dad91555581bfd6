"""The losses of condition consistency: ControlNet++ (arXiv 2404.07987) and Ctrl-U (arXiv 2410.11236).

A network D reads the condition back from the clean image that one denoising step predicts, and the loss between what it
reads and what was asked trains the ControlNet. Ctrl-U predicts twice, from inputs that differ by one timestep, and trusts
D less where its two readings disagree. All functions are pure and work in float32.

Notation: o_1, o_2 (B, C, H, W) are D's raw outputs for the primary and the auxiliary prediction; U (B, H, W) >= 0 is
their disagreement. "probabilistic" outputs are logits of classes, "continuous" ones are maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from align.models.base import Clamp
from samplers.vp import flow_time

OutputKind = Literal["probabilistic", "continuous"]
IGNORE = 255
"""Label of pixels that the loss leaves out."""
# Keeps a mean over nothing at exactly zero (released code of both papers).
_COUNT_FLOOR = 1e-10
# beta_start, beta_end and length of the schedule that the papers' timesteps refer to, that of Stable Diffusion 1.5
_BETAS = (0.00085, 0.012, 1000)


@dataclass
class CtrlUConfig:
    """How two predictions of one image are used. Defaults are those of the released code of arXiv 2410.11236."""

    mode: Literal["off", "uncertainty", "average"] = "uncertainty"
    """"uncertainty": weight and penalise by the disagreement of two predictions (Ctrl-U). "average": the mean of their two
    losses, unweighted: the same cost without uncertainty. "off": one prediction (ControlNet++)."""
    add_timestep: int = 1
    """Timesteps from the first to the noisier second prediction; 3 controls slightly better at a worse FID (2410.11236)."""
    share_noise: bool = True
    """Both predictions see the same noise (released code); false: each its own."""
    u_scale: float = 0.1
    """Scale u of the disagreement (1.0 for ADE20K)."""
    eta: float | None = None
    """Weight of the mean disagreement in the loss; null: 1 where u is inside the exponent, else u."""
    scale_inside_exp: bool | None = None
    """Whether u is part of U, so of exp(-U); null: for probabilistic outputs yes, for continuous ones no."""
    kl_direction: Literal["aux_to_primary", "primary_to_aux"] = "aux_to_primary"
    """KL(p_2 || p_1) of probabilistic outputs, or the other way round."""
    detach_weight: bool = False
    """Let no gradient through exp(-U), so that nothing is gained by disagreeing."""
    symmetric: bool = False
    """Mean of the losses of both predictions, each weighted by its own disagreement; false: the primary's only."""

    @property
    def passes(self) -> int:
        """Predictions of one image."""
        return 1 if self.mode == "off" else 2

    def scaled_inside(self, kind: OutputKind) -> bool:
        """Whether u is inside the exponent for outputs of this kind."""
        return kind == "probabilistic" if self.scale_inside_exp is None else self.scale_inside_exp

    def penalty_weight(self, kind: OutputKind) -> float:
        """eta, the weight of the mean disagreement; 0 without uncertainty."""
        if self.mode != "uncertainty":
            return 0.0
        if self.eta is not None:
            return self.eta
        return 1.0 if self.scaled_inside(kind) else self.u_scale


@dataclass
class ConsistencyConfig:
    """The reward of objective.type condition_consistency: what reads the condition, and where on the noise axis it counts."""

    network: str | None = None
    """Network D: a folder or hub id of a semantic segmentation network of transformers, `playground`, or `edges`, a fixed
    filter. It is trained against, so measure with another. null: none, the diffusion loss alone (grad_scale 0)."""
    t_min: int = 0
    """First DDPM timestep whose one-step image is judged."""
    t_max: int = 400
    """Last one (400: Ctrl-U, 2410.11236; 200: ControlNet++, 2404.07987): beyond it the image is a blurred average."""
    grad_scale: float = 1.0
    """Weight of the consistency loss (ControlNet++ .5 ADE20K, .2 COCO-Stuff, 1 edges; Ctrl-U .1 ADE20K, .2 COCO-Stuff)."""
    ramp_updates: int = 5000
    """Updates over which the weight grows from 0 (5000 for segmentation and depth, else 0; 2410.11236)."""
    clamp: Clamp = "hard"
    """Gradient of pixels outside [0, 1], as in `loss.clamp`."""
    checkpointing: bool = True
    """Recompute activations of the VAE decoder and of D in the backward pass: less memory, more compute."""
    ctrlu: CtrlUConfig = field(default_factory=CtrlUConfig)

    @property
    def passes(self) -> int:
        """Predictions of one image: only the consistency loss has a use for a second one."""
        return self.ctrlu.passes if self.grad_scale > 0 else 1

    def validate(self) -> list[str]:
        """Mistakes that types cannot catch, one line each."""
        errors = []
        if not 0 <= self.t_min <= self.t_max <= _BETAS[2] - 1:
            errors.append(f"t_min, t_max: need 0 <= t_min <= t_max <= 999, got {self.t_min} and {self.t_max}")
        for name in ("grad_scale", "ramp_updates"):
            if getattr(self, name) < 0:
                errors.append(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.grad_scale > 0 and not self.network:
            errors.append(
                "network: a consistency loss needs a network that reads the condition from an image; give a folder or hub id of "
                "a segmentation network, or edges (or set grad_scale to 0 for the diffusion loss alone)"
            )
        for name in ("add_timestep", "u_scale"):
            if getattr(self.ctrlu, name) < 0:
                errors.append(f"ctrlu.{name}: must not be negative, got {getattr(self.ctrlu, name)}")
        if self.ctrlu.mode == "uncertainty" and self.ctrlu.u_scale == 0:
            errors.append("ctrlu.u_scale: 0 leaves nothing of the disagreement; use ctrlu.mode average or off")
        if self.ctrlu.eta is not None and self.ctrlu.eta < 0:
            errors.append(f"ctrlu.eta: must not be negative, got {self.ctrlu.eta}")
        if self.ctrlu.eta == 0 and self.ctrlu.mode == "uncertainty" and not self.ctrlu.detach_weight:
            errors.append(
                "ctrlu.eta: without the penalty the loss falls by disagreeing; use a positive one, or ctrlu.detach_weight: true"
            )
        return errors


# -- the noise axis -----------------------------------------------------------------------------------------------------


def second_timestep(first: Tensor, add: int, last: int) -> Tensor:
    """Timestep of the auxiliary prediction, min(t_1 + add, last); any shape, integer."""
    return (first + add).clamp(max=last)


def active(first: Tensor, t_min: int, t_max: int) -> Tensor:
    """m (B,) bool: whose one-step image is judged, by the primary timestep (B,) alone."""
    return (first >= t_min) & (first <= t_max)


def matched_level(timestep: int) -> float:
    """Flow time in [0, 1] with the noise-to-signal ratio of Stable Diffusion 1.5 at a DDPM timestep 0..999.

    sigma = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)) with a the cumulative alpha; t / 1000 would be far less noise.
    """
    low, high, count = _BETAS
    betas = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64) ** 2
    return float(flow_time(torch.cumprod(1 - betas, 0)[timestep]))


def clean_estimate(x: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """One-step prediction of the clean latent (B, ...) from a state in flow coordinates: x - t v, with t (B,).

    For a noise prediction this is (x_vp - sigma noise) / alpha, for v-prediction alpha x_vp - sigma v (see `samplers.vp`).
    """
    return x - t.view(-1, *[1] * (x.ndim - 1)).to(x) * velocity


def diffusion_errors(x: Tensor, velocity: Tensor, t: Tensor, clean: Tensor, noise: Tensor, target: str) -> Tensor:
    """(B,) mean squared error of what the network predicts, from its velocity at x = (1 - t) clean + t noise, t (B,).

    target: "epsilon" (the noise), "v_prediction" (alpha noise - sigma clean), "sample" (the clean latent) or "velocity".
    """
    s = t.view(-1, *[1] * (x.ndim - 1)).to(x)
    off_clean, off_noise = clean_estimate(x, velocity, t) - clean, x + (1 - s) * velocity - noise
    if target == "epsilon":
        error = off_noise
    elif target == "sample":
        error = off_clean
    elif target == "v_prediction":
        scale = torch.sqrt(s**2 + (1 - s) ** 2)
        error = ((1 - s) * off_noise - s * off_clean) / scale
    elif target == "velocity":
        error = velocity - (noise - clean)
    else:
        raise ValueError(f"unknown target {target!r}")
    return error.float().square().flatten(1).mean(1)


# -- the reward -----------------------------------------------------------------------------------------------------


def pixel_losses(output: Tensor, target: Tensor, kind: OutputKind) -> tuple[Tensor, Tensor]:
    """Loss (B, H, W) float32 of every pixel, and where it counts, bool.

    Probabilistic: cross-entropy of logits (B, C, H, W) with labels int64 (B, H, W), none where the label is IGNORE.
    Continuous: squared error of maps (B, C, H, W), mean over channels.
    """
    if kind == "probabilistic":
        losses = F.cross_entropy(output.float(), target, ignore_index=IGNORE, reduction="none")
        return losses, target != IGNORE
    losses = (output.float() - target.float()).square().mean(1)
    return losses, torch.ones_like(losses, dtype=torch.bool)


def disagreement(primary: Tensor, auxiliary: Tensor, kind: OutputKind, direction: str = "aux_to_primary") -> Tensor:
    """(B, H, W) float32 >= 0: how far two outputs (B, C, H, W) are apart.

    Probabilistic: sum_c p_2 (log p_2 - log p_1), the KL from the auxiliary to the primary prediction, or with
    "primary_to_aux" the reverse. Continuous: mean over channels of |o_1 - o_2|.
    """
    if kind == "continuous":
        return (primary.float() - auxiliary.float()).abs().mean(1)
    first, second = primary.float().log_softmax(1), auxiliary.float().log_softmax(1)
    if direction == "primary_to_aux":
        first, second = second, first
    return (second.exp() * (second - first)).sum(1)


@dataclass
class Consistency:
    """What a batch of B images contributes, each (B,) float32."""

    loss: Tensor
    """r_b: mean over the pixels that count of the loss times its weight."""
    penalty: Tensor
    """V_b: mean of U over all pixels; 0 without uncertainty."""
    plain: Tensor
    """Mean over the pixels that count of the loss itself, of the primary prediction, detached."""
    weight: Tensor
    """Mean of exp(-U), detached; 1 without uncertainty."""


def consistency(outputs: Tensor, target: Tensor, kind: OutputKind, config: CtrlUConfig) -> Consistency:
    """Losses of D's outputs: (B, C, H, W) of one prediction, or (2B, ...) of the primary ones and then the auxiliary ones.

    Ctrl-U: r_b = mean of l_1 exp(-U) over the pixels that count, V_b = mean of U over all (arXiv 2410.11236).
    """
    parts = outputs.chunk(config.passes)
    losses, valid = zip(*(pixel_losses(part, target, kind) for part in parts), strict=True)
    means = [_pixel_mean(one, valid[0]) for one in losses]
    nothing, whole = torch.zeros_like(means[0]), torch.ones_like(means[0].detach())
    if config.mode != "uncertainty":
        return Consistency(torch.stack(means).mean(0), nothing, means[0].detach(), whole)
    scale = config.u_scale if config.scaled_inside(kind) else 1.0
    ways = [(0, 1), (1, 0)] if config.symmetric else [(0, 1)]
    rectified, penalties, weights = [], [], []
    for own, other in ways:
        u = scale * disagreement(parts[own], parts[other], kind, config.kl_direction)
        weight = torch.exp(-u)
        used = weight.detach() if config.detach_weight else weight
        rectified.append(_pixel_mean(losses[own] * used, valid[0]))
        penalties.append(u.flatten(1).mean(1))
        weights.append(weight.detach().flatten(1).mean(1))
    loss, penalty, trust = (torch.stack(values).mean(0) for values in (rectified, penalties, weights))
    return Consistency(loss, penalty, means[0].detach(), trust)


def _pixel_mean(values: Tensor, valid: Tensor) -> Tensor:
    """(B,) mean of values (B, H, W) where valid; exactly 0 where nothing is."""
    return (values * valid).flatten(1).sum(1) / (valid.flatten(1).sum(1) + _COUNT_FLOOR)


def masked_mean(values: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """sum_b m_b values_b / (count + 1e-10), values and mask (B,): exactly 0, also its gradient, where nothing is active.

    count: active samples of the whole update, where `values` are a part of them; null: of this batch.
    """
    total = float(mask.sum()) if count is None else count
    return torch.where(mask, values, 0.0).sum() / (total + _COUNT_FLOOR)


def ramp(update: int, updates: int, scale: float) -> float:
    """Weight mu of the consistency loss: min(1, update / updates) times `scale`; without a ramp `scale`."""
    return scale if updates == 0 else min(1.0, update / updates) * scale
