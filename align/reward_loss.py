"""From final latents to the gradient of a reward: decode, judge, differentiate the image, then the decoder.

The first half of the step-level adjoint of reward backpropagation (DRaFT, arXiv 2309.17400; AlignProp, 2310.03739;
ReFL, 2304.05977). The sampler's graph never meets these: memory is that of the decoder and of one reward, for one
slice of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from align.errors import UserError
from align.models.base import Clamp, ImageModel
from align.prompts import Prompt
from align.schema import nearest
from align.scoring import component_key, reward_batch, score_local, uncertainty_key
from align.uncertainty import DoubtfulLoss
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, one_line
from rewards.registry import RewardConfig

LossKind = Literal["negative", "target", "hinge"]

# Keeps an image without gradient (a satisfied hinge) at zero when gradients are brought to norm 1.
_NORM_FLOOR = 1e-8


@dataclass
class LossConfig:
    """How scores become the loss that is differentiated."""

    kind: LossKind = "negative"
    """"negative" -R (DRaFT, arXiv 2309.17400), "target" |R - value| (AlignProp, 2310.03739) or "hinge" relu(value - R),
    which leaves images that are good enough alone (ReFL, 2304.05977)."""
    value: float | dict[str, float] | None = None
    """Target, or margin of the hinge, in raw units of the reward: one for all rewards or one by name (hinge: ImageReward
    2, arXiv 2304.05977, HPSv2.1 .55; target: aesthetic 10, 2310.03739); null for negative."""
    scale: float = 1.0
    """Factor of the loss (ReFL 1e-3, arXiv 2304.05977; AlignProp .01, 2310.03739); Adam feels it only through clipping."""
    equalise: bool = False
    """Bring each reward's gradient at an image to norm 1 before its weight (idea of arXiv 2503.13070), so that no unit
    of a reward outweighs another."""
    clamp: Clamp = "hard"
    """Gradient of pixels outside [0, 1]: "hard" none, as the clamp has it; "straight_through" as if nothing was cut."""
    image_batch: int = 2
    """Images decoded and judged with gradient at once; memory grows with it, results do not depend on it."""
    checkpointing: bool = True
    """Recompute activations of the VAE decoder and of reward networks in the backward pass: less memory, more compute."""

    def validate(self, rewards: Mapping[str, RewardConfig]) -> list[str]:
        """Mistakes that types cannot catch, one line each, given the rewards of the run."""
        errors = self._value_errors(rewards)
        negative = [name for name, entry in rewards.items() if entry.weight < 0]
        if self.kind != "negative" and negative:
            errors.append(
                f"kind: {self.kind} pulls every reward to its value, which a negative weight would push away "
                f"({_listed(negative)}); use kind=negative or a positive weight"
            )
        if not self.scale > 0:
            errors.append(f"scale: must be positive, got {self.scale}")
        if self.image_batch < 1:
            errors.append(f"image_batch: must be at least 1, got {self.image_batch}")
        return errors

    def value_of(self, name: str) -> float | None:
        """Target or margin of the reward `name`."""
        return self.value.get(name) if isinstance(self.value, dict) else self.value

    def _value_errors(self, rewards: Mapping[str, RewardConfig]) -> list[str]:
        if self.kind == "negative":
            return (
                []
                if self.value is None
                else ["value: kind=negative has none; leave it out, or use kind=target or kind=hinge"]
            )
        named = self.value if isinstance(self.value, dict) else {}
        errors = [
            f"value.{name}: no reward has this name{nearest(name, rewards)}" for name in named if name not in rewards
        ]
        lacking = [name for name, entry in rewards.items() if entry.weight != 0 and self.value_of(name) is None]
        if lacking:
            word = "target" if self.kind == "target" else "margin"
            errors.append(f"value: kind={self.kind} needs the {word} of {_listed(lacking)}, in units of the score")
        return errors


def _listed(names: Sequence[str]) -> str:
    """`reward 'a'` or `rewards 'a', 'b'`."""
    return ("reward " if len(names) == 1 else "rewards ") + ", ".join(f"'{name}'" for name in names)


def reward_loss(scores: Tensor, kind: LossKind, value: float | None = None) -> Tensor:
    """Loss (B,) of raw scores (B,): -R, |R - value| or relu(value - R) (arXiv 2310.03739, 2304.05977).

    A missing score (NaN) has loss 0, and gradient exactly 0.
    """
    known = ~scores.isnan()
    scores = torch.where(known, scores, 0.0)  # before the loss: in the backward pass 0 times NaN would be NaN
    if kind == "negative":
        losses = -scores
    else:
        if value is None:
            raise ValueError(f"a {kind} loss needs a value")
        losses = (scores - value).abs() if kind == "target" else (value - scores).relu()
    return torch.where(known, losses, 0.0)


def check_differentiable(rewards: Mapping[str, Reward], settings: Mapping[str, RewardConfig]) -> None:
    """Raises: UserError, one line, naming every reward that reward_gradient cannot train or, in batches, watch."""
    blind = [name for name, reward in _trained(rewards, settings).items() if not reward.differentiable]
    grouped = [name for name, reward in rewards.items() if reward.kind == "groupwise"]
    problems = []
    if blind:
        verb, it = ("has", "it") if len(blind) == 1 else ("have", "them")
        problems.append(
            f"{_listed(blind)} {verb} no gradient with respect to the image, which objective.type reward_gradient needs; give "
            f"{it} weight 0 to only watch {it}, or train {it} with a policy gradient (preset flow_grpo, nft)"
        )
    if grouped:
        verb, it = ("judges", "it") if len(grouped) == 1 else ("judge", "them")
        problems.append(
            f"{_listed(grouped)} {verb} whole groups, which the image batches of reward_gradient cut; move {it} to eval_rewards"
        )
    if problems:
        raise UserError("; ".join(problems))


def enable_checkpointing(
    model: ImageModel, rewards: Mapping[str, Reward], settings: Mapping[str, RewardConfig]
) -> None:
    """Recompute activations of the VAE and of the weighted rewards in backward passes; call after their setup."""
    model.pipe.vae.enable_gradient_checkpointing()  # diffusers applies it only where gradients are recorded
    for reward in _trained(rewards, settings).values():
        reward.enable_checkpointing()


def _trained(rewards: Mapping[str, Reward], settings: Mapping[str, RewardConfig]) -> dict[str, Reward]:
    """The rewards whose weight is not 0."""
    return {name: reward for name, reward in rewards.items() if settings[name].weight != 0}


@dataclass
class ImageGradient:
    """Losses of B final latents and their gradient. The gradient is where the latents are, all else on the CPU."""

    gradient: Tensor
    """(B, C, h, w) float32: d loss_i / d latents_i of each sample alone, not divided by B."""
    losses: Tensor
    """(B,) float32: scale times the weighted sum of the rewards' losses, also where gradients are equalised."""
    scores: dict[str, Tensor]
    """(B,) float32 raw scores of every reward, NaN where missing; those of weight 0 of the watched images only."""
    saturated: Tensor
    """(B,) float32: share of each image's values that the clamp to [0, 1] changed."""
    missing: Tensor
    """(B,) bool: a weighted reward has no score. Loss and gradient of the sample are 0."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Of the shape of a score: uncertainties and components of the rewards, see `align.scoring.Scores`."""


