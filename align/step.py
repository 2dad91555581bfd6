"""What all loops do at the end of an update, and how they are timed and interrupted."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, MutableMapping

import torch

from align.errors import UserError
from align.run import Run


class Interrupted(Exception):
    """Asked to stop (SIGTERM) before this iteration changed any weight."""


def now(run: Run) -> float:
    """Seconds of a clock that only moves on; on a GPU once its work is done."""
    if run.model.device.type == "cuda":
        torch.cuda.synchronize()  # three times an iteration, so that each stage is charged with its own work
    return time.perf_counter()


def optimizer_step(run: Run) -> float:
    """Average gradients over processes, clip, step and advance the averages; a non-finite gradient is skipped and counted."""
    accelerator, counters = run.accelerator, run.counters
    if accelerator.scaler is not None:  # it wants to have scaled something, also on a process without a sample
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
    for parameter in run.parameters:
        if parameter.grad is None:  # unused, or this process has no sample in the update
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in run.parameters])  # type: ignore[union-attr]
        flat = accelerator.reduce(flat, reduction="mean")
        for parameter, piece in zip(run.parameters, flat.split([p.numel() for p in run.parameters]), strict=True):
            parameter.grad = piece.view_as(parameter)
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate()
    norm = float(accelerator.clip_grad_norm_(run.parameters, run.config.optim.max_grad_norm))
    if math.isfinite(norm) or accelerator.scaler is not None:  # a scaler skips the step itself and lowers its scale
        run.optimizer.step()
    counters.updates += 1
    if not math.isfinite(norm):
        counters.skipped_updates += 1
        counters.consecutive_bad += 1
        run.warn_once("nonfinite", "a non-finite gradient was skipped; see train/skipped_updates")
        if counters.consecutive_bad >= 5:
            raise UserError(
                "five updates in a row had a non-finite gradient: lower optim.lr, or use model.precision=fp32"
            )
        return float("nan")
    counters.consecutive_bad = 0
    if run.average is not None and counters.updates % run.config.optim.ema_every == 0:
        run.average.update()
    return norm


@contextlib.contextmanager
def timed(run: Run, sums: MutableMapping[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that pass inside to `sums[stage]`."""
    started = now(run)
    yield
    sums[stage] += now(run) - started
