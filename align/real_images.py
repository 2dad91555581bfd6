"""Real images of prompts, where sampling starts from them (`backprop.partial_tau`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor

from align.errors import UserError
from align.models.base import ImageModel
from align.prompts import Prompt
from rewards.preprocess import centre_crop_or_pad, resize

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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
    return fitted(read_picture(str(prompt.image)), side)


def read_picture(path: str) -> Tensor:
    """(1, 3, H, W) in [0, 1], the right way up. Raises: UserError for a file that cannot be read."""
    try:
        with Image.open(path) as file:
            if file.mode[0] in "IF":  # Pillow would cut its values off at 255
                raise ValueError(f"it has more than 8 bits, mode {file.mode}: scale it and save it with 8")
            return pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB")).float().unsqueeze(0) / 255
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:  # what Pillow raises
        raise UserError(f"prompts: the image {path} cannot be read ({problem})") from problem


def fitted(pixels: Tensor, side: int) -> Tensor:
    """(B, C, H, W) in [0, 1], its short side resized to `side` and the rest cropped: (B, C, side, side)."""
    return centre_crop_or_pad(resize(pixels, covering_size(pixels, side)), (side, side)).clamp(0, 1)


def fitted_labels(labels: Tensor, side: int) -> Tensor:
    """Labels (H, W) as `fitted` has their image, each pixel of (side, side) the label of the nearest one."""
    pixels = labels[None, None].float()
    scaled = functional.interpolate(pixels, covering_size(pixels, side), mode="nearest-exact")
    return centre_crop_or_pad(scaled, (side, side))[0, 0].to(labels.dtype)


def covering_size(pixels: Tensor, side: int) -> tuple[int, int]:
    """Height and width of (..., H, W) once the short side is `side`."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    return max(side, round(height * side / short)), max(side, round(width * side / short))