def image_gradient(
    model: ImageModel,
    rewards: Mapping[str, Reward],
    settings: Mapping[str, RewardConfig],
    latents: Tensor,
    prompts: Sequence[Prompt],
    group_ids: Sequence[int],
    step: int,
    config: LossConfig,
    watched: int | None = None,
    doubtful: Mapping[str, DoubtfulLoss] | None = None,
) -> ImageGradient:
    """Gradient at the final latents (B, C, h, w) of scale sum_k w_k loss_k(R_k(decode(latents))).

    doubtful: of the rewards whose loss is weighted by their uncertainty, how.

    Nothing gets a `.grad`. A loss or gradient that is not finite comes back as it is. Rewards of weight 0 judge the first
    `watched` images (all B if None), without gradient. Raises: RewardError if a reward fails, also in its backward pass.
    """
    trained = _trained(rewards, settings)
    parts, images = [], []
    for start in range(0, len(latents), config.image_batch):
        some = slice(start, start + config.image_batch)
        part, decoded = _slice_gradient(
            model, trained, settings, latents[some], prompts[some], group_ids[some], step, config, doubtful or {}
        )
        parts.append(part)
        if len(trained) < len(rewards):
            images.append(decoded)
    rest = {name: reward for name, reward in rewards.items() if name not in trained}
    few = slice(watched)
    seen = score_local(rest, torch.cat(images)[few], prompts[few], group_ids[few], step) if rest else {}
    keys = dict.fromkeys(key for part in parts for key in part.extras)
    silent = [torch.full_like(part.losses, torch.nan) for part in parts]
    extras = {key: torch.cat([part.extras.get(key, s) for part, s in zip(parts, silent, strict=True)]) for key in keys}
    return ImageGradient(
        gradient=torch.cat([part.gradient for part in parts]),
        losses=torch.cat([part.losses for part in parts]),
        scores={
            name: torch.cat([part.scores[name] for part in parts]) if name in trained else seen[name]
            for name in rewards
        },
        saturated=torch.cat([part.saturated for part in parts]),
        missing=torch.cat([part.missing for part in parts]),
        extras=extras | {key: values for key, values in seen.items() if key not in rest},
    )


