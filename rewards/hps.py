"""Human Preference Score v2 and v2.1: a CLIP ViT-H-14 trained on ranked images, differentiable (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rewards.base import RewardError, nearest
from rewards.clip import CLIPScore
from rewards.weights import CLIP_MEAN, CLIP_STD, find_file, loading

REPOSITORY = "xswu/HPSv2"
_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(CLIPScore):
    """Cosine of the image and its own prompt, without logit scale: 0.18 to 0.38 for v2.1; tables show it times 100.

    v2.0 and v2.1 are on different scales. The longest side is resized to the network and the rest is black, as in the
    authors' package; code that crops instead gives other scores on images that are not square.
    """

    name = "hps"

    def __init__(
        self, version: str = "v2.1", path: str = REPOSITORY, config: str | Mapping[str, Any] | None = None
    ) -> None:
        """version: v2.1 or v2.0; path: the checkpoint, a folder with it, or a hub id; config: of another open_clip network."""
        if version not in _FILES:
            raise RewardError(f"version '{version}' must be {' or '.join(_FILES)}{nearest(version, _FILES)}")
        super().__init__(model=None if config is not None else "ViT-H-14", pretrained=path, config=config)
        self.version, self.path = version, path

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the network in `dtype`. Raises RewardError if the checkpoint is missing or does not fit."""
        with loading(self.name):
            page = f"https://huggingface.co/{REPOSITORY}"
            self.pretrained = str(find_file(self.path, _FILES[self.version], page))
        super().setup(device, dtype)
        self._loaded().transform.update(
            mean=CLIP_MEAN, std=CLIP_STD, resize_mode="longest", interpolation="bicubic", fill=0.0
        )
