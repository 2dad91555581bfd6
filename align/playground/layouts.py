"""Layouts of playground scenes: which pixel belongs to which shape, as a label map, a condition image and a reading.

A layout says shapes, places and sizes; colours are left to the prompt.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from align.playground.captions import caption, spec_of
from align.playground.reader import read_shapes
from align.playground.scenes import SHAPES, SIZE, Obj, Scene, sample_scene, signed_distance
from rewards.base import Reward, RewardBatch, RewardOutput, to_uint8

CLASSES: tuple[str, ...] = ("background", *SHAPES)
IGNORE = 255
"""Label of pixels that count nowhere."""
# Colours of the condition image, one a class; none is a colour that objects have.
PALETTE = np.array(
    [(0, 0, 0), (255, 128, 160), (96, 255, 224), (160, 96, 96), (255, 255, 255), (96, 128, 160)], np.uint8
)

# name of a prompt source -> (key of its random stream, whether its scenes have a held-out pair)
SCENE_SPLITS: dict[str, tuple[int, bool]] = {
    "train_scenes": (0, False),
    "seen_scenes": (1, False),
    "heldout_scenes": (2, True),
}
DEFAULT_SCENES = {"train_scenes": 4096, "seen_scenes": 256, "heldout_scenes": 256}


def label_map(scene: Scene) -> np.ndarray:
    """Class of every pixel centre, uint8 (64, 64): 0 outside all objects, 1 + the place in SHAPES inside one."""
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for o in scene.objects:
        a = o.aspect**0.5
        x, y = (centres[None, :] - o.x) / (o.size * a), (centres[:, None] - o.y) * a / o.size
        labels[signed_distance(o.shape, x, y) < 0] = 1 + SHAPES.index(o.shape)
    return labels


def condition_image(labels: np.ndarray) -> np.ndarray:
    """The layout as a picture: labels (..., H, W) to uint8 (..., H, W, 3) in the classes' colours; ignored pixels black."""
    return PALETTE[np.where(labels < len(CLASSES), labels, 0)]


def scene_of(metadata: dict[str, Any]) -> Scene:
    """The scene that a prompt of `scene_prompts` holds."""
    data = dict(metadata["scene"])
    data["objects"] = tuple(Obj(**o | {"tint": tuple(o["tint"])}) for o in data["objects"])
    return Scene(**data | {key: tuple(data[key]) for key in ("background", "slope")})


def scene_prompts(split: str, n: int | None = None) -> list[dict[str, Any]]:
    """Prompts with a scene each: `[{"prompt": str, "metadata": {**spec, "scene": {...}}}, ...]`.

    split: a key of SCENE_SPLITS; a scene depends on the split and its place alone, and no two splits share one.
    """
    stream, held_out = SCENE_SPLITS[split]
    rows = []
    for place in range(DEFAULT_SCENES[split] if n is None else n):
        rng = np.random.default_rng([5077, stream, place])
        scene = sample_scene(rng, held_out=held_out)
        rows.append({"prompt": caption(scene, rng), "metadata": {**spec_of(scene), "scene": asdict(scene)}})
    return rows


def mean_iou(found: np.ndarray, wanted: np.ndarray, ignore: int = IGNORE) -> float:
    """Mean over the classes that either map holds of intersection over union; maps of equal shape, in [0, 1].

    Pixels where `wanted` is `ignore` count nowhere; NaN if there are no others.
    """
    valid = wanted != ignore
    found, wanted = found[valid], wanted[valid]
    scores = []
    for c in np.union1d(found, wanted):
        a, b = found == c, wanted == c
        scores.append((a & b).sum() / (a | b).sum())
    return float(np.mean(scores)) if scores else float("nan")


def pixels_of(images: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [0, 1] as the reader takes them: uint8 (B, 64, 64, 3), resized by area."""
    images = torch.nan_to_num(images.detach().float())
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="area")
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


class LayoutReward(Reward):
    """Mean IoU, in [0, 1], of the layout that the exact reader finds in an image and the layout of the prompt's scene.

    An object whose shape cannot be read belongs to no class, so it counts against the class it should have. A prompt
    without a scene has no score.
    """

    name = "layout"
    uses_prompt = False
    max_batch = 256

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores (B,) in [0, 1], NaN where the metadata hold no scene."""
        found = read_shapes(pixels_of(batch.images))
        scores = torch.full((len(batch),), torch.nan)
        for i, metadata in enumerate(batch.metadata):
            if metadata and "scene" in metadata:
                scores[i] = mean_iou(found[i], label_map(scene_of(metadata)))
        return RewardOutput(scores)
