"""How different a model's images of one prompt are, measured beside the held-out scores: a collapse that no mean shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from align.errors import UserError
from align.evaluate import conditions_of, half_width, sample_images
from align.models.base import ImageModel
from align.prompts import Prompt
from rewards.base import Reward
from rewards.diversity import embedding_diversity, vendi_score
from rewards.registry import RewardConfig, build_reward

_SEED = 0x646976  # added to that of the evaluations, so that these images start from other noise than the scored ones


@dataclass
class EmbedderConfig:
    """The network whose embeddings tell images apart: a reward that has `embed_images`."""

    type: str = "clip"
    """clip, pickscore, hps, proxy or a class of your own; best none that is trained against."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments."""


@dataclass
class DiversityConfig:
    """How different the images of one prompt are, measured on the base and at every evaluation."""

    prompts: int = 0
    """The first evaluation prompts that are measured; 0: off."""
    images: int = 8
    """Images of each prompt. The Vendi score grows with it and compares only at the same number."""
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = [] if self.prompts >= 0 else [f"prompts: must not be negative, got {self.prompts}"]
        if self.images < 2:
            errors.append(f"images: a prompt's images are compared with each other, so at least 2, got {self.images}")
        entry = RewardConfig(type=self.embedder.type, args=self.embedder.args)
        return errors + ([f"embedder: {line}" for line in entry.validate()] if self.prompts else [])


def build_embedder(config: DiversityConfig, device: torch.device) -> Reward | None:
    """The embedder on `device`; None where diversity is off. Raises: UserError, RewardError for one that cannot embed."""
    if not config.prompts:
        return None
    name = "eval.diversity.embedder"
    embedder = build_reward(name, RewardConfig(type=config.embedder.type, args=config.embedder.args))
    if not hasattr(embedder, "embed_images"):
        raise UserError(f"{name}: '{config.embedder.type}' has no embed_images; use clip, pickscore, hps or proxy")
    embedder.setup(device, torch.float32)
    return embedder


@torch.no_grad()
def measure(
    model: ImageModel,
    embedder: Reward,
    prompts: Sequence[Prompt],
    images: int,
    accelerator: Accelerator,
    *,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
) -> dict[str, float]:
    """Mean over `prompts` of the spread and the Vendi score of `images` images each, and half widths of their intervals.

    Of the model's present weights. Each process takes every world-size-th prompt; image j of prompt i starts from noise
    named by (seed, i * images + j), so that any two sets of weights are compared on the same noise.
    """
    mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    samples = [i * images + j for i in mine for j in range(images)]
    parts: list[Tensor] = []
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        rows = [prompts[s // images] for s in some]
        texts, followed = [p.text for p in rows], conditions_of(model, rows)
        pictures = sample_images(model, texts, some, num_steps, guidance_scale, seed + _SEED, followed)
        parts += [embedder.embed_images(piece).float().cpu() for piece in pictures.split(embedder.max_batch)]  # type: ignore[attr-defined]
    table = torch.zeros(2, len(prompts), dtype=torch.float64)
    own: list[tuple[list[int], Tensor]] = []
    if parts:
        embeddings, ids = torch.cat(parts), torch.tensor([s // images for s in samples])
        own = [(list(mine), torch.stack([embedding_diversity(embeddings, ids), vendi_score(embeddings, ids)]))]
    for index, values in gather_object(own):
        table[:, index] = values
    found: dict[str, float] = {}
    for name, values in zip(("spread", "vendi"), table, strict=True):
        found |= {f"diversity/{name}": float(values.nanmean()), f"diversity/{name}_ci95": half_width(values)}
    return found
