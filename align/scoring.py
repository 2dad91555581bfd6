"""Scores of a distributed batch, gathered so that every process sees the same numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
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
    extras: dict[str, Tensor] = field(default_factory=dict)
    """What else rewards said of the samples, of the shape of a score and NaN where they said nothing: their uncertainty
    (`uncertainty_key`) and the parts of their scores (`component_key`)."""

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
    """Raw scores (B,) float32 on the CPU per reward, NaN where missing, for this process's images (B, 3, H, W).

    Beside them, under keys of their own, uncertainties and components of the rewards that have some.
    """
    batch = reward_batch(images, prompts, group_ids, step)
    found = {}
    for name, reward in rewards.items():
        with torch.no_grad():
            output = checked_score(reward, batch)
        found[name] = output.scores.float().cpu().masked_fill(~output.valid.cpu(), float("nan"))
        if output.uncertainty is not None:
            found[uncertainty_key(name)] = output.uncertainty.float().cpu()
        for part, values in output.components.items():
            found[component_key(name, part)] = values.float().cpu()
    return found


def uncertainty_key(name: str) -> str:
    """Where the uncertainty of the reward `name` stands among the scores."""
    return f"{name}:uncertainty"


def component_key(name: str, part: str) -> str:
    """Where a component of the reward `name` stands among the scores."""
    return f"{name}:component/{part}"


def extra_means(extras: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """`reward/<name>/<component>` and `reward/<name>/uncertainty`: means over what is there of the final images."""
    means = {}
    for key, values in extras.items():
        name, _, part = key.partition(":")
        final = values if values.ndim == 1 else values[:, -1]
        present = final[~final.isnan()]
        if name in names and len(present):
            means[f"reward/{name}/{part.removeprefix('component/')}"] = float(present.double().mean())
    return means


def gather_scores(
    accelerator: Accelerator,
    local: dict[str, Tensor] | RewardError,
    names: Sequence[str],
    index: Sequence[int],
    total: int,
    shape: tuple[int, ...] = (),
    required: bool | Collection[str] = True,
) -> Scores:
    """Place each process's scores at its global sample indices.

    `local` has (n, *shape) scores of the rewards `names` and whatever `score_local` found beside them, NaN where missing,
    or is the error this process met: it travels with the scores, so that all processes stop together (RewardFailure)
    instead of waiting for each other. So they do if one of the `required` rewards, True for all, has no score at all.
    """
    failed = isinstance(local, RewardError)
    own = [] if isinstance(local, RewardError) else [key for key in local if key not in names]
    # a reward may have other parts to tell of other images
    keys = [*names, *sorted({key for part in gather_object([own]) for key in part})]
    table = torch.zeros(2 * len(keys) + 1, total, *shape, dtype=torch.float64)
    if isinstance(local, RewardError):
        table[-1] = 1.0
    else:
        for row, key in enumerate(keys):
            if key in local:
                table[2 * row, index] = local[key].nan_to_num(0.0).double()
                table[2 * row + 1, index] = (~local[key].isnan()).double()
    table = accelerator.reduce(table.to(accelerator.device, _reduce_dtype(accelerator)), reduction="sum").cpu()
    if bool((table[-1] > 0).any()):
        raise RewardFailure(str(local) if failed else "a reward failed on another process")
    known = {key: table[2 * row + 1] > 0 for row, key in enumerate(keys)}
    values = {key: table[2 * row].float().masked_fill(~known[key], float("nan")) for row, key in enumerate(keys)}
    for name in names if required is True else required or ():
        if total and not bool(known[name].any()):
            raise RewardFailure(f"reward '{name}' has no score for any of {total} images (all NaN): repair the reward")
    return Scores(
        {name: values[name] for name in names},
        {name: known[name] for name in names},
        {key: values[key] for key in keys[len(names) :]},
    )


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
