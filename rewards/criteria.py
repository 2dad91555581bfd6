"""Many criteria to one score by two gates, as in MJ-VIDEO's judge (arXiv 2502.01719): criteria to aspects to the total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewards.base import RewardError


def gated_score(
    criteria: Tensor,
    criterion_logits: Tensor,
    aspects: Mapping[str, Sequence[int]],
    aspect_logits: Tensor,
    temperature: float = 10.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total (B,) and each aspect's score (B,), for `components`.

    A softmax inside each aspect mixes its criteria, and a second one mixes the aspects.

    Args:
        criteria: (B, C) scores; criterion_logits: (B, C), what a gate makes of the prompt.
        aspects: name -> the columns of its criteria; each column belongs to one aspect.
        aspect_logits: (B, number of aspects), in the order of `aspects`.
        temperature: > 0, divides both kinds of logits.
    """
    columns = sorted(column for of in aspects.values() for column in of)
    if columns != list(range(criteria.shape[1])) or not all(aspects.values()):
        raise RewardError(
            f"aspects must share out the {criteria.shape[1]} criteria, each to one of them, got {dict(aspects)}"
        )
    found = {
        name: (criteria[:, list(of)] * torch.softmax(criterion_logits[:, list(of)] / temperature, dim=1)).sum(dim=1)
        for name, of in aspects.items()
    }
    weights = torch.softmax(aspect_logits / temperature, dim=1)
    return (torch.stack(list(found.values()), dim=1) * weights).sum(dim=1), found
