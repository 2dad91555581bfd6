"""How different the images of one prompt are by what the verifier reads in them.

A mean over the pairs of a group's images, as `rewards.diversity.embedding_diversity` is over a network's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from align.playground.reader import Reading, read
from align.playground.scenes import COLORS, SHAPES, SIZE
from rewards.base import to_uint8
from rewards.diversity import group_mean, pairs_of

MOST_OBJECTS = 8  # the largest objects of an image are compared; a scene has at most four
FAR = SIZE / 2  # pixels; centres that lie farther apart count as fully different places

_COLORS: dict[str | None, int] = {name: i for i, name in enumerate((None, *COLORS))}
_SHAPES: dict[str | None, int] = {name: i for i, name in enumerate((None, *SHAPES))}


def layout_diversity(readings: Sequence[Reading], group_ids: Tensor) -> Tensor:
    """Mean `layout_distances` over the pairs of each group, in [0, 1]; shapes and order as in `embedding_diversity`."""
    first, second = pairs_of(group_ids, len(readings))
    distances = layout_distances([readings[i] for i in first.tolist()], [readings[i] for i in second.tolist()])
    return group_mean(torch.from_numpy(distances), group_ids, first)


def read_layouts(images: Tensor) -> list[Reading]:
    """What the verifier reads in images (N, 3, 64, 64) in [0, 1]. Another size is a ValueError."""
    return read(to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy())


def layout_distances(first: Sequence[Reading], second: Sequence[Reading]) -> np.ndarray:
    """Distance (P,) float64 in [0, 1] between the objects of first[p] and of second[p].

    The objects of one image are matched to those of the other at the least total cost. A matched pair costs the mean
    of three terms in [0, 1]: 1 for another colour, 1 for another shape, and the distance of the centres over half the
    image's side, at most 1; a reading that fits no colour (no shape) equals only another such. Each object left over
    costs 1. The total is divided by the larger number of objects; two empty images have distance 0. This is the OSPA
    metric of order 1 and cut-off 1 (Schuhmacher, Vo and Vo 2008, IEEE Trans. Signal Processing 56), hence symmetric,
    with the triangle inequality. Only the MOST_OBJECTS largest objects of an image count.
    """
    a, a_count = _table(first)
    b, b_count = _table(second)
    most = max(int(a_count.max(initial=0)), int(b_count.max(initial=0)), 1)
    a, b = a[:, :most, None], b[:, None, :most]
    differs = (a[..., :2] != b[..., :2]).sum(-1)
    away = np.minimum(np.hypot(a[..., 2] - b[..., 2], a[..., 3] - b[..., 3]) / FAR, 1.0)
    cost = (differs + away) / 3
    # Empty slots fill both images up to equally many: an object meets one at cost 1, two of them meet for nothing.
    slot = np.arange(most)
    no_a, no_b = (slot >= a_count[:, None])[:, :, None], (slot >= b_count[:, None])[:, None, :]
    cost = np.where(no_a & no_b, 0.0, np.where(no_a | no_b, 1.0, cost))
    return _assignment(cost) / np.maximum(np.maximum(a_count, b_count), 1)


def _table(readings: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Objects (P, MOST_OBJECTS, 4) as number of the colour, of the shape, x, y; and how many there are (P,)."""
    table = np.zeros((len(readings), MOST_OBJECTS, 4))
    for row, reading in zip(table, readings, strict=True):
        for slot, found in zip(row, reading.objects, strict=False):
            slot[:] = _COLORS[found.color], _SHAPES[found.shape], found.x, found.y
    counts = np.array([min(len(reading.objects), MOST_OBJECTS) for reading in readings], np.int64)
    return table, counts


def _assignment(cost: np.ndarray) -> np.ndarray:
    """Least total cost (P,) of matching the rows of each square matrix (P, K, K) to its columns, one to one.

    Exact, by dynamic programming over the set of columns that the first rows have taken; all P at once.
    """
    pairs, size, _ = cost.shape
    best = np.full((1 << size, pairs), np.inf)
    best[0] = 0.0
    for taken in range(1, 1 << size):
        row = cost[:, taken.bit_count() - 1]
        for column in range(size):
            if taken >> column & 1:
                np.minimum(best[taken], best[taken ^ 1 << column] + row[:, column], out=best[taken])
    return best[-1]
