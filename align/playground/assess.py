"""How good a shipped pipeline is: verifier scores on seen and held-out prompts, a grid of pictures, a card."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from align.playground.captions import prompts
from align.playground.scenes import render, sample_scene
from align.playground.train_vae import bar
from align.playground.verifier import verify_batch


class Setting(NamedTuple):
    """How to sample: Euler or DDIM steps, guidance scale and, for DDIM alone, its noise (eta in [0, 1])."""

    steps: int
    guidance: float
    eta: float | None = None

    def __str__(self) -> str:
        name = f"T={self.steps} CFG={self.guidance:g}"
        return name if self.eta is None else f"{name} eta={self.eta:g}"


# By the pipeline's class; the first is what reinforcement learning samples with.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "StableDiffusion3Pipeline": (Setting(10, 1.0), Setting(10, 3.0), Setting(28, 4.0)),
    "StableDiffusionPipeline": (
        Setting(20, 1.0, 0.0),
        Setting(10, 1.0, 0.0),
        Setting(20, 3.0, 0.0),
        Setting(10, 3.0, 0.0),
        Setting(40, 3.0, 0.0),
        Setting(20, 1.0, 1.0),
        Setting(10, 1.0, 1.0),
    ),
}
SPLITS: tuple[str, ...] = ("seen_test", "heldout_test")


def load_pipeline(folder: Path | str) -> Any:
    """The pipeline of a folder in float32, without a T5 encoder and without its progress bar."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

    name = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
    if name == "StableDiffusionPipeline":
        pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    else:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings_of(pipe: Any) -> tuple[Setting, ...]:
    """The settings that a pipeline is assessed in."""
    return SETTINGS[type(pipe).__name__]


def generate(
    pipe: Any, texts: list[str], seeds: list[int], steps: int, guidance: float, eta: float | None = None
) -> np.ndarray:
    """Images uint8 (N, 64, 64, 3), one for each text, from noise that depends on its seed alone.

    eta: the noise of DDIM in [0, 1], of the Stable Diffusion pipeline alone.
    """
    extra = {"max_sequence_length": 0} if eta is None else {"eta": eta}
    images = []
    for low in range(0, len(texts), 32):
        part = pipe(
            texts[low : low + 32],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[low : low + 32]],
            output_type="np",
            **extra,
        ).images
        images.append((part * 255).round().astype(np.uint8))
    return np.concatenate(images)


def assess_worker(rank: int, world: int, folder: str, out: str, count: int) -> None:
    """Score this process's share of `count` prompts of each split in each setting; writes out/scores-RANK.json."""
    pipe = load_pipeline(folder)
    jobs = [(split, setting) for split in SPLITS for setting in settings_of(pipe)]
    rows: list[dict[str, Any]] = []
    for split, setting in bar(jobs, rank, desc="assess"):
        picked = list(enumerate(prompts(split, count)))[rank::world]
        texts, specs = [p["prompt"] for _, p in picked], [p["metadata"] for _, p in picked]
        images = generate(pipe, texts, [i for i, _ in picked], *setting)
        for verdict, spec in zip(verify_batch(images, specs), specs, strict=True):
            rows.append(
                {
                    "setting": f"{split.removesuffix('_test')} {setting}",
                    "category": spec["category"],
                    "full": float(verdict.full),
                    "graded": verdict.graded,
                }
            )
    (Path(out) / f"scores-{rank}.json").write_text(json.dumps(rows))


def summarise(folder: Path, world: int) -> dict[str, dict[str, float]]:
    """Means over the prompts of each setting, and over each category of those at CFG 1 without noise."""
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for rank in range(world):
        for row in json.loads((folder / f"scores-{rank}.json").read_text()):
            scores = (row["full"], row["graded"])
            sums[row["setting"]].append(scores)
            if row["setting"].endswith(("CFG=1", "CFG=1 eta=0")):
                sums[f"{row['setting']} {row['category']}"].append(scores)
    return {
        name: {"n": len(rows), "full": round(float(f), 4), "graded": round(float(g), 4)}
        for name, rows in sorted(sums.items())
        for f, g in [np.mean(rows, axis=0)]
    }


@torch.no_grad()
def round_trip(vae: Any, count: int, seed: int = 1) -> float:
    """Share of fresh renders that the verifier still reads in full after the autoencoder."""
    from align.playground.captions import spec_of
    from align.playground.data import to_tensor

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out=None) for _ in range(count)]
    full = 0
    for low in range(0, count, 50):
        part = scenes[low : low + 50]
        decoded = vae.decode(vae.encode(to_tensor(np.stack([render(s) for s in part]))).latent_dist.mode()).sample
        images = decoded.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        full += sum(v.full for v in verify_batch(images, [spec_of(s) for s in part]))
    return full / count


GRID_PROMPTS: tuple[str, ...] = (
    "a red circle",
    "a green star and a purple ring",
    "three blue stars",
    "four orange circles",
    "a yellow square left of a blue triangle",
    "a purple square above a red star",
    "a blue ring, a red square and a green triangle",
    "a purple circle right of a red triangle",
)


def picture_grid(pipe: Any, columns: int = 6) -> Any:
    """A PIL image: one row of `columns` samples for each of GRID_PROMPTS (the last holds held-out pairs).

    Sampled in the first of the pipeline's settings.
    """
    from PIL import Image, ImageDraw

    side, label, scale = 64, 14, 2
    cell = side * scale + 4
    sheet = Image.new("RGB", (columns * cell, len(GRID_PROMPTS) * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    texts = [text for text in GRID_PROMPTS for _ in range(columns)]
    images = generate(pipe, texts, list(range(len(texts))), *settings_of(pipe)[0])
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = row * (cell + label)
        if column == 0:
            draw.text((4, top + 1), GRID_PROMPTS[row], fill="black")
        picture = Image.fromarray(image).resize((side * scale, side * scale), Image.Resampling.NEAREST)
        sheet.paste(picture, (column * cell + 2, top + label))
    return sheet
