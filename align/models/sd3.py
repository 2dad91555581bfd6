"""Stable Diffusion 3 and 3.5 (any size), flow matching with a joint-attention transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.models.base import Conditioning, ImageModel, ModelConfig


class SD3Model(ImageModel):
    """`StableDiffusion3Pipeline`: prediction is the velocity noise - data at sigma t; timestep = 1000 t."""

    family = "sd3"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def __init__(self, pipe: Any, config: ModelConfig, device: torch.device) -> None:
        super().__init__(pipe, config, device)
        # without T5 the pipeline would append that many zero tokens: take none
        self.sequence_length = config.max_sequence_length if pipe.text_encoder_3 is not None else 0

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """`embeds` (B, L, joint dim) and `pooled` (B, pooled dim) in the network's dtype."""
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(self.pipe, name)
            if encoder is not None:
                encoder.to(self.device)
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts),
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.sequence_length,
            )
        return Conditioning({"embeds": embeds.to(self.dtype), "pooled": pooled.to(self.dtype)})

    def _predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.network(
                hidden_states=x.to(self.dtype),
                timestep=t * self.pipe.scheduler.config.num_train_timesteps,
                encoder_hidden_states=cond.tensors["embeds"],
                pooled_projections=cond.tensors["pooled"],
                return_dict=False,
            )[0]
        return out.float()
