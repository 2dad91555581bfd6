"""Train the playground's segmentation network: `python -m align.playground.train_segmenter --out DIR`.

A tiny Segformer (arXiv 2105.15203) learns to read the layout of rendered scenes. DIR is then a folder that
`AutoModelForSemanticSegmentation.from_pretrained` loads, with its preprocessing, and its accuracy in segmenter.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.playground.layouts import CLASSES, label_map, mean_iou, scene_of, scene_prompts
from align.playground.scenes import render, sample_scene
from align.playground.train_vae import bar

STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class SegmenterRecipe:
    """Settings of the training. Every scene is drawn once; its pairs are seen ones only."""

    seed: int = 0
    steps: int = 1200
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01


def build_segmenter() -> Any:
    """An untrained Segformer of about 0.4 million parameters that halves the image's sides, from torch's random state."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        depths=[1, 1, 2, 1],
        hidden_sizes=[16, 32, 64, 96],
        num_attention_heads=[1, 1, 2, 4],
        patch_sizes=[3, 3, 3, 3],
        strides=[2, 2, 2, 2],
        sr_ratios=[8, 4, 2, 1],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=48,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def batches(recipe: SegmenterRecipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, 64, 64) in [0, 1] and labels int64 (B, 64, 64) of each step, from (seed, step) alone."""
    for step in range(recipe.steps):
        rng = np.random.default_rng([recipe.seed, 63, step])
        scenes = [sample_scene(rng) for _ in range(recipe.batch)]
        images = np.stack([render(scene) for scene in scenes])
        labels = np.stack([label_map(scene) for scene in scenes])
        yield torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels).long()


def logits_of(model: Any, images: Tensor) -> Tensor:
    """Logits (B, classes, 64, 64) of images (B, 3, 64, 64) in [0, 1]."""
    mean, std = (torch.tensor(STATISTICS[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    return F.interpolate(model((images - mean) / std).logits, images.shape[-2:], mode="bilinear", align_corners=False)


def train(recipe: SegmenterRecipe, progress: bool = True) -> tuple[Any, float]:
    """The trained network and the mean loss of its last 50 steps."""
    torch.manual_seed(recipe.seed)
    model = build_segmenter().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses: list[float] = []
    shown = bar(range(recipe.steps), 0 if progress else 1, desc="segmenter")
    for step, (images, labels) in zip(shown, batches(recipe), strict=True):
        rate = recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress:
            shown.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    return model.eval(), float(np.mean(losses[-50:]))


def save(model: Any, folder: Path) -> None:
    """Write the network in float16, with the preprocessing that transformers and the training loop read."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    processor = {"image_processor_type": "SegformerImageProcessor", "do_resize": False, "do_reduce_labels": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | STATISTICS, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


@torch.no_grad()
def assess(folder: Path, count: int = 512) -> dict[str, Any]:
    """Accuracy of the network in `folder` on renders, and after the U-Net base's autoencoder, of test scenes."""
    from diffusers import AutoencoderKL
    from transformers import AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    vae = AutoencoderKL.from_pretrained(Path(__file__).parent / "unet_weights" / "vae", torch_dtype=torch.float32)
    found: dict[str, Any] = {}
    for split in ("seen_scenes", "heldout_scenes"):
        scenes = [scene_of(row["metadata"]) for row in scene_prompts(split, count)]
        labels = np.stack([label_map(scene) for scene in scenes])
        images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
        decoded = [vae.decode(vae.encode(2 * x - 1).latent_dist.mode()).sample / 2 + 0.5 for x in images.split(64)]
        for name, pictures in (("renders", images), ("autoencoder", torch.cat(decoded).clamp(0, 1))):
            read = torch.cat([logits_of(model, x).argmax(1) for x in pictures.split(64)]).numpy()
            iou = [mean_iou(a, b) for a, b in zip(read, labels, strict=True)]
            found[f"{split}, {name}"] = {
                "n": count,
                "mean_iou": round(float(np.mean(iou)), 4),
                "pixel_accuracy": round(float((read == labels).mean()), 4),
            }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m align.playground.train_segmenter", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the network")
    parser.add_argument("--seed", type=int, default=SegmenterRecipe.seed)
    parser.add_argument("--steps", type=int, default=SegmenterRecipe.steps, help="of training")
    args = parser.parse_args()
    recipe = SegmenterRecipe(seed=args.seed, steps=args.steps)
    torch.set_num_threads(1)
    began = time.process_time()  # of this process: a machine that does other work too takes longer
    model, loss = train(recipe)
    figures = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(loss, 4),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    save(model, args.out)
    (args.out / "segmenter.json").write_text(json.dumps(figures | {"accuracy": assess(args.out)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
