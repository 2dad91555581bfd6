"""How different the images of one prompt are, by embeddings of any network: two numbers that need no reference images.

A policy that collapses makes the same image for every seed; a mean reward over prompts does not show it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_diversity(embeddings: Tensor, group_ids: Tensor) -> Tensor:
    """Mean of 1 - cosine over the pairs of each group, in [0, 2].

    embeddings: (N, E), any length but zero. group_ids: (N,) int, in any order. Returns (G,) float64 on the CPU, in
    ascending order of the id, NaN for a group of one image. It does not grow with the number of images.
    """
    first, second = pairs_of(group_ids, len(embeddings))
    unit = _unit(embeddings)
    return group_mean(1 - (unit[first] * unit[second]).sum(-1), group_ids, first)


def vendi_score(embeddings: Tensor, group_ids: Tensor) -> Tensor:
    """Effective number of different images in each group, exp(-sum_i l_i log l_i) (Vendi score, arXiv 2210.02410).

    l_i are the eigenvalues of K / n, K the (n, n) cosines of the group's embeddings. 1 for n equal images, n for n
    orthogonal ones; groups of different sizes do not compare. Arguments and order as in `embedding_diversity`; returns
    (G,) float64 in [1, n], NaN where an embedding is not finite.
    """
    ids, group = _checked(group_ids, len(embeddings)).unique(return_inverse=True)
    unit = _unit(embeddings)
    scores = torch.empty(len(ids), dtype=torch.float64)
    for i in range(len(ids)):
        members = unit[group == i]
        if not members.isfinite().all():  # of a broken image; eigvalsh would raise
            scores[i] = torch.nan
            continue
        values = torch.linalg.eigvalsh(members @ members.T / len(members)).clamp_min(0)  # rounding makes a 0 negative
        scores[i] = torch.special.entr(values).sum().exp()
    return scores


def pairs_of(group_ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row numbers (P,) of the two members of every pair within a group. ValueError unless there are `count` ids."""
    ids = _checked(group_ids, count)
    first, second = (ids[:, None] == ids[None]).triu(1).nonzero().unbind(1)
    return first, second


def group_mean(values: Tensor, group_ids: Tensor, first: Tensor) -> Tensor:
    """Mean of the pairs' values (P,) in each group (G,), ascending ids; NaN without a pair. `first`: see `pairs_of`."""
    ids, group = group_ids.detach().cpu().unique(return_inverse=True)
    place = group[first]
    sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, place, values)
    counts = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, place, torch.ones_like(values))
    return sums / counts


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.detach().cpu().double(), dim=-1)


def _checked(group_ids: Tensor, count: int) -> Tensor:
    if group_ids.shape != (count,):
        raise ValueError(f"expected one group id for each of {count} images, got shape {tuple(group_ids.shape)}")
    return group_ids.detach().cpu()
