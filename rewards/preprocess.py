"""Image preprocessing on tensors, so that gradients reach the pixels and every process gets the same values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """(B, C, H, W) -> (B, C, *size), antialiased as PIL does. Bicubic may overshoot [0, 1]; nothing is clamped."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode=interpolation, align_corners=False, antialias=True)


def centre_crop_or_pad(images: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """Cut or fill evenly on both sides; an odd pixel of padding goes to the bottom and the right."""
    height, width = images.shape[-2:]
    down, across = max(size[0] - height, 0), max(size[1] - width, 0)
    if down or across:
        images = F.pad(images, (across // 2, (across + 1) // 2, down // 2, (down + 1) // 2), value=fill)
    top = round((images.shape[-2] - size[0]) / 2)
    left = round((images.shape[-1] - size[1]) / 2)
    return images[..., top : top + size[0], left : left + size[1]]


def preprocess(
    images: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    fill: float = 0.0,
) -> Tensor:
    """What an open_clip model does to a PIL image before the network, on (B, 3, H, W) in [0, 1].

    resize_mode: "shortest" side to size and centre crop, "longest" side to size and pad with `fill`, or "squash".
    Float16 and bfloat16 images are computed in float32. Returns (B, 3, *size), normalised by mean and std.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    images = resize(images, _resized(images.shape[-2:], size, resize_mode), interpolation)
    images = centre_crop_or_pad(images, size, fill)
    shift = torch.tensor(mean, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    return (images - shift) / scale


def _resized(source: Sequence[int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    height, width = source
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        short, side = min(height, width), target[0]
        # Integer floor of the long side, as torchvision's Resize.
        return (side if height == short else side * height // short, side if width == short else side * width // short)
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))
