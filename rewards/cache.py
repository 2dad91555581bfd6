"""Scores remembered between calls, for rewards that cost more than a hash of the image: services, judges, large networks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, to_uint8
from rewards.registry import RewardConfig, build_reward


@dataclass(frozen=True)
class _Entry:
    """What is known of one image."""

    score: float
    components: dict[str, float]
    uncertainty: float | None


class CachedReward(Reward):
    """Another reward whose last `size` scores are kept, the least recently used ones going first.

    The same pixels, prompt and metadata are judged once. The reward sees `to_uint8(images) / 255`, so that a score does
    not depend on which of several nearly equal images came first. A missing score is asked for again.
    """

    name = "cached"

    def __init__(self, type: str, args: dict[str, Any] | None = None, size: int = 4096) -> None:
        """type and args: the reward, as in a configuration; size: most scores that are kept."""
        if not isinstance(size, int) or size < 1:
            raise RewardError(f"size must be a positive integer, got {size!r}")
        self.inner = build_reward(type, RewardConfig(type=type, args=dict(args or {})))
        if self.inner.kind == "groupwise":
            raise RewardError(f"{type} compares whole groups, so the score of one image cannot be kept")
        if self.inner.needs_reference:
            raise RewardError(f"{type} waits for the run's base evaluation: cache its members, each on its own")
        self.size = size
        self.uses_prompt = self.inner.uses_prompt
        self.deterministic = self.inner.deterministic
        self.max_batch = self.inner.max_batch
        self._identity = json.dumps([type, args or {}], sort_keys=True).encode()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        self.inner.name = self.name  # so that its errors name the entry of the configuration
        self.inner.setup(device, dtype)
        self.uses_prompt, self.deterministic = self.inner.uses_prompt, self.inner.deterministic

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Known scores, and those of the images that are new; of equal new images one is judged."""
        pixels = to_uint8(batch.images).cpu()
        keys = [
            cache_key(self._identity, image, prompt, metadata)
            for image, prompt, metadata in zip(pixels, batch.prompts, batch.metadata, strict=True)
        ]
        with self._lock:
            found = {key: self._entries[key] for key in keys if key in self._entries}
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in found}
        if first:
            rows = torch.tensor(sorted(first.values()))
            fresh = replace(batch.select(rows), images=pixels[rows].to(batch.images.device).float().div(255))
            found |= _entries([keys[row] for row in rows.tolist()], checked_score(self.inner, fresh))
        with self._lock:
            self._remember({key: found[key] for key in keys})
        return _output([found[key] for key in keys])

    def _remember(self, used: dict[bytes, _Entry]) -> None:
        for key, entry in used.items():
            if entry.score == entry.score:
                self._entries[key] = entry
                self._entries.move_to_end(key)
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)


def cache_key(identity: bytes, pixels: Tensor, prompt: str, metadata: dict[str, Any]) -> bytes:
    """SHA-256 of a reward's identity, uint8 pixels (3, H, W), the prompt and the metadata; order of its keys is no matter."""
    about = json.dumps([list(pixels.shape), prompt, metadata], sort_keys=True).encode()
    digest = hashlib.sha256()
    for part in (identity, about, pixels.contiguous().numpy().tobytes()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _entries(keys: list[bytes], output: RewardOutput) -> dict[bytes, _Entry]:
    scores = output.scores.tolist()
    components = {name: values.tolist() for name, values in output.components.items()}
    uncertainty = None if output.uncertainty is None else output.uncertainty.tolist()
    return {
        key: _Entry(
            scores[row],
            {name: values[row] for name, values in components.items()},
            None if uncertainty is None else uncertainty[row],
        )
        for row, key in enumerate(keys)
    }


def _output(entries: list[_Entry]) -> RewardOutput:
    nan = float("nan")
    names = dict.fromkeys(name for entry in entries for name in entry.components)
    doubts = [entry.uncertainty for entry in entries]
    return RewardOutput(
        scores=torch.tensor([entry.score for entry in entries], dtype=torch.float32),
        components={name: torch.tensor([entry.components.get(name, nan) for entry in entries]) for name in names},
        uncertainty=None
        if all(doubt is None for doubt in doubts)
        else torch.tensor([nan if doubt is None else doubt for doubt in doubts]),
    )
