"""Random numbers named by what they are for, so that results do not depend on processes, micro-batches or order.

Philox is a counter-based generator with a 128-bit key and a 256-bit counter. Here the key is (seed, stream) and the
upper counter words are (iteration, sample, step): every name owns its own 2^64 blocks, and no two names overlap.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STEP_STREAM = 0
INITIAL_STREAM = 1
PLAN_STREAM = 2
BRANCH_STREAM = 3
"""Steps that a group takes together; there the sample is the group."""


def keyed_generator(
    *, seed: int, iteration: int, sample: int = 0, step: int = 0, stream: int = STEP_STREAM
) -> np.random.Generator:
    """NumPy generator that depends on the five non-negative integers (< 2^64) only, on any rank and machine."""
    names = {"seed": seed, "stream": stream, "step": step, "sample": sample, "iteration": iteration}
    for name, value in names.items():
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} must lie in [0, 2^64), got {value}")
    key = np.array([seed, stream], dtype=np.uint64)
    # Philox counts up in the first word, which is why that one carries no name.
    counter = np.array([0, step, sample, iteration], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def keyed_normal(
    shape: Sequence[int],
    *,
    seed: int,
    iteration: int,
    samples: Sequence[int],
    step: int,
    stream: int = STEP_STREAM,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise (len(samples), *shape), row i a function of (seed, iteration, samples[i], step, stream).

    `shape` is one sample's, without the batch. Drawn in float32, then cast. Repeat an index in `samples` to share it.
    """
    rows = [
        keyed_generator(seed=seed, iteration=iteration, sample=sample, step=step, stream=stream).standard_normal(
            tuple(shape), dtype=np.float32
        )
        for sample in samples
    ]
    if not rows:
        return torch.empty((0, *shape), device=device, dtype=dtype)
    return torch.from_numpy(np.stack(rows)).to(device=device, dtype=dtype)
