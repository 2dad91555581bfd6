"""How good a proxy reward is: which differences of captions it sees, and how far it agrees with the verifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.playground.captions import caption, has_held_out_pair, prompts, spec_of
from align.playground.data import to_tensor
from align.playground.scenes import COLORS, SHAPES, Scene, render, sample_scene
from rewards.base import to_uint8
from rewards.clip import CLIPScore

BASE = Path(__file__).parent / "weights"
KINDS: tuple[str, ...] = ("color", "shape", "count", "swap", "relation")
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_CATEGORIES = {"count": ("count",), "swap": ("two", "relation"), "relation": ("relation",)}


def assess(folder: Path, pairs: int = 1000, groups: int = 64, size: int = 8) -> dict[str, Any]:
    """Figures of the network in an open_clip folder: `pair_accuracy` and `agreement` (see the functions of that name).

    Images of the base model: `groups` prompts of each test split with `size` images, 10 steps, no guidance.
    """
    from align.playground.assess import generate, load_pipeline
    from align.playground.verifier import verify_batch

    proxy = CLIPScore(model=str(folder))
    proxy.setup(torch.device("cpu"), torch.float32)
    accuracy: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        images, right, wrong = caption_pairs(kind, pairs, np.random.default_rng([23, KINDS.index(kind)]))
        for look, pixels in (("render", images), ("autoencoder", round_trip(images))):
            value = pair_accuracy(proxy, unit_pixels(pixels), right, wrong)
            accuracy.setdefault(look, {})[kind] = round(value, 3)

    pipe = load_pipeline(BASE)
    agreements = {}
    for split in ("seen_test", "heldout_test"):
        rows = [row for row in prompts(split, groups) for _ in range(size)]
        texts = [row["prompt"] for row in rows]
        generated = generate(pipe, texts, list(range(len(texts))), 10, 1.0)
        gold = torch.tensor([v.graded for v in verify_batch(generated, [row["metadata"] for row in rows])])
        agreements[split] = agreement(_scores(proxy, unit_pixels(generated), texts), gold, size)
    return {"pair_accuracy": accuracy, "agreement": agreements}


@torch.no_grad()
def round_trip(images: np.ndarray) -> np.ndarray:
    """uint8 images (N, 64, 64, 3) through the shipped autoencoder and back."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(BASE, subfolder="vae").eval()
    decoded = np.empty_like(images)
    for low in range(0, len(images), 64):
        pixels = to_tensor(images[low : low + 64])
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        decoded[low : low + 64] = to_uint8(back / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    return decoded


def unit_pixels(images: np.ndarray) -> Tensor:
    """uint8 images (N, 64, 64, 3) to float32 (N, 3, 64, 64) in [0, 1]."""
    return to_tensor(images) / 2 + 0.5


def caption_pairs(kind: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str], list[str]]:
    """Renders uint8 (N, 64, 64, 3), their captions, and captions that are wrong in one way, alike in wording.

    kind: "color" or "shape" (of one object, or of all that are counted), "count", "swap" (two objects exchange their
    colours) or "relation" (its opposite). Neither caption names a held-out pair.
    """
    images: list[np.ndarray] = []
    right: list[str] = []
    wrong: list[str] = []
    while len(images) < count:
        categories = _CATEGORIES.get(kind)
        category = None if categories is None else categories[int(rng.integers(len(categories)))]
        scene = sample_scene(rng, category=category)
        other = _altered(kind, scene, rng)
        named = {o.pair for o in other.objects}
        distinct = 1 if other.category == "count" else len(other.objects)
        if len(named) != distinct or has_held_out_pair(spec_of(other)) or spec_of(other) == spec_of(scene):
            continue
        wording = int(rng.integers(1 << 31))
        images.append(render(scene))
        right.append(caption(scene, np.random.default_rng(wording)))
        wrong.append(caption(other, np.random.default_rng(wording)))
    return np.stack(images), right, wrong


def _altered(kind: str, scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene that the wrong caption describes; it may coincide with a scene that has to be refused."""
    objects = scene.objects
    if kind == "relation":
        return replace(scene, relation=_OPPOSITE[str(scene.relation)])
    if kind == "count":
        return replace(scene, objects=objects[:1] * int(rng.integers(2, 5)))
    if kind == "swap":
        a, b = objects
        return replace(scene, objects=(replace(a, color=b.color), replace(b, color=a.color)))
    color, shape = tuple(COLORS)[int(rng.integers(len(COLORS)))], SHAPES[int(rng.integers(len(SHAPES)))]
    chosen = range(len(objects)) if scene.category == "count" else (int(rng.integers(len(objects))),)
    return replace(
        scene,
        objects=tuple(
            o if i not in chosen else replace(o, color=color) if kind == "color" else replace(o, shape=shape)
            for i, o in enumerate(objects)
        ),
    )


def pair_accuracy(proxy: CLIPScore, images: Tensor, right: list[str], wrong: list[str]) -> float:
    """Share of images (N, 3, H, W) in [0, 1] for which the right caption scores above the wrong one; chance is 0.5."""
    return float((_scores(proxy, images, right) > _scores(proxy, images, wrong)).float().mean())


@torch.no_grad()
def _scores(proxy: CLIPScore, images: Tensor, texts: list[str]) -> Tensor:
    step = 256
    parts = [proxy.similarity(images[i : i + step], texts[i : i + step]) for i in range(0, len(texts), step)]
    return torch.cat(parts)


def agreement(scores: Tensor, gold: Tensor, size: int) -> dict[str, float]:
    """How a proxy orders the images of each prompt, against a gold reward; both (N,), groups of `size` in a row.

    concordance: share of the pairs in a group with unequal gold that the proxy orders alike, chance 0.5.
    gold_mean, gold_of_best, gold_best: mean gold of all images, of each group's best by the proxy, and of its best.
    """
    s, g = scores.double().view(-1, size), gold.double().view(-1, size)
    ds, dg = s[:, :, None] - s[:, None, :], g[:, :, None] - g[:, None, :]
    unequal = dg > 1e-9
    figures = {
        "concordance": (ds[unequal] > 0).double().mean(),
        "gold_mean": g.mean(),
        "gold_of_best": g.gather(1, s.argmax(1, keepdim=True)).mean(),
        "gold_best": g.amax(1).mean(),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}