def _slice_gradient(
    model: ImageModel,
    trained: Mapping[str, Reward],
    settings: Mapping[str, RewardConfig],
    latents: Tensor,
    prompts: Sequence[Prompt],
    group_ids: Sequence[int],
    step: int,
    config: LossConfig,
    doubtful: Mapping[str, DoubtfulLoss],
) -> tuple[ImageGradient, Tensor]:
    """`image_gradient` of a few latents and the weighted rewards, and the images (b, 3, H, W), detached."""
    leaf = latents.detach().float().requires_grad_()
    images, saturated = model.decode_with_gradient(leaf, config.clamp)
    batch = reward_batch(images.detach().requires_grad_(), prompts, group_ids, step)
    at_image, losses = torch.zeros_like(batch.images), torch.zeros(len(batch), device=images.device)
    scores, extras = {}, {}
    for name, reward in trained.items():
        factor = config.scale * settings[name].weight
        gradient, part, output = _judge(name, reward, batch, config, doubtful.get(name), factor)
        scores[name] = output.scores.detach()
        if output.uncertainty is not None:
            extras[uncertainty_key(name)] = output.uncertainty.detach().cpu()
        extras |= {component_key(name, key): values.cpu() for key, values in output.components.items()}
        at_image += factor * gradient
        losses += factor * part
    missing = torch.stack(list(scores.values())).isnan().any(dim=0)
    (gradient,) = torch.autograd.grad(images, leaf, at_image)
    found = ImageGradient(
        gradient=_without(missing, gradient),  # a reward's backward pass may have turned its 0 into NaN
        losses=_without(missing, losses).cpu(),
        scores={name: values.cpu() for name, values in scores.items()},
        saturated=saturated.cpu(),
        missing=missing.cpu(),
        extras=extras,
    )
    return found, images.detach()


def _judge(
    name: str, reward: Reward, batch: RewardBatch, config: LossConfig, doubtful: DoubtfulLoss | None, factor: float
) -> tuple[Tensor, Tensor, RewardOutput]:
    """d loss / d images (b, 3, H, W) and losses (b,) of one reward, detached and not yet times `factor`; its output."""
    output = checked_score(reward, batch)
    losses = reward_loss(output.scores, config.kind, config.value_of(name))
    if doubtful is not None and output.uncertainty is not None:
        losses = doubtful(losses, output.uncertainty, 1.0 if factor > 0 else -1.0)
    try:
        (gradient,) = torch.autograd.grad(losses.sum(), batch.images)
    except RuntimeError as error:
        raise RewardError(f"reward '{name}' failed in its backward pass: {one_line(error)}") from error
    if config.equalise:
        norms = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        gradient = gradient / (norms + _NORM_FLOOR)
    return gradient, losses.detach(), output


def _without(missing: Tensor, values: Tensor) -> Tensor:
    """`values` (B, ...) with exact zeros for the samples where `missing` (B,)."""
    return torch.where(missing.view(-1, *[1] * (values.ndim - 1)), 0.0, values)
