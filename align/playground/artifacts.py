"""Images of the playground, clean and with drawn-in artifacts: `python -m align.playground.artifacts --out DIR`.

Writes DIR/clean and DIR/artifact, an example of what `align fit-artifact` takes. The artifacts are those that a reward
which nobody watches lets through: pasted patches, a grid, blur, noise and blotches of colour.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.grids import as_image, save_png
from align.models.base import ModelConfig, load_model
from align.playground.scenes import SIZE, render, sample_scene

EACH = 32  # images in one call of the autoencoder


def clean_images(count: int, seed: int = 0) -> Tensor:
    """(count, 3, 64, 64) float32 in [0, 1]: scenes as the playground draws them."""
    rows = [render(sample_scene(np.random.default_rng([seed, 71, i]))) for i in range(count)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255


def corrupted(images: Tensor, seed: int = 0) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], each with one artifact; the kinds take turns, everything else is drawn."""
    kinds = list(KINDS.values())
    rngs = [np.random.default_rng([seed, 72, i]) for i in range(len(images))]
    rows = [kinds[i % len(kinds)](image, rng) for i, (image, rng) in enumerate(zip(images, rngs, strict=True))]
    return torch.stack(rows).clamp(0, 1)


def pasted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """A rectangle of the image pasted elsewhere, two or three times."""
    result, (height, width) = image.clone(), image.shape[-2:]
    for _ in range(rng.integers(2, 4)):
        h, w = rng.integers(height // 5, height // 3), rng.integers(width // 5, width // 3)
        (y, to_y), (x, to_x) = rng.integers(0, height - h, 2), rng.integers(0, width - w, 2)
        piece = image[:, y : y + h, x : x + w]
        result[:, to_y : to_y + h, to_x : to_x + w] = piece.flip(-1) * 0.7 + 0.3 * float(rng.random())
    return result


def grid(image: Tensor, rng: np.random.Generator) -> Tensor:
    """A regular pattern of lines, as upsampling layers leave it."""
    period, depth = int(rng.integers(3, 7)), float(rng.uniform(0.08, 0.25))
    rows, columns = (torch.arange(n) % period == 0 for n in image.shape[-2:])
    return image + depth * (rows.unsqueeze(1) | columns).float() * float(rng.choice([-1, 1]))


def blurred(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Smeared by a box of 5 to 9 pixels."""
    size = int(rng.choice([5, 7, 9]))
    return F.avg_pool2d(image.unsqueeze(0), size, 1, size // 2, count_include_pad=False)[0]


def noisy(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Noise at each pixel."""
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape))).float()
    return image + float(rng.uniform(0.06, 0.15)) * noise


def blotched(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Soft clouds of colour."""
    clouds = torch.from_numpy(rng.standard_normal((1, 3, 5, 5))).float()
    size = (int(image.shape[-2]), int(image.shape[-1]))
    return image + float(rng.uniform(0.15, 0.3)) * F.interpolate(clouds, size=size, mode="bicubic")[0]


KINDS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "pasted": pasted,
    "grid": grid,
    "blurred": blurred,
    "noisy": noisy,
    "blotched": blotched,
}


def write_examples(folder: Path, count: int, seed: int = 0) -> None:
    """`count` images each in folder/clean and folder/artifact; they show different scenes.

    All of them go through the playground's autoencoder first, as generated images do: its own traces are no artifacts.
    """
    model = load_model(ModelConfig(path="playground", precision="fp32"), torch.device("cpu"))
    scenes = clean_images(2 * count, seed).split(EACH)
    clean, others = torch.cat([model.decode(model.encode_images(some), EACH) for some in scenes]).split(count)
    for name, images in (("clean", clean), ("artifact", corrupted(others, seed))):
        for i, image in enumerate(images):
            save_png(as_image(image), folder / name / f"{name}-{i:04d}.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m align.playground.artifacts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the images")
    parser.add_argument("--count", type=int, default=100, help=f"images of each kind, {SIZE} pixels (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and artifacts (default 0)")
    args = parser.parse_args()
    write_examples(args.out, args.count, args.seed)


if __name__ == "__main__":
    main()
