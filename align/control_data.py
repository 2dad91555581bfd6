"""Real images with a condition: what the condition-consistency loop trains on, from files or from playground scenes."""

from __future__ import annotations

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
from align.playground.scenes import SIZE, render
from align.prompts import Prompt
from align.real_images import fitted, fitted_labels, read_picture

LINE = '{"prompt": ..., "image": "photo.png", "condition": "map.png", "labels": "labels.png"}'
CHECKED = 64


@dataclass
class Examples:
    """B images (B, 3, S, S) and condition images (B, 3, S, S) in [0, 1], and labels int64 (B, S, S) where asked for."""

    images: Tensor
    conditions: Tensor
    labels: Tensor | None


def load_examples(prompts: Sequence[Prompt], side: int, labelled: bool) -> Examples:
    """The examples of `prompts`, resized and cropped to `side`. Raises: UserError for what is not there or unreadable."""
    images, labels = torch.cat([_image(prompt, side) for prompt in prompts]), None
    if labelled:
        labels = torch.from_numpy(np.stack([_needed_labels(prompt, side) for prompt in prompts])).long()
    return Examples(images, load_conditions(prompts, side), labels)


def load_conditions(prompts: Sequence[Prompt], side: int) -> Tensor:
    """Condition images (B, 3, side, side) in [0, 1]. Raises: UserError as `load_examples`."""
    return torch.cat([_condition(prompt, side) for prompt in prompts])


def labels_of(metadata: Mapping[str, Any] | None, side: int) -> np.ndarray | None:
    """Labels uint8 (side, side) of a prompt, or None if it has none.

    Raises: UserError for a file that cannot be read or is no map of labels.
    """
    metadata = metadata or {}
    if "scene" in metadata:
        labels = label_map(scene_of(dict(metadata)))
    elif "labels" in metadata:
        labels = _read_labels(str(metadata["labels"]))
    else:
        return None
    return labels if labels.shape == (side, side) else fitted_labels(torch.from_numpy(labels), side).numpy()


def check_examples(prompts: Sequence[Prompt], classes: int, side: int, what: str) -> None:
    """Raises: UserError, one line, unless every prompt has an image and a condition, and the labels that `classes` need.

    classes: of network D, 0 if no labels are needed. Label files are read of the first prompts only. what: the setting
    that names the prompts.
    """
    needed = ("condition", "labels")[: 1 + bool(classes)]
    for number, prompt in enumerate(prompts):
        files = {"image": prompt.image, **{key: prompt.metadata.get(key) for key in needed}}
        lacking = [key for key, file in files.items() if not file]
        if "scene" not in prompt.metadata and lacking:
            raise UserError(
                f"{what}: condition_consistency needs a real image with its condition, and '{prompt.text}' has no "
                f"{', '.join(lacking)}; use a .jsonl of lines {LINE}, or playground:train_scenes"
            )
        for file in files.values():
            if "scene" not in prompt.metadata and not Path(str(file)).is_file():
                raise UserError(f"{what}: there is no file {file} (of '{prompt.text}')")
        if classes and number < CHECKED:
            check_labels(_needed_labels(prompt, side), classes, prompt)


def check_labels(labels: np.ndarray | Tensor, classes: int, prompt: Prompt) -> None:
    """Raises: UserError if a label is none of the network's `classes` and not IGNORE."""
    values = np.unique(np.asarray(labels))
    wrong = [int(v) for v in values if v >= classes and v != IGNORE]
    if wrong:
        raise UserError(
            f"consistency.network: it knows the classes 0 to {classes - 1}, and the labels of '{prompt.text}' hold "
            f"{', '.join(map(str, wrong))}; give a network of these classes, or label what it does not know {IGNORE}"
        )


def _image(prompt: Prompt, side: int) -> Tensor:
    if "scene" in prompt.metadata:
        return _pixels(render(scene_of(prompt.metadata)), side)
    return fitted(read_picture(str(prompt.image)), side)


def _condition(prompt: Prompt, side: int) -> Tensor:
    if "scene" in prompt.metadata:
        return _pixels(condition_image(label_map(scene_of(prompt.metadata))), side)
    if "condition" not in prompt.metadata:
        raise UserError(f"prompts: '{prompt.text}' has no condition image; use a .jsonl of lines {LINE}")
    return fitted(read_picture(str(prompt.metadata["condition"])), side)


def _needed_labels(prompt: Prompt, side: int) -> np.ndarray:
    labels = labels_of(prompt.metadata, side)
    if labels is None:
        raise UserError(f"prompts: '{prompt.text}' has no label map; use a .jsonl of lines {LINE}")
    return labels


def _pixels(image: np.ndarray, side: int) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().unsqueeze(0) / 255
    return pixels if side == SIZE else fitted(pixels, side)


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
