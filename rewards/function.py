"""A user's plain function as a reward."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, check_shape, wrong_dtype

_OVERRIDABLE = ("kind", "differentiable", "uses_prompt", "deterministic", "max_batch")


class FunctionReward(Reward):
    """Calls `function(images, prompts, metadata, **args)`, which returns one number per image.

    Images are (B, 3, H, W) float in [0, 1]. A list, tuple, numpy array or tensor of length B is accepted; None and NaN
    mark a missing score. Attributes set on the function (`f.differentiable = True`) override the defaults of `Reward`.
    """

    def __init__(self, name: str, function: Callable[..., Any], args: dict[str, Any] | None = None) -> None:
        self.name = name
        self.function = function
        self.args = dict(args or {})
        for attribute in _OVERRIDABLE:
            if hasattr(function, attribute):
                setattr(self, attribute, getattr(function, attribute))

    def score(self, batch: RewardBatch) -> RewardOutput:
        result = self.function(batch.images, batch.prompts, batch.metadata, **self.args)
        return RewardOutput(as_scores(self.name, result, len(batch)))


def as_scores(name: str, result: Any, size: int) -> Tensor:
    """What a user's function returned -> (size,) float32. Raises RewardError, one line, if that cannot be done."""
    if isinstance(result, list | tuple):
        if len(result) != size:
            raise RewardError(f"reward '{name}' returned {len(result)} scores for {size} images: return one per image")
        if result and all(isinstance(entry, Tensor) and entry.ndim == 0 for entry in result):
            result = torch.stack(list(result))  # keeps the gradient of a differentiable function
        else:
            return torch.tensor([_number(name, row, entry) for row, entry in enumerate(result)], dtype=torch.float32)
    if isinstance(result, np.ndarray):
        if result.dtype.kind not in "fiub":
            raise RewardError(f"reward '{name}' returned an array of {result.dtype}, expected numbers")
        result = torch.from_numpy(np.ascontiguousarray(result))
    if not isinstance(result, Tensor):
        raise RewardError(
            f"reward '{name}' returned {type(result).__name__}, expected a list or tensor of {size} numbers"
        )
    check_shape(name, "shape", result, size)
    if result.is_complex() or result.dtype in (torch.bfloat16, torch.float16):
        raise wrong_dtype(name, result)
    return result.to(torch.float32)


def _number(name: str, row: int, entry: Any) -> float:
    if entry is None:
        return float("nan")
    if isinstance(entry, numbers.Real | np.generic) or (isinstance(entry, Tensor) and entry.ndim == 0):
        return float(entry)
    raise RewardError(f"reward '{name}' returned {type(entry).__name__} as score {row}, expected a number or None")
