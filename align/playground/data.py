"""Pre-training data of the playground: images, captions as token ids, and latents, kept as memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.playground.captions import caption
from align.playground.components import LATENT_CHANNELS, LATENT_SIZE, MAX_TOKENS, build_tokenizer, token_ids
from align.playground.scenes import SIZE, render, sample_scene

CAPTIONS_PER_SCENE = 3


def write_arrays(folder: Path, count: int) -> None:
    """Create empty arrays: images (N,64,64,3) uint8, ids (N,3,16) int16, latents (N,4,16,16) float32."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {
        "images": ((count, SIZE, SIZE, 3), np.uint8),
        "ids": ((count, CAPTIONS_PER_SCENE, MAX_TOKENS), np.int16),
        "latents": ((count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), np.float32),
    }
    for name, (shape, dtype) in shapes.items():
        path = folder / f"{name}.npy"
        if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()


def open_array(folder: Path, name: str, mode: Any = "r") -> np.ndarray:
    """One of the arrays of `write_arrays`, memory-mapped."""
    return np.load(folder / f"{name}.npy", mmap_mode=mode)


def fill_scenes(folder: Path, rows: range, seed: int) -> Iterator[int]:
    """Render the scenes of `rows` with seen pairs only and write their captions' ids; yields each finished row.

    A row depends on (seed, row) alone, so any split of the work gives the same data.
    """
    images, ids = open_array(folder, "images", "r+"), open_array(folder, "ids", "r+")
    tokenizer = build_tokenizer()
    for row in rows:
        rng = np.random.default_rng([seed, row])
        scene = sample_scene(rng)
        images[row] = render(scene)
        texts = [caption(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
        ids[row] = token_ids(tokenizer, texts).numpy()
        yield row


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 images (B,64,64,3) to float32 (B,3,64,64) in [-1, 1], contiguous."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(127.5).sub_(1.0)


def epoch_rows(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Row numbers (batch,) of a step: consecutive pieces of a fresh permutation of all rows each epoch."""
    per_epoch = count // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 77, epoch]).permutation(count)
    return order[place * batch : (place + 1) * batch]
