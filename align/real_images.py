"""Real images of prompts, where sampling starts from them (`backprop.partial_tau`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from align.errors import UserError
from align.models.base import ImageModel
from align.prompts import Prompt
from rewards.preprocess import centre_crop_or_pad, resize


def check_images(prompts: Sequence[Prompt]) -> None:
    """Raises: UserError unless every prompt names an image that is there."""
    for prompt in prompts:
        if prompt.image is None:
            raise UserError(
                f"backprop.partial_tau: sampling starts from real images, and the prompt '{prompt.text}' names none; use a "
                '.jsonl with {"prompt": ..., "image": "file.png"} in each line'
            )
        if not Path(prompt.image).is_file():
            raise UserError(f"prompts: there is no image {prompt.image} (of '{prompt.text}')")


def real_latents(model: ImageModel, prompts: Sequence[Prompt]) -> Tensor:
    """Clean latents (B, C, h, w) float32 of the prompts' images, resized and cropped to the model's size.

    Raises: UserError for an image that cannot be read.
    """
    side = model.config.resolution or model.native_resolution
    images = torch.cat([_picture(prompt, side) for prompt in prompts]).to(model.device)
    return model.encode_images(images)


def _picture(prompt: Prompt, side: int) -> Tensor:
    """(1, 3, side, side) in [0, 1]."""
    try:
        with Image.open(str(prompt.image)) as file:
            pixels = pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB")).float().unsqueeze(0) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:  # what Pillow raises
        raise UserError(f"prompts: the image {prompt.image} cannot be read ({problem})") from problem
    height, width = pixels.shape[-2:]
    short = min(height, width)
    scaled = resize(pixels, (max(side, round(height * side / short)), max(side, round(width * side / short))))
    return centre_crop_or_pad(scaled, (side, side)).clamp(0, 1)
