"""Tiny genuine StableDiffusionPipeline and StableDiffusionXLPipeline, built offline with random weights."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

TINY = runpy.run_path(str(Path(__file__).parent / "tiny.py"))
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def unet(**settings: Any) -> UNet2DConditionModel:
    """Three levels with 4 latent channels, transformers at the last two, heads of 8 and 16 channels."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": (1, 2, 2), "cross_attention_dim": 16,
            **settings,
        }
    ).eval()  # fmt: skip


def vae(**settings: Any) -> AutoencoderKL:
    """Two levels: two image pixels a latent pixel."""
    return AutoencoderKL(
        **{
            "latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "sample_size": 16, "scaling_factor": 0.18215, **settings,
        }
    ).eval()  # fmt: skip


def text_encoder(vocabulary: int, seed: int) -> CLIPTextModel:
    """Three layers of width 16."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        )
    ).eval()  # fmt: skip


def sd_pipeline(folder: Path, *, scheduler: Any = None, seed: int = 0, **settings: Any) -> Path:
    """Save an SD 1.5-type pipeline, by default with a PNDM scheduler as published; settings are the UNet's."""
    tokenizer = TINY["clip_tokenizer"](folder / ".tokenizer")
    torch.manual_seed(seed)
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(len(tokenizer), seed + 1),
        tokenizer=tokenizer,
        unet=unet(**settings),
        scheduler=scheduler or PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def sdxl_pipeline(folder: Path, *, scheduler: Any = None, zeros: bool = True, seed: int = 0, **settings: Any) -> Path:
    """Save an SDXL-type pipeline: two encoders, size conditions, two transformer layers at the last level.

    zeros: the empty prompt is all zeros. settings are the UNet's.
    """
    from diffusers import EulerDiscreteScheduler

    tokenizer = TINY["clip_tokenizer"](folder / ".tokenizer")
    torch.manual_seed(seed)
    defaults = {
        "cross_attention_dim": 32, "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=text_encoder(len(tokenizer), seed + 1),
        text_encoder_2=TINY["clip_encoder"](len(tokenizer), seed + 2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(**defaults | settings),
        scheduler=scheduler or EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
