"""Prompt sets and the order in which a run visits them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import UserError
from align.schema import nearest

PLAYGROUND_SPLITS = ("train", "seen_test", "heldout_test")


@dataclass(frozen=True)
class Prompt:
    """One prompt and what a reward may want to know about it."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """With the files `condition` (an image) and `labels` (a map) of the prompt's line, where a method or a reward needs them."""
    image: str | None = None
    """File of a real image of the prompt, for methods that start from one."""


def load_prompts(source: str) -> list[Prompt]:
    """Prompts of `playground:SPLIT[:COUNT]`, a .txt file (one a line, blank lines skipped) or a .jsonl file.

    Raises: UserError naming the file and line of the first mistake.
    """
    if source.startswith("playground:"):
        from align.playground.captions import prompts
        from align.playground.layouts import SCENE_SPLITS, scene_prompts

        split, _, count = source.removeprefix("playground:").partition(":")
        known = (*PLAYGROUND_SPLITS, *SCENE_SPLITS)
        if split not in known:
            raise UserError(f"prompts: no split '{split}'{nearest(split, known)}; one of {known}")
        if count and not (count.isdecimal() and int(count)):
            raise UserError(f"prompts: {source}: the number of prompts must be at least 1, got '{count}'")
        try:
            rows = (scene_prompts if split in SCENE_SPLITS else prompts)(split, int(count) if count else None)
        except ValueError as problem:
            raise UserError(f"prompts: {source}: {problem}") from problem
        return [Prompt(row["prompt"], row.get("metadata") or {}) for row in rows]
    path = Path(source)
    if not path.is_file():
        raise UserError(f"prompts: no file {source} (give a .txt, a .jsonl, or playground:train)")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise UserError(f"prompts: {source} is not UTF-8 text ({problem.reason} at byte {problem.start})") from problem
    parse = _parse_json if path.suffix == ".jsonl" else lambda line, where: Prompt(line.strip())
    found = [parse(line, f"{source}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"prompts: {source} holds no prompt")
    return found


def _parse_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as problem:
        raise UserError(f"prompts: {where}: not JSON: {problem.msg}") from problem
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'prompts: {where}: expected {{"prompt": "text", "metadata": {{...}}, "image": "file"}}')
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"prompts: {where}: metadata must be a mapping")
    files = {}
    for key in ("image", "condition", "labels"):
        name = row.get(key)
        if name is not None and not isinstance(name, str):
            raise UserError(f"prompts: {where}: {key} must be the name of a file, got {name!r}")
        if name is not None:
            files[key] = str(Path(where.rpartition(":")[0]).parent / name)
    image = files.pop("image", None)
    return Prompt(row["prompt"], {**metadata, **files}, image)


def prompt_indices(total: int, count: int, iteration: int, seed: int) -> list[int]:
    """Indices of the `count` prompts of `iteration`: consecutive pieces of one seeded permutation per epoch."""
    picked = []
    for position in range(iteration * count, (iteration + 1) * count):
        epoch, place = divmod(position, total)
        picked.append(int(_permutation(total, seed, epoch)[place]))
    return picked


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(total: int, seed: int, epoch: int) -> np.ndarray:
    key = (total, seed, epoch)
    if key not in _permutations:
        if len(_permutations) > 8:
            _permutations.clear()
        _permutations[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(total)
    return _permutations[key]
