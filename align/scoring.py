"""Scores of a distributed batch, gathered so that every process sees the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from align.errors import UserError
from align.prompts import Prompt
from rewards.base import Reward, RewardBatch, RewardError, checked_score


class RewardFailure(UserError):
    """A reward failed, on this process or another; all processes raise it together."""


@dataclass
class Scores:
    """Raw scores (total, ...) float32 and validity, bool, per reward, identical on every process.

    One score a sample, (total,), or one per sample and state, (total, C) with the final image's last.
    """

    values: dict[str, Tensor]
    valid: dict[str, Tensor]

    def mean(self, name: str) -> float:
        """Mean over the valid scores of the final images; NaN if there is none."""
        values, valid = (x[name] if x[name].ndim == 1 else x[name][:, -1] for x in (self.values, self.valid))
        return float(values[valid].double().mean())


def reward_batch(images: Tensor, prompts: Sequence[Prompt], group_ids: Sequence[int], step: int) -> RewardBatch:
    """What a reward is given of images (B, 3, H, W), their prompts and their groups (B)."""
    return RewardBatch(
        images=images,
        prompts=[p.text for p in prompts],
        metadata=[p.metadata for p in prompts],
        group_ids=torch.tensor(list(group_ids), device=images.device),
        step=step,
    )


def score_local(
    rewards: dict[str, Reward], images: Tensor, prompts: Sequence[Prompt], group_ids: Sequence[int], step: int
) -> dict[str, Tensor]:
    """Raw scores (B,) float32 on the CPU per reward, NaN where missing, for this process's images (B, 3, H, W)."""
    batch = reward_batch(images, prompts, group_ids, step)
    scores = {}
    for name, reward in rewards.items():
        with torch.no_grad():
            output = checked_score(reward, batch)
        scores[name] = output.scores.float().cpu().masked_fill(~output.valid.cpu(), float("nan"))
    return scores


def gather_scores(
    accelerator: Accelerator,
    local: dict[str, Tensor] | RewardError,
    names: Sequence[str],
    index: Sequence[int],
    total: int,
    shape: tuple[int, ...] = (),
    required: bool = True,
) -> Scores:
    """One collective: place each process's scores at its global sample indices.

    `local` has (n, *shape) scores, NaN where missing, or is the error this process met: it travels with the scores, so
    that all processes stop together (RewardFailure) instead of waiting for each other. So they do if a reward has no score
    at all, unless scores are not `required`, as of a few images.
    """
    table = torch.zeros(2 * len(names) + 1, total, *shape, dtype=torch.float64)
    if isinstance(local, RewardError):
        table[-1] = 1.0
    else:
        for row, name in enumerate(names):
            valid = ~local[name].isnan()
            table[2 * row, index] = local[name].nan_to_num(0.0).double()
            table[2 * row + 1, index] = valid.double()
    table = accelerator.reduce(table.to(accelerator.device, _reduce_dtype(accelerator)), reduction="sum").cpu()
    if bool((table[-1] > 0).any()):
        raise RewardFailure(str(local) if isinstance(local, RewardError) else "a reward failed on another process")
    values = {name: table[2 * row].float() for row, name in enumerate(names)}
    known = {name: table[2 * row + 1] > 0 for row, name in enumerate(names)}
    for name in names:
        if required and total and not bool(known[name].any()):
            raise RewardFailure(f"reward '{name}' has no score for any of {total} images (all NaN): repair the reward")
    return Scores({k: v.masked_fill(~known[k], float("nan")) for k, v in values.items()}, known)


def _reduce_dtype(accelerator: Accelerator) -> torch.dtype:
    return torch.float32 if accelerator.device.type == "mps" else torch.float64


def try_score(
    rewards: dict[str, Reward], images: Tensor, prompts: Sequence[Prompt], group_ids: Sequence[int], step: int
) -> dict[str, Tensor] | RewardError:
    """`score_local`, with a reward's failure returned instead of raised (see `gather_scores`)."""
    try:
        return score_local(rewards, images, prompts, group_ids, step)
    except RewardError as problem:
        return problem
