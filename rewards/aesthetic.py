"""Aesthetic predictors: a linear head on a frozen image embedding, blind to the prompt, differentiable.

`aesthetic` is LAION's "improved aesthetic predictor" (LAION-5B, arXiv 2210.08402), `aesthetic_v25` its successor on SigLIP.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput
from rewards.preprocess import preprocess
from rewards.weights import (
    CLIP_MEAN,
    CLIP_STD,
    find_file,
    linear_head,
    load_pretrained,
    load_tensors,
    loading,
    recompute_layers,
)

# A copy of the authors' file on the hub; their own repository is not on it.
HEAD_REPOSITORY = "camenduru/improved-aesthetic-predictor"
CLIP_REPOSITORY = "openai/clip-vit-large-patch14"
SIGLIP_REPOSITORY = "google/siglip-so400m-patch14-384"


class _HeadOnBackbone(Reward):
    """Image -> embedding of unit norm -> linear layers -> one number, 1 to 10 by training."""

    differentiable = True
    uses_prompt = False

    head_file: str
    page: str
    prefix: str
    """Of the names of the head's tensors."""
    indices: tuple[int, ...]
    """Of the linear layers among the layers of the head, dropout included."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: Literal["shortest", "squash"]

    def __init__(self, path: str, backbone: str) -> None:
        """path: the head's file, a folder with it, or a hub id; backbone: folder or hub id of the image network."""
        self.path, self.backbone = path, backbone
        self.network: Any = None
        self.head: nn.Sequential | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the backbone in `dtype`; the head stays in float32. Raises RewardError if something is missing."""
        with loading(self.name):
            file = find_file(self.path, self.head_file, self.page)
            try:
                head = linear_head(load_tensors(file), self.prefix, self.indices)
            except RewardError as error:
                raise RewardError(f"{file}: {error}") from error
            network, width = self._load_backbone(dtype)
            wanted = head[0].in_features
            if width != wanted:
                raise RewardError(f"{self.backbone} gives {width} features, the head {file} takes {wanted}")
        self.network = network.to(device)
        self.head = head.to(device, torch.promote_types(dtype, torch.float32))
        self._device, self._dtype = torch.device(device), dtype

    def enable_checkpointing(self) -> None:
        recompute_layers(self._loaded()[0])

    def score(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(self.rate(batch.images).float())

    def rate(self, images: Tensor) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], in float32 or, if so set up, float64."""
        network, head = self._loaded()
        size = self._image_size()
        pixels = preprocess(images.to(self._device), (size, size), self.mean, self.std, self.resize_mode)
        features = self._embed(network, pixels.to(self._dtype))
        features = features.to(torch.promote_types(self._dtype, torch.float32))
        return head(F.normalize(features, dim=-1)).squeeze(-1)

    def _loaded(self) -> tuple[Any, nn.Sequential]:
        if self.head is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        return self.network, self.head

    def _load_backbone(self, dtype: torch.dtype) -> tuple[Any, int]:
        """The image network on the CPU and the width of its embedding."""
        raise NotImplementedError

    def _image_size(self) -> int:
        raise NotImplementedError

    def _embed(self, network: Any, pixels: Tensor) -> Tensor:
        """Embeddings (B, D), not normalised, of pixels (B, 3, size, size)."""
        raise NotImplementedError


class AestheticScore(_HeadOnBackbone):
    """LAION's predictor on OpenAI's CLIP ViT-L-14: 4.5 to 7 for usual images."""

    name = "aesthetic"
    head_file = "sac+logos+ava1-l14-linearMSE.pth"
    page = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    prefix, indices = "layers.", (0, 2, 4, 6, 7)
    mean, std, resize_mode = CLIP_MEAN, CLIP_STD, "shortest"

    def __init__(self, path: str = HEAD_REPOSITORY, backbone: str = CLIP_REPOSITORY) -> None:
        """path: the head's file, a folder with it, or a hub id; backbone: folder or hub id of a transformers CLIPModel."""
        super().__init__(path, backbone)

    def _load_backbone(self, dtype: torch.dtype) -> tuple[Any, int]:
        from transformers import CLIPModel

        network = load_pretrained(CLIPModel, self.backbone, "backbone", dtype)
        del network.text_model
        return network, network.config.projection_dim

    def _image_size(self) -> int:
        return self.network.config.vision_config.image_size

    def _embed(self, network: Any, pixels: Tensor) -> Tensor:
        return network.get_image_features(pixel_values=pixels).pooler_output


class AestheticV25(_HeadOnBackbone):
    """Aesthetic predictor v2.5 on SigLIP so400m at 384 pixels: 3 to 7 for usual images, 5.5 and more is called great.

    Its head is published under AGPL-3.0 and never part of this library: `path` must name your own copy.
    """

    name = "aesthetic_v25"
    max_batch = 32
    head_file = "aesthetic_predictor_v2_5.pth"
    page = "https://github.com/discus0434/aesthetic-predictor-v2-5"
    prefix, indices = "scoring_head.", (0, 2, 4, 6, 8)
    mean, std, resize_mode = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash"

    def __init__(self, path: str, backbone: str = SIGLIP_REPOSITORY) -> None:
        """path: the head's file or a folder with it; backbone: folder or hub id of a transformers SigLIP."""
        super().__init__(path, backbone)

    def _load_backbone(self, dtype: torch.dtype) -> tuple[Any, int]:
        from transformers import SiglipVisionModel

        network = load_pretrained(SiglipVisionModel, self.backbone, "backbone", dtype)
        return network, network.config.hidden_size

    def _image_size(self) -> int:
        return self.network.config.image_size

    def _embed(self, network: Any, pixels: Tensor) -> Tensor:
        return network(pixel_values=pixels).pooler_output
