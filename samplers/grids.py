"""Time grids `1 >= t_0 > t_1 > ... > t_T = 0` of flow-matching samplers (t = 1 is noise, t = 0 is data).

A grid is a float32 CPU tensor of shape (T+1,) with T the number of sampling steps; step k goes from t_k to t_{k+1}.
Steps are addressed by their integer index everywhere, never by comparing times.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

GRID_KINDS = ("scheduler", "linspace_shift", "custom")


def static_shift(t: Tensor, shift: float) -> Tensor:
    """Resolution shift `s t / (1 + (s - 1) t)` of times in [0, 1], any shape; 0 and 1 stay put (arXiv 2403.03206)."""
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; use 1.0 for no shift")
    return shift * t / (1 + (shift - 1) * t)


def linspace_shift_grid(num_steps: int, shift: float = 3.0) -> Tensor:
    """Shifted uniform grid, float32 (T+1,): `linspace(1, 0, T+1)` through `static_shift` (as in arXiv 2505.07818)."""
    _check_num_steps(num_steps)
    return _checked(static_shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift))


def flux_mu(
    image_tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Shift exponent of FLUX-type schedulers: linear in the number of image tokens, through the two given points."""
    return base_shift + (max_shift - base_shift) * (image_tokens - base_tokens) / (max_tokens - base_tokens)


def scheduler_grid(scheduler: Any, num_steps: int, mu: float | None = None, uniform_base: bool | None = None) -> Tensor:
    """Grid, float32 (T+1,), that a diffusers flow-matching scheduler uses itself; the scheduler is not changed.

    `mu` is the exponent of dynamic shifting (see `flux_mu`). `uniform_base` hands the scheduler `linspace(1, 1/T, T)`,
    as the FLUX pipelines do; the default is to do so exactly when `mu` is given. Raises ValueError if the scheduler
    has no flow-matching sigmas (in [0, 1], ending in 0).
    """
    _check_num_steps(num_steps)
    name = type(scheduler).__name__
    if not hasattr(scheduler, "sigmas") or not hasattr(scheduler, "set_timesteps"):
        raise ValueError(f"{name} has no sigma table; load a flow-matching scheduler or use grid: linspace_shift")
    if scheduler.config.get("use_dynamic_shifting", False) and mu is None:
        raise ValueError(f"{name} shifts its grid with the image size: pass mu (see flux_mu)")
    scheduler = copy.deepcopy(scheduler)
    arguments: dict[str, Any] = {} if mu is None else {"mu": mu}
    if uniform_base if uniform_base is not None else mu is not None:
        arguments["sigmas"] = np.linspace(1.0, 1.0 / num_steps, num_steps)
    scheduler.set_timesteps(num_inference_steps=num_steps, **arguments)
    sigmas = torch.as_tensor(scheduler.sigmas)
    if sigmas.max() > 1 or sigmas[-1] != 0:
        raise ValueError(f"{name} is no flow-matching scheduler: its sigmas must lie in [0, 1] and end in 0")
    return _checked(sigmas)


def make_grid(
    kind: str,
    num_steps: int,
    *,
    scheduler: Any = None,
    shift: float = 3.0,
    mu: float | None = None,
    custom: Sequence[float] | None = None,
) -> Tensor:
    """Grid, float32 (T+1,), of one of `GRID_KINDS`; `shift` is read by linspace_shift only, `mu` by scheduler only."""
    if kind == "scheduler":
        if scheduler is None:
            raise ValueError("grid: scheduler needs the model's scheduler; pass scheduler=...")
        return scheduler_grid(scheduler, num_steps, mu)
    if kind == "linspace_shift":
        return linspace_shift_grid(num_steps, shift)
    if kind == "custom":
        if custom is None or len(custom) != num_steps + 1:
            given = "none" if custom is None else str(len(custom))
            raise ValueError(f"grid: custom needs num_steps + 1 = {num_steps + 1} times ending in 0, got {given}")
        return _checked(torch.tensor(list(custom), dtype=torch.float64))
    raise ValueError(f"unknown grid {kind!r}; choose one of {', '.join(GRID_KINDS)}")


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")


def _checked(times: Tensor) -> Tensor:
    # Checked after rounding: times that differ in float64 may coincide in float32, and a step of length 0 has no std.
    grid = times.detach().to("cpu", torch.float32)
    if grid[-1] != 0 or not 0 < grid[0] <= 1 or not bool((grid[:-1] > grid[1:]).all()):
        raise ValueError(
            f"a grid must fall strictly from t_0 in (0, 1] to 0, got {[round(t, 6) for t in grid.tolist()]}"
        )
    return grid
