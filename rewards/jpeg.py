"""File size as a reward: no weights, no GPU, and it moves within a few dozen iterations (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io

import torch
from PIL import Image

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, nearest, to_uint8

_SIGNS = {"compressibility": -1.0, "incompressibility": 1.0}


class JPEGReward(Reward):
    """Size of the image as a JPEG of quality 95 in kB (1000 bytes), negative for compressibility.

    The size depends on the versions of Pillow and libjpeg, so scores of two machines must not be compared.
    """

    name = "jpeg"
    uses_prompt = False

    def __init__(self, objective: str = "compressibility", quality: int = 95, divisor: float = 1.0) -> None:
        """objective: "compressibility" or "incompressibility"; divisor: score = +-kB / divisor (500 is common)."""
        if objective not in _SIGNS:
            raise RewardError(
                f"objective '{objective}' must be compressibility or incompressibility{nearest(objective, _SIGNS)}"
            )
        if not 1 <= quality <= 100:
            raise RewardError(f"quality must be in 1..100, got {quality}")
        if not divisor > 0:
            raise RewardError(f"divisor must be positive, got {divisor}")
        self.quality = quality
        self.scale = _SIGNS[objective] / divisor

    def score(self, batch: RewardBatch) -> RewardOutput:
        pixels = to_uint8(batch.images).permute(0, 2, 3, 1).cpu().numpy()
        sizes = torch.tensor([self.kilobytes(Image.fromarray(image)) for image in pixels], dtype=torch.float32)
        return RewardOutput(self.scale * sizes, components={"kilobytes": sizes})

    def kilobytes(self, image: Image.Image) -> float:
        """Size of the encoded image, in units of 1000 bytes."""
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000
