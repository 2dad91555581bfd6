"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from align.errors import UserError
from align.models.base import Conditioning, ModelConfig
from align.models.vp import VPModel


class SDModel(VPModel):
    """`StableDiffusionPipeline`: one CLIP text encoder, 77 tokens, and no other condition."""

    family = "sd"
    load_arguments: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def __init__(self, pipe: Any, config: ModelConfig, device: torch.device) -> None:
        if pipe.unet.config.addition_embed_type is not None:
            raise UserError("model.family: this UNet has conditions beyond the prompt, as in SDXL; use family=auto")
        super().__init__(pipe, config, device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` (B, 77, width) in the network's dtype."""
        self.pipe.text_encoder.to(self.device)
        with torch.no_grad():
            embeds: Tensor = self.pipe.encode_prompt(list(prompts), self.device, 1, False)[0]
        return Conditioning({"embeds": embeds.to(self.dtype)})
