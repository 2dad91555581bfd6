"""Real images with a condition: what the condition-consistency loop trains on, from files or from playground scenes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align.control_loss import IGNORE
from align.errors import UserError
from align.playground.layouts import condition_image, label_map, scene_of
from align.playground.scenes import render
from align.prompts import Prompt
from align.real_images import fitted, fitted_labels, read_picture

LINE = '{"prompt": ..., "image": "photo.png", "condition": "map.png", "labels": "labels.png"}'
CHECKED = 64
SKEW = 0.02
"""How far the aspect ratios of an image and its condition may be apart: a rounded side, no more."""


@dataclass
class Examples:
    """B images (B, 3, S, S) and condition images (B, 3, S, S) in [0, 1], and labels int64 (B, S, S) where asked for."""

    images: Tensor
    conditions: Tensor
    labels: Tensor | None


def load_examples(prompts: Sequence[Prompt], side: int, labelled: bool) -> Examples:
    """The examples of `prompts`, resized and cropped to `side`.

    Raises: UserError for what is not there, unreadable, or of another shape than its image.
    """
    rows = [_read(prompt, labelled) for prompt in prompts]
    images = torch.cat([fitted(image, side) for image, _, _ in rows])
    conditions = torch.cat([fitted(condition, side) for _, condition, _ in rows])
    labels = [fitted_labels(found, side) for _, _, found in rows if found is not None]
    return Examples(images, conditions, torch.stack(labels).long() if labelled else None)


def load_conditions(prompts: Sequence[Prompt], side: int) -> Tensor:
    """Condition images (B, 3, side, side) in [0, 1]. Raises: UserError as `load_examples`."""
    return torch.cat([fitted(_condition(prompt), side) for prompt in prompts])


def labels_of(metadata: Mapping[str, Any] | None, side: int) -> np.ndarray | None:
    """Labels uint8 (side, side) of a prompt, or None if it has none.

    Raises: UserError for a file that cannot be read or is no map of labels.
    """
    labels = _labels(metadata or {})
    return None if labels is None else fitted_labels(torch.from_numpy(labels), side).numpy()


def check_examples(prompts: Sequence[Prompt], classes: int, what: str) -> None:
    """Raises: UserError, one line, unless every prompt has an image and a condition, and the labels that `classes` need.

    classes: of network D, 0 if no labels are needed. What files hold is looked at for CHECKED prompts, evenly spread. what:
    the setting that names the prompts.
    """
    needed = ("condition", "labels")[: 1 + bool(classes)]
    for prompt in prompts:
        files = {"image": prompt.image, **{key: prompt.metadata.get(key) for key in needed}}
        lacking = [key for key, file in files.items() if not file]
        if "scene" not in prompt.metadata and lacking:
            raise UserError(
                f"{what}: condition_consistency needs a real image with its condition, and '{prompt.text}' has no "
                f"{', '.join(lacking)}; use a .jsonl of lines {LINE}, or playground:train_scenes"
            )
        _check_files(prompt, list(files.values()), what)
    for prompt in prompts[:: math.ceil(len(prompts) / CHECKED)]:
        labels = _read(prompt, bool(classes))[2]
        if labels is not None:
            check_labels(labels, classes, prompt)


def check_conditions(prompts: Sequence[Prompt], what: str) -> None:
    """Raises: UserError, one line, unless every prompt has a condition image that can be read. what: as in `check_examples`.

    All are read, and by every process: one that failed alone would leave the others waiting for its scores.
    """
    for prompt in prompts:
        file = prompt.metadata.get("condition")
        if "scene" not in prompt.metadata and not file:
            raise UserError(
                f"{what}: a ControlNet follows condition images, and '{prompt.text}' has none; use a .jsonl of lines "
                '{"prompt": ..., "condition": "map.png"}, or playground:heldout_scenes'
            )
        _check_files(prompt, [file], what)
        _condition(prompt)


def _check_files(prompt: Prompt, files: Sequence[Any], what: str) -> None:
    for file in files:
        if "scene" not in prompt.metadata and not Path(str(file)).is_file():
            raise UserError(f"{what}: there is no file {file} (of '{prompt.text}')")


def check_labels(labels: np.ndarray | Tensor, classes: int, prompt: Prompt) -> None:
    """Raises: UserError if a label is none of the network's `classes` and not IGNORE."""
    values = np.unique(np.asarray(labels))
    wrong = [int(v) for v in values if v >= classes and v != IGNORE]
    if wrong:
        raise UserError(
            f"consistency.network: it knows the classes 0 to {classes - 1}, and the labels of '{prompt.text}' hold "
            f"{', '.join(map(str, wrong))}; give a network of these classes, or label what it does not know {IGNORE}"
        )


def _read(prompt: Prompt, labelled: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image and condition (1, 3, H, W) in [0, 1] and, where asked for, labels uint8 (H, W), each as large as it is."""
    scene = "scene" in prompt.metadata
    image = _pixels(render(scene_of(prompt.metadata))) if scene else read_picture(str(prompt.image))
    condition, labels = _condition(prompt), None
    _check_shape(prompt, "condition", condition, image)
    if labelled:
        found = _labels(prompt.metadata)
        if found is None:
            raise UserError(f"prompts: '{prompt.text}' has no label map; use a .jsonl of lines {LINE}")
        labels = torch.from_numpy(found)
        _check_shape(prompt, "label map", labels, image)
    return image, condition, labels


def _check_shape(prompt: Prompt, what: str, pixels: Tensor, image: Tensor) -> None:
    """Raises: UserError unless cutting both to a square leaves the same piece of them."""
    (high, wide), (own_high, own_wide) = image.shape[-2:], pixels.shape[-2:]
    if abs(own_wide * high - wide * own_high) > SKEW * wide * own_high:
        raise UserError(
            f"prompts: the image of '{prompt.text}' is {wide} x {high} and its {what} {own_wide} x {own_high}: cut to a square "
            "they would not lie on each other; resize it to the image's shape"
        )


def _condition(prompt: Prompt) -> Tensor:
    if "scene" in prompt.metadata:
        return _pixels(condition_image(label_map(scene_of(prompt.metadata))))
    if "condition" not in prompt.metadata:
        raise UserError(f"prompts: '{prompt.text}' has no condition image; use a .jsonl of lines {LINE}")
    return read_picture(str(prompt.metadata["condition"]))


def _labels(metadata: Mapping[str, Any]) -> np.ndarray | None:
    if "scene" in metadata:
        return label_map(scene_of(dict(metadata)))
    return _read_labels(str(metadata["labels"])) if "labels" in metadata else None


def _pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().unsqueeze(0) / 255


def _read_labels(path: str) -> np.ndarray:
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                raise UserError(
                    f"prompts: {path} is no label map: use a PNG of one channel (mode L or P), got {file.mode}"
                )
            return np.array(file, np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"prompts: the label map {path} cannot be read ({problem})") from problem
