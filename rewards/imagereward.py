"""ImageReward v1.0: BLIP ViT-L with an image-grounded text encoder and a linear head (arXiv 2304.05977)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput
from rewards.blip import load_blip
from rewards.preprocess import preprocess
from rewards.weights import (
    CLIP_MEAN,
    CLIP_STD,
    find_file,
    linear_head,
    load_tensors,
    load_tokenizer,
    loading,
    recompute_layers,
)

REPOSITORY = "THUDM/ImageReward"
TOKENIZER = "bert-base-uncased"
TEXT_LENGTH = 35
"""Tokens of a prompt, with its start and end; longer prompts are cut, as in training."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data."""


class ImageReward(Reward):
    """Standardised preference for an image given its own prompt, differentiable: -2.3 to 2 for usual images."""

    name = "imagereward"
    differentiable = True

    def __init__(self, path: str = REPOSITORY, tokenizer: str = TOKENIZER) -> None:
        """path: ImageReward.pt, a folder with it, or a hub id; tokenizer: folder or hub id of bert-base-uncased."""
        self.path, self.tokenizer_name = path, tokenizer
        self.vision: Any = None
        self.text: Any = None
        self.head: nn.Sequential | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the networks in `dtype`; the head stays in float32. Raises RewardError if something is missing."""
        from transformers import BertTokenizer

        with loading(self.name):
            file = find_file(self.path, "ImageReward.pt", f"https://huggingface.co/{REPOSITORY}")
            tensors = load_tensors(file)
            try:
                head = linear_head(tensors, "mlp.layers.", (0, 2, 4, 6, 7))
                vision, text = load_blip(tensors)
            except RewardError as error:
                raise RewardError(f"{file}: {error}") from error
            self.tokenizer = load_tokenizer(BertTokenizer, self.tokenizer_name, "tokenizer")
        self.vision, self.text = vision.to(device, dtype), text.to(device, dtype)
        self.head = head.to(device, torch.promote_types(dtype, torch.float32))
        self._device, self._dtype = torch.device(device), dtype

    def enable_checkpointing(self) -> None:
        # The text encoder sees 35 tokens only and cannot recompute in transformers.
        self._loaded()
        recompute_layers(self.vision)

    def score(self, batch: RewardBatch) -> RewardOutput:
        return RewardOutput(self.rate(batch.images, batch.prompts).float())

    def rate(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) of each image with its own prompt, in float32 or, if so set up, float64."""
        head = self._loaded()
        size = self.vision.config.image_size
        pixels = preprocess(images.to(self._device), (size, size), CLIP_MEAN, CLIP_STD).to(self._dtype)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        ).to(self._device)
        # Without a mask of the encoder every text token sees every patch.
        hidden = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
        ).last_hidden_state
        features = hidden[:, 0].to(torch.promote_types(self._dtype, torch.float32))
        return standardise(head(features).squeeze(-1))

    def _loaded(self) -> nn.Sequential:
        if self.head is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        return self.head


def standardise(output: Tensor) -> Tensor:
    """The head's output in standard deviations of the authors' data; any shape."""
    return (output - MEAN) / STD
