"""PickScore: a CLIP ViT-H-14 trained on which of two images people picked, differentiable (arXiv 2305.01569)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewards.base import RewardError, RewardOutput
from rewards.clip import CLIPScore
from rewards.open_clip_models import LoadedClip
from rewards.weights import CLIP_MEAN, CLIP_STD, load_pretrained, load_tokenizer, loading, recompute_layers

REPOSITORY = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(CLIPScore):
    """exp(logit scale) * cosine of the image and its own prompt: 19 to 24 for usual images, over `divisor`.

    The scale is read from the checkpoint. The undivided score is the component `raw`. Code bases divide by 26, by 20
    or by 100 (about the cosine); advantages do not see the divisor, sums with other rewards do.
    """

    name = "pickscore"

    def __init__(self, path: str = REPOSITORY, processor: str = PROCESSOR, divisor: float = 1.0) -> None:
        """path: folder or hub id of a transformers CLIPModel; processor: folder or hub id with CLIP's tokenizer."""
        super().__init__(model=path)
        if not divisor > 0:
            raise RewardError(f"divisor must be positive, got {divisor}")
        self.path, self.processor, self.divisor = path, processor, divisor
        self.scale = float("nan")

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the network in `dtype`. Raises RewardError if weights or tokenizer are missing."""
        from transformers import CLIPModel, CLIPTokenizer

        with loading(self.name):
            # At least float32 at first: in bfloat16 the logit scale of 100 would become 98.9.
            network = load_pretrained(CLIPModel, self.path, "path", torch.promote_types(dtype, torch.float32))
            tokenizer = load_tokenizer(CLIPTokenizer, self.processor, "processor")
        self.scale = network.logit_scale.exp().item()
        length = network.config.text_config.max_position_embeddings

        def tokens(texts: list[str]) -> Tensor:
            return tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").input_ids

        size = network.config.vision_config.image_size
        transform = {"size": (size, size), "mean": CLIP_MEAN, "std": CLIP_STD}
        self.clip = LoadedClip(_OpenClipForm(network.to(device, dtype)), tokens, transform)
        self._device, self._dtype = torch.device(device), dtype
        self._texts.clear()

    def enable_checkpointing(self) -> None:
        recompute_layers(self._loaded().model.network)

    def output(self, cosines: Tensor) -> RewardOutput:
        raw = self.scale * cosines
        return RewardOutput(raw / self.divisor, components={"raw": raw})


class _OpenClipForm(nn.Module):
    """A transformers CLIPModel under the two names that CLIPScore calls."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.network.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.network.get_text_features(input_ids=tokens).pooler_output
