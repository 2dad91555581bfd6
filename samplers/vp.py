"""Variance-preserving models (Stable Diffusion 1, 2, XL) in flow coordinates.

Such a model knows `x_vp = alpha data + sigma noise` with `alpha^2 + sigma^2 = 1`, alpha^2 the schedule's cumulative product
`alpha_bar`. Divided by `alpha + sigma` this is `x = (1 - t) data + t noise` at flow time `t = sigma / (alpha + sigma)`, where
every sampler works. Velocity `v = noise - data`; a DDIM step with eta = 0 (arXiv 2010.02502) is the Euler step there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def vp_scale(t: Tensor) -> Tensor:
    """n(t) = sqrt(t^2 + (1 - t)^2) = 1 / (alpha + sigma), float64, any shape: `x = n x_vp`."""
    t = t.double()
    return torch.sqrt(t**2 + (1 - t) ** 2)


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """VP signal and noise levels at flow time t in [0, 1], float64, any shape; alpha^2 + sigma^2 = 1."""
    n = vp_scale(t)
    return (1 - t.double()) / n, t.double() / n


def flow_time(alpha_bar: Tensor) -> Tensor:
    """Flow time in [0, 1], float64, of cumulative products alpha_bar in [0, 1], any shape; 0 becomes t = 1."""
    alpha, sigma = torch.sqrt(alpha_bar.double()), torch.sqrt(1 - alpha_bar.double())
    return sigma / (alpha + sigma)


def time_table(alphas: Tensor) -> Tensor:
    """Flow time of every training timestep, float32 (K,), rising, from the schedule's factors `1 - beta` (K,)."""
    return flow_time(torch.cumprod(alphas.double(), 0)).float()


def timestep_of(t: Tensor, table: Tensor) -> Tensor:
    """Timestep (B,) float32 at flow times t (B,): linear in t between the entries of `table`, clamped to its ends.

    A time that is an entry of the table gives its index exactly.
    """
    entries, t = table.double(), t.double()
    low = (torch.searchsorted(entries, t, right=True) - 1).clamp(0, len(table) - 2)
    fraction = (t - entries[low]) / (entries[low + 1] - entries[low])
    return (low + fraction.clamp(0, 1)).float()


def vp_grid(timesteps: Sequence[int], table: Tensor, end: float) -> Tensor:
    """Grid, float32 (T+1,) on the CPU: the flow times of falling `timesteps` (T), then `end`.

    Raises: ValueError if a timestep lies outside the table or the times do not fall strictly.
    """
    index = torch.as_tensor(timesteps, dtype=torch.int64)
    if index.min() < 0 or index.max() >= len(table):
        raise ValueError(f"timesteps must lie in 0..{len(table) - 1}, got {index.min()}..{index.max()}")
    grid = torch.cat([table.cpu()[index], torch.tensor([end])])
    if not bool((grid[:-1] > grid[1:]).all()):
        raise ValueError(f"a grid must fall strictly, got timesteps {index.tolist()} and the end {end:g}")
    return grid


def velocity_from(output: Tensor, x: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Velocity (B, ...) float32 from a network's `output` at x (B, ...) in flow coordinates, t (B,)."""
    on_output, on_x = velocity_coefficients(t, prediction)
    shape = (-1,) + (1,) * (x.dim() - 1)
    return on_output.view(shape) * output.float() + on_x.view(shape) * x.float()


def velocity_coefficients(t: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Factors (B,) float32 of the network's output and of x in the velocity at t (B,).

    prediction, with alpha = (1 - t) / n and sigma = t / n: "epsilon" is the noise, so v = (output - x) / (1 - t), infinite at
    t = 1; "v_prediction" is alpha noise - sigma data (arXiv 2202.00512), so v = (output + (2 t - 1) x / n) / n, finite
    everywhere; "sample" is the data, so v = (x - output) / t.
    """
    t = t.double()
    if prediction == "epsilon":
        on_output = 1 / (1 - t)
        on_x = -on_output
    elif prediction == "v_prediction":
        n = vp_scale(t)
        on_output, on_x = 1 / n, (2 * t - 1) / n**2
    elif prediction == "sample":
        on_x = 1 / t
        on_output = -on_x
    else:
        raise ValueError(f"unknown prediction type {prediction!r}; choose one of {', '.join(PREDICTIONS)}")
    return on_output.float(), on_x.float()
