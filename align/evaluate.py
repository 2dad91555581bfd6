"""Held-out evaluation: deterministic sampling from the same noise for every set of weights that is compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from align.control_data import load_conditions
from align.errors import UserError
from align.models.base import Conditioning, ImageModel
from align.models.controlnet import CONTROL, ControlNetSDModel
from align.prompts import Prompt
from align.scoring import Scores, gather_scores, try_score
from rewards.base import Reward
from samplers.noise import keyed_normal
from samplers.rollout import solve

EVAL_STREAM = 0x6576616C


@dataclass
class Evaluation:
    """Scores over all prompts and the images (k, 3, H, W) of the first k."""

    prompts: list[Prompt]
    scores: Scores
    images: Tensor
    num_steps: int
    guidance_scale: float
    seed: int
    diversity: dict[str, float] = field(default_factory=dict)
    """`diversity/...` metrics (`align.diversity`), where they are measured."""

    def to_json(self) -> dict[str, Any]:
        """What eval/*.json holds."""
        return {
            "prompts": [p.text for p in self.prompts],
            "metadata": [p.metadata for p in self.prompts],
            "scores": {k: [float(x) for x in v] for k, v in self.scores.values.items()},
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            **({"diversity": self.diversity} if self.diversity else {}),
        }


def sample_images(
    model: ImageModel,
    prompts: Sequence[str],
    indices: Sequence[int],
    num_steps: int,
    guidance_scale: float,
    seed: int,
    conditions: Tensor | None = None,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of `prompts` by the ODE; image i starts from noise named by (seed, indices[i]).

    conditions: (B, 3, H, W) in [0, 1], what a model with a ControlNet follows.
    """
    noise = keyed_normal(
        model.latent_shape, seed=seed, iteration=0, samples=indices, step=0, stream=EVAL_STREAM, device=model.device
    )
    grid = model.grid("scheduler", num_steps).to(model.device)
    noise = noise * model.noise_scale(float(grid[0]))
    cond = model.conditioning(prompts)
    if conditions is None and isinstance(model, ControlNetSDModel):
        raise UserError(
            "a ControlNet follows condition images, which a prompt alone does not have: use align eval or align grid with "
            "prompts that have some, or its folder with diffusers' StableDiffusionControlNetPipeline"
        )
    if conditions is not None:
        cond = Conditioning({**cond.tensors, CONTROL: conditions.to(model.device)})
    before, model.guidance_scale = model.guidance_scale, guidance_scale
    try:
        latents = solve(model.velocity, noise, cond, grid)
    finally:
        model.guidance_scale = before
    return model.decode(latents)


def evaluate(
    model: ImageModel,
    rewards: dict[str, Reward],
    prompts: Sequence[Prompt],
    accelerator: Accelerator,
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    keep_images: int = 0,
    weights: contextlib.AbstractContextManager[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    before_scoring: Callable[[Tensor, list[int]], None] | None = None,
    required: bool = True,
) -> Evaluation:
    """Score `prompts` (each process takes every world-size-th one), with `weights` applied if given.

    before_scoring: called with this process's images and the indices of their prompts. required: whether every reward must
    have a score for some image.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = list(range(rank, len(prompts), world))
    found: list[Tensor] = []
    kept: dict[int, Tensor] = {}
    with weights or contextlib.nullcontext():
        for start in range(0, len(mine), batch_size):
            chunk = mine[start : start + batch_size]
            rows = [prompts[i] for i in chunk]
            images = sample_images(
                model, [p.text for p in rows], chunk, num_steps, guidance_scale, seed, conditions_of(model, rows)
            )
            found.append(images)
            kept |= {i: images[row].cpu() for row, i in enumerate(chunk) if i < keep_images}
            if progress is not None:
                progress(min(start + batch_size, len(mine)), len(mine))
    images = torch.cat(found) if found else torch.zeros(0, 3, 8, 8, device=model.device)
    if before_scoring is not None:
        before_scoring(images, mine)
    local = (
        try_score(rewards, images, [prompts[i] for i in mine], mine, -1)
        if mine
        else {r: torch.zeros(0) for r in rewards}
    )
    scores = gather_scores(accelerator, local, list(rewards), mine, len(prompts), required=required)
    return Evaluation(list(prompts), scores, _gather_images(kept, accelerator), num_steps, guidance_scale, seed)


def conditions_of(model: ImageModel, prompts: Sequence[Prompt]) -> Tensor | None:
    """Condition images (B, 3, S, S) in [0, 1] of the prompts; None for a model that takes none.

    Raises: UserError for a prompt without one.
    """
    if not isinstance(model, ControlNetSDModel):
        return None
    return load_conditions(prompts, model.config.resolution or model.native_resolution)


def _gather_images(kept: dict[int, Tensor], accelerator: Accelerator) -> Tensor:
    from accelerate.utils import gather_object

    everything: dict[int, Tensor] = {}
    for part in gather_object([{i: (v * 255).round().to(torch.uint8) for i, v in kept.items()}]):
        everything |= part
    ordered = [everything[i].float() / 255 for i in sorted(everything)]
    return torch.stack(ordered) if ordered else torch.zeros(0, 3, 1, 1)


def half_width(values: Tensor) -> float:
    """Half width of the normal 95 % interval of the mean of the non-NaN values."""
    present = values[~values.isnan()].double()
    return float(1.96 * present.std() / math.sqrt(len(present))) if len(present) > 1 else float("nan")


def paired_interval(base: Tensor, tuned: Tensor, seed: int = 0, draws: int = 4000) -> list[float]:
    """95 % bootstrap interval of mean(tuned - base) over prompts with both scores."""
    delta = (tuned - base).double().numpy()
    delta = delta[~np.isnan(delta)]
    if not len(delta):
        return [float("nan"), float("nan")]
    generator = np.random.Generator(np.random.Philox(key=[seed, draws]))
    means = delta[generator.integers(0, len(delta), (draws, len(delta)))].mean(axis=1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]
