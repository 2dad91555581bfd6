"""Rewards compared with those that the same prompt earned before (DDPO, arXiv 2305.13301; B2-DiffuRL, 2503.11240)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Past = dict[int, list[tuple[int, float]]]
"""prompt -> its (iteration, reward) entries, oldest first."""


@dataclass
class HistoryConfig:
    """What a prompt's statistics are made of, the rewards of the present iteration included."""

    entries: int = 16
    """Newest rewards kept per prompt; 0: no limit (DDPO: 16, or 32 for slow rewards)."""
    iterations: int = 0
    """Past iterations kept beside the present one; 0: no limit (B2-DiffuRL: 8)."""
    min_count: int = 16
    """With fewer rewards than this, a prompt takes mean and std of the whole iteration (DDPO: 16; B2-DiffuRL: 1)."""
    ddof: int = 0
    """0: population std (DDPO). 1: unbiased std (B2-DiffuRL)."""

    def validate(self) -> list[str]:
        """Return one line per error; empty when the settings are usable."""
        errors = [
            f"{k} must be at least 0, got {getattr(self, k)}" for k in ("entries", "iterations") if getattr(self, k) < 0
        ]
        if self.min_count < 1:
            errors.append(f"min_count must be at least 1, got {self.min_count}")
        if 0 < self.entries < self.min_count:
            errors.append(f"min_count {self.min_count} is never reached with {self.entries} entries; lower it")
        if self.ddof not in (0, 1):
            errors.append(f"ddof must be 0 (population) or 1 (unbiased), got {self.ddof}")
        if not (self.entries or self.iterations):
            errors.append("entries or iterations must be above 0: an endless history would never follow the policy")
        return errors


def remember(
    past: Past, rewards: Tensor, valid: Tensor, prompts: Sequence[int], iteration: int, config: HistoryConfig
) -> Past:
    """The history with this iteration's valid rewards (N,) appended, in sample order, and what is too old dropped.

    `past` is not changed. prompts: (N,) identity of each sample's prompt.
    """
    updated = {p: list(entries) for p, entries in past.items()}
    for p, reward, ok in zip(prompts, rewards.tolist(), valid.tolist(), strict=True):
        if ok:
            updated.setdefault(p, []).append((iteration, reward))
    for p, entries in updated.items():
        if config.iterations:
            entries = [e for e in entries if e[0] >= iteration - config.iterations]
        updated[p] = entries[-config.entries :] if config.entries else entries
    return {p: entries for p, entries in updated.items() if entries}


def history_advantages(
    rewards: Tensor, valid: Tensor, prompts: Sequence[int], past: Past, config: HistoryConfig, eps: float, clip: float
) -> tuple[Tensor, dict[str, float]]:
    """clip((R - mean) / (std + eps), -clip, clip) with mean and std of the prompt's history (arXiv 2305.13301).

    Args:
        rewards: (N,) of the iteration, whose valid entries are in `past` already (see `remember`).
        valid: (N,) bool; an invalid sample gets 0.
        prompts: (N,) identity of each sample's prompt.
        past: the history.
        config: see `HistoryConfig`.
        eps: added to the std, in units of the reward.
        clip: bound of the result.

    Returns:
        advantages (N,) float32; exactly 0 where the rewards compared are all equal.
        stats: `history_fraction` (share of valid samples judged by their own prompt's history), `zero_spread_fraction`
            (share of valid samples whose rewards compared are all equal).
    """
    values = rewards.detach().to("cpu", torch.float64)
    present = valid.detach().cpu().bool() & values.isfinite()
    everything = values[present]
    advantages = torch.zeros(len(values), dtype=torch.float64)
    own = flat = 0
    for p in dict.fromkeys(prompts):
        rows = torch.tensor([i for i, q in enumerate(prompts) if q == p and present[i]], dtype=torch.long)
        if not len(rows):
            continue
        history = torch.tensor([reward for _, reward in past.get(p, [])], dtype=torch.float64)
        known = len(history) >= config.min_count
        compared = history if known else everything
        own += len(rows) * known
        # Equal rewards can differ from their rounded mean by an ulp, so zero spread is decided by max - min; one reward
        # alone has no spread either, and its unbiased std would be NaN.
        if compared.max() == compared.min():
            flat += len(rows)
            continue
        advantages[rows] = (values[rows] - compared.mean()) / (compared.std(correction=config.ddof) + eps)
    count = max(1, int(present.sum()))
    stats = {"history_fraction": own / count, "zero_spread_fraction": flat / count}
    return advantages.clamp(-clip, clip).float(), stats
