"""Shared material: batches of random images, and a genuine open_clip network small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rewards import RewardBatch


@pytest.fixture
def make_batch() -> Callable[..., RewardBatch]:
    def make(size: int, height: int = 16, width: int = 16, seed: int = 0, **changes: Any) -> RewardBatch:
        generator = torch.Generator().manual_seed(seed)
        values: dict[str, Any] = {
            "images": torch.rand(size, 3, height, width, generator=generator),
            "prompts": [f"prompt {i}" for i in range(size)],
            "metadata": [{"row": i} for i in range(size)],
            "group_ids": torch.arange(size) // 2,
        }
        return RewardBatch(**(values | changes))

    return make


@pytest.fixture
def smooth_images() -> Callable[..., torch.Tensor]:
    """Makes (3, 3, height, width) of the 256 levels of a file: smooth, so that resizing does not only filter noise."""

    def make(height: int, width: int, grid: tuple[int, int] = (6, 5)) -> torch.Tensor:
        noise = torch.rand(3, 3, *grid, generator=torch.Generator().manual_seed(5))
        smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear").clamp(0, 1)
        return smooth.mul(255).round().div(255)

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of one token per word: building a network with CLIP's own 49,408 entries takes most of a test."""
    words = ["<pad>", "<unk>", "a", "blue", "circle", "left", "of", "red", "ring", "square", "star", "two"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_config(tokenizer_folder) -> dict[str, Any]:
    """The architecture of a network of 2 + 2 layers for 32 x 32 pixels."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {
            "context_length": 8,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "vocab_size": 12,
            "pool_type": "last",
            "hf_tokenizer_name": str(tokenizer_folder),
        },
    }
