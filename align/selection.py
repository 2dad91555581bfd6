"""Which samples of a group are trained: all of them, or only its best and its worst (B2-DiffuRL, arXiv 2503.11240)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

SelectionRule = Literal["all", "extremes"]


@dataclass
class SelectionConfig:
    """Which samples are trained, and how strongly."""

    rule: SelectionRule = "all"
    """all, or extremes: of each group the sample of highest and that of lowest advantage, beyond the thresholds."""
    pos_threshold: float = 0.5
    """extremes: keep the best sample of a group if its advantage is at least this (released run script)."""
    neg_threshold: float = -0.5
    """extremes: keep the worst sample if its advantage is below this (released run script)."""
    pos_weight: float = 1.0
    """Factor on positive advantages (released code: 1)."""
    neg_weight: float = 1.0
    """Factor on the other advantages (released code: 1); 0 learns from good samples only."""

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = []
        if self.rule not in get_args(SelectionRule):
            errors.append(f"rule must be one of {', '.join(get_args(SelectionRule))}, got {self.rule!r}")
        if self.neg_threshold > self.pos_threshold:
            errors.append(
                f"neg_threshold must not be above pos_threshold, got {self.neg_threshold} and {self.pos_threshold}"
            )
        for name in ("pos_weight", "neg_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                errors.append(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        return errors


def extremes(advantages: Tensor, valid: Tensor, groups: Tensor, pos_threshold: float, neg_threshold: float) -> Tensor:
    """Best sample of each group if its advantage >= pos_threshold, worst if < neg_threshold (arXiv 2503.11240).

    The two tests are independent: a group gives 0, 1 or 2 samples. Among equals the first counts.

    Args:
        advantages: (N,), not centred within the group but per prompt, so that whole groups can fail the tests.
        valid: (N,) bool; an invalid sample is never kept.
        groups: (N,) integers, equal for the samples of one branch point.
        pos_threshold, neg_threshold: see `SelectionConfig`.

    Returns:
        (N,) bool.
    """
    kept = torch.zeros(len(advantages), dtype=torch.bool)
    for group in torch.unique(groups):
        rows = ((groups == group) & valid).nonzero().flatten()
        if not len(rows):
            continue
        best, worst = rows[advantages[rows].argmax()], rows[advantages[rows].argmin()]
        kept[best] |= advantages[best] >= pos_threshold
        kept[worst] |= advantages[worst] < neg_threshold
    return kept


def select(advantages: Tensor, valid: Tensor, groups: Tensor, config: SelectionConfig) -> tuple[Tensor, Tensor]:
    """Mask (N,) of the samples to train, and their advantages (N, S) with the configured weights on.

    Args:
        advantages: (N, S); with the rule extremes the columns are equal.
        valid: (N,) bool.
        groups: (N,) integers.
        config: see `SelectionConfig`.
    """
    weighted = advantages * torch.where(advantages > 0, config.pos_weight, config.neg_weight)
    if config.rule == "all":
        return torch.ones(len(advantages), dtype=torch.bool), weighted
    kept = extremes(advantages[:, -1], valid, groups, config.pos_threshold, config.neg_threshold)
    return kept & (weighted[:, -1] != 0), weighted  # what has no weight is not worth a forward pass
