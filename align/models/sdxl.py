"""Stable Diffusion XL (base)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.errors import UserError
from align.models.base import Conditioning, ModelConfig
from align.models.vp import VPModel


class SDXLModel(VPModel):
    """`StableDiffusionXLPipeline`: two CLIP text encoders, the pooled output of the second, and the image's size."""

    family = "sdxl"

    def __init__(self, pipe: Any, config: ModelConfig, device: torch.device) -> None:
        if pipe.config.get("requires_aesthetics_score"):
            raise UserError("model.path: this is a refiner, which continues images of another model; use the SDXL base")
        if pipe.unet.config.addition_embed_type != "text_time":
            raise UserError("model.family: this UNet lacks SDXL's size conditions; use family=auto")
        super().__init__(pipe, config, device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` (B, 77, width) and `pooled` (B, pooled dim) in the network's dtype.

        The empty prompt, which guidance points away from, is all zeros where the pipeline's config says so.
        """
        for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2):
            if encoder is not None:
                encoder.to(self.device)
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), device=self.device, do_classifier_free_guidance=False
            )
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return Conditioning({"embeds": embeds.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def _added(self, x: Tensor, cond: Conditioning) -> dict[str, Tensor]:
        """Pooled prompt and (original size, crop corner, target size) in pixels: an uncropped image of the latents' size."""
        height, width = (side * self.pipe.vae_scale_factor for side in x.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=x.device)
        return {"text_embeds": cond.tensors["pooled"], "time_ids": sizes.expand(len(x), -1)}
