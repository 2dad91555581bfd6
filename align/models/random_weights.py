"""Models of a published size with random weights and random prompt embeddings: enough to time and to measure memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from align.errors import UserError
from align.models.base import DTYPES, Conditioning, ImageModel, ModelConfig
from align.models.sd import SDModel
from align.models.sd3 import SD3Model
from align.models.sdxl import SDXLModel


@dataclass(frozen=True)
class Size:
    """One model's public configuration, as far as speed and memory depend on it."""

    family: type[ImageModel]
    pipeline: str
    network_class: str
    network: dict[str, Any]
    vae: dict[str, Any]
    prompt: dict[str, tuple[int, ...]]
    """Shape of each embedding of a prompt, without the batch."""
    scheduler: Any
    t5: bool = False
    """Whether `max_sequence_length` T5 tokens are appended to the first dimension of `embeds`."""


_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}

SIZES = {
    # 0.86 B parameters
    "sd15": Size(
        family=SDModel,
        pipeline="StableDiffusionPipeline",
        network_class="UNet2DConditionModel",
        network={
            "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
            "cross_attention_dim": 768, "attention_head_dim": 8,
        },
        vae=_VAE | {"latent_channels": 4, "sample_size": 512, "scaling_factor": 0.18215},
        prompt={"embeds": (77, 768)},
        scheduler=diffusers.DDIMScheduler(**_BETAS, set_alpha_to_one=False, clip_sample=False),
    ),
    # 2.57 B parameters
    "sdxl": Size(
        family=SDXLModel,
        pipeline="StableDiffusionXLPipeline",
        network_class="UNet2DConditionModel",
        network={
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        vae=_VAE | {"latent_channels": 4, "sample_size": 1024, "scaling_factor": 0.13025},
        prompt={"embeds": (77, 2048), "pooled": (1280,)},
        scheduler=diffusers.DDIMScheduler(**_BETAS, set_alpha_to_one=False, clip_sample=False),
    ),
    # 2.24 B parameters
    "sd35-medium": Size(
        family=SD3Model,
        pipeline="StableDiffusion3Pipeline",
        network_class="SD3Transformer2DModel",
        network={
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
        },
        vae=_VAE | {
            "latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
        prompt={"embeds": (77, 4096), "pooled": (2048,)},
        t5=True,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
}  # fmt: skip


def random_model(name: str, config: ModelConfig, device: torch.device, prompts: Iterable[str]) -> ImageModel:
    """The model `SIZES[name]` on `device`, with embeddings of `prompts` and of the empty one.

    Raises: UserError if there is no such size.
    """
    if name not in SIZES:
        raise UserError(f"--random: no size '{name}'; one of {', '.join(SIZES)}")
    size = SIZES[name]
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(DTYPES[config.precision])
        try:
            network = getattr(diffusers, size.network_class)(**size.network)
        finally:
            torch.set_default_dtype(torch.float32)
        vae = diffusers.AutoencoderKL(**size.vae)
    pipeline = getattr(diffusers, size.pipeline)
    required = [k for k, p in inspect.signature(pipeline).parameters.items() if p.default is p.empty]
    parts = {size.family.denoiser_name: network, "vae": vae, "scheduler": size.scheduler}
    pipe = pipeline(**dict.fromkeys(required) | size.family.load_arguments | parts)
    model = size.family(pipe, config, device)
    for text in dict.fromkeys(["", *prompts]):
        shapes = {k: list(shape) for k, shape in size.prompt.items()}
        if size.t5:
            shapes["embeds"][0] += config.max_sequence_length
        model.remember(text, Conditioning({k: torch.randn(1, *v).to(model.dtype) for k, v in shapes.items()}))
    return model
