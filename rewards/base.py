"""The interface of a reward, and the one function that calls it and checks what comes back."""

from __future__ import annotations

import contextlib
import difflib
import textwrap
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


class RewardError(ValueError):
    """A reward or its configuration cannot be used. The message is one line that says what to do."""


@dataclass
class RewardBatch:
    """Images to judge; B is the number of images. Raises RewardError if the lengths differ."""

    images: Tensor
    """(B, 3, H, W) float in [0, 1], RGB; any H, W and device. A reward never writes to it."""
    prompts: list[str]
    """Length B."""
    metadata: list[dict[str, Any]]
    """Length B: what the prompt file says of each prompt beside its text."""
    group_ids: Tensor
    """(B,) int: samples that are compared with each other share an id."""
    step: int = -1
    """Training iteration, -1 outside training."""

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or not self.images.is_floating_point():
            got = f"{tuple(self.images.shape)} {self.images.dtype}"
            raise RewardError(f"images to score must be float (B, 3, H, W) in [0, 1], got {got}")
        sizes = {"prompts": len(self.prompts), "metadata": len(self.metadata), "group_ids": len(self.group_ids)}
        wrong = [f"{size} {name}" for name, size in sizes.items() if size != len(self.images)]
        if wrong:
            raise RewardError(f"{len(self.images)} images to score came with {', '.join(wrong)}")

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor) -> RewardBatch:
        """The samples at `index` (n,) int64, on the CPU, in that order."""
        rows = index.tolist()
        return RewardBatch(
            images=self.images[index.to(self.images.device)],
            prompts=[self.prompts[i] for i in rows],
            metadata=[self.metadata[i] for i in rows],
            group_ids=self.group_ids[index.to(self.group_ids.device)],
            step=self.step,
        )


@dataclass
class RewardOutput:
    """Scores of one batch of B images."""

    scores: Tensor
    """(B,) float32, raw unit of the reward, higher is better, NaN where there is no score."""
    components: dict[str, Tensor] = field(default_factory=dict)
    """(B,) each: parts of the score, for logs."""
    uncertainty: Tensor | None = None
    """(B,) float32 >= 0, if the reward knows how sure it is."""
    valid: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """(B,) bool; left out, it is where `scores` is not NaN."""
    info: dict[str, Any] = field(default_factory=dict)
    """Strings and timings for logs, never used in a loss. A list of length B holds one entry a sample."""

    def __post_init__(self) -> None:
        if isinstance(self.scores, Tensor) and self.valid.numel() == 0:
            self.valid = ~torch.isnan(self.scores.detach())


class Reward:
    """Base class of a reward: a pure function of (image, prompt, metadata) after `setup`.

    A constructor takes the `args` of the configuration and loads nothing, so that a configuration can be checked
    without weights; `setup` loads. Parameters are frozen and modules in eval mode.
    """

    name: str = ""
    """The name in the configuration, set by `build_reward`."""
    kind: Literal["pointwise", "groupwise"] = "pointwise"
    """Groupwise: a score depends on the other samples of its group, so groups are never split."""
    differentiable: bool = False
    """True if gradients reach `batch.images`."""
    uses_prompt: bool = True
    """False if only the pixels count."""
    deterministic: bool = True
    """True if the same input gives the same score on the same machine."""
    max_batch: int = 64
    """Most images of one call of `score`; larger batches are cut by `checked_score`."""
    trainable: bool = False
    """True if `update` trains it along with the policy; its scores of different iterations are then not comparable."""
    references: str | None = None
    """Trainable: folder of the images that `update` compares with; None: the prompts' own images."""
    rests: bool = False
    """Whether its networks are on the CPU but while it scores (`offload` in the configuration), see `onloaded`."""
    _users: int = 0
    """Uses of `onloaded` that want it on its device."""
    _homes: Sequence[tuple[nn.Module, torch.device]] = ()
    """Networks that are on the CPU and where they belong."""

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load what scoring needs onto `device`; `dtype` is the precision of networks, scores stay float32."""

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, where the network can.

        Called after `setup` by a run that differentiates; scores and gradients stay the same.
        """

    def policy_turn(self, iteration: int) -> bool:
        """Trainable: whether the policy learns in this iteration, counted from 0."""
        return True

    def update(
        self, generated: RewardBatch, reference: Tensor, total: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Trainable: learn from this process's images of an iteration, after the policy did; returns metrics by name.

        reference: (B, 3, H, W) in [0, 1], one image to be like for each that was generated; both kinds are on the CPU, for
        they may be many. total(x): the sum over all processes of x, on the reward's device; each takes part in it equally
        often. Until the next call, scores come from one state. Must leave the policy and the global random states alone.
        """
        raise NotImplementedError(f"{type(self).__name__} is trainable and must define update")

    def state_dict(self) -> dict[str, Tensor]:
        """Trainable: all that `update` changes, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Trainable: go on from `state_dict`, after `setup`."""

    def offload(self) -> None:
        """Move its networks to the CPU. Called after `setup`, never during `score`."""
        if self._homes:
            return
        self._homes = [(module, device) for module in networks(self) if (device := _device(module)) is not None]
        for module, _ in self._homes:
            module.to("cpu")

    def onload(self) -> None:
        """Bring back what `offload` moved, all of it or nothing; scores are the same as without."""
        try:
            for module, device in self._homes:
                module.to(device)
        except Exception:
            for module, _ in self._homes:
                module.to("cpu")
            raise
        self._homes = ()

    @property
    def needs_reference(self) -> bool:
        """True while it cannot score for want of statistics of the base model's images (`use_reference`)."""
        return False

    def reference_scores(self, batch: RewardBatch) -> dict[str, Tensor]:
        """Numbers (B,) by key, NaN where missing, whose `reference_statistics` over the base model's images it needs."""
        return {}

    def use_reference(self, statistics: Mapping[str, Mapping[str, float]]) -> None:
        """Take the statistics: key of `reference_scores` -> {"mean", "std"}; they stay what they are for a whole run."""

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Judge every image of the batch. A sample that cannot be judged gets NaN, never 0 and never an exception."""
        raise NotImplementedError(f"{type(self).__name__} must define score(batch)")


def held(owner: Any, depth: int = 12, seen: set[int] | None = None) -> Iterator[Tensor | nn.Module]:
    """Tensors and modules that an object holds in attributes and containers; a module's own inside is left to it."""
    seen = set() if seen is None else seen
    if id(owner) in seen or depth < 0:
        return
    seen.add(id(owner))
    if isinstance(owner, nn.Module | Tensor):
        yield owner
    elif isinstance(owner, dict):
        for value in list(owner.values()):
            yield from held(value, depth - 1, seen)
    elif isinstance(owner, list | tuple | set):
        for value in owner:
            yield from held(value, depth - 1, seen)
    elif not isinstance(owner, type | types.ModuleType | types.FunctionType) and hasattr(owner, "__dict__"):
        yield from held(vars(owner), depth - 1, seen)


def networks(reward: Reward) -> list[nn.Module]:
    """Modules that a reward holds, also in rewards that it is made of."""
    return [found for found in held(reward) if isinstance(found, nn.Module)]


def _device(module: nn.Module) -> torch.device | None:
    """Where a module is; None if it has nothing to move."""
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    return None if first is None else first.device


_MOVES = threading.RLock()


@contextlib.contextmanager
def onloaded(rewards: Iterable[Reward]) -> Iterator[None]:
    """Inside, rewards that rest on the CPU are on their device. A use within a use moves nothing.

    Raises: RewardError if one cannot be brought there; then none of them stays.
    """
    with contextlib.ExitStack() as leaving:
        with _MOVES:
            for reward in rewards:
                if reward.rests:
                    leaving.callback(_leave, reward)
                    _enter(reward)
        yield


def _enter(reward: Reward) -> None:
    reward._users += 1
    if reward._users == 1:
        try:
            reward.onload()
        except Exception as error:  # no memory, above all: other processes must hear of it
            raise RewardError(f"reward '{reward.name}' cannot be brought to its device: {one_line(error)}") from error


def _leave(reward: Reward) -> None:
    with _MOVES:
        reward._users -= 1
        if reward._users == 0:
            reward.offload()


def to_uint8(images: Tensor) -> Tensor:
    """Float [0, 1] -> uint8 of the same shape: round(255 x), saturated outside the range."""
    return images.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)


def nearest(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar option, or an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def one_line(error: BaseException) -> str:
    """An exception as `Type: message` on one line of at most 300 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=300, placeholder=" ...")


def checked_score(reward: Reward, batch: RewardBatch) -> RewardOutput:
    """Score a batch in pieces of at most `reward.max_batch` and check the result.

    Returns (B,) float32 scores on the device of the images, NaN exactly where `valid` is False. Gradients flow only
    through a reward that is `differentiable`. Raises RewardError, one line with the reward's name, if the reward fails,
    returns a wrong type, shape or dtype, an infinite score, or writes to the images. All scores may be missing: a batch
    can be the images of one prompt.
    """
    chunks = _chunks(reward, batch)
    with onloaded([reward]):
        outputs = [_score_chunk(reward, batch if len(chunks) == 1 else batch.select(index)) for index in chunks]
    if len(outputs) == 1:
        return outputs[0]
    return _merge(outputs, torch.argsort(torch.cat(chunks)))


def _chunks(reward: Reward, batch: RewardBatch) -> list[Tensor]:
    """Indices of the samples of each call; a groupwise reward gets whole groups, even above max_batch."""
    size, limit = len(batch), max(1, reward.max_batch)
    if size <= limit:
        return [torch.arange(size)]
    if reward.kind == "pointwise":
        return list(torch.arange(size).split(limit))
    ids = batch.group_ids.cpu()
    chunks: list[Tensor] = []
    for group in ids.unique():
        members = (ids == group).nonzero().flatten()
        if chunks and len(chunks[-1]) + len(members) <= limit:
            chunks[-1] = torch.cat([chunks[-1], members])
        else:
            chunks.append(members)
    return chunks


def _score_chunk(reward: Reward, batch: RewardBatch) -> RewardOutput:
    images = batch.images
    version = None if images.is_inference() else images._version
    try:
        with nullcontext() if reward.differentiable else torch.no_grad():
            output = reward.score(batch)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward '{reward.name}' failed: {one_line(error)}") from error
    if version is not None and images._version != version:
        raise RewardError(f"reward '{reward.name}' wrote to the images it was given: let it work on images.clone()")
    return _checked(reward, batch, output)


def _checked(reward: Reward, batch: RewardBatch, output: RewardOutput) -> RewardOutput:
    name, size, device = reward.name, len(batch), batch.images.device
    if not isinstance(output, RewardOutput):
        raise RewardError(f"reward '{name}' returned {type(output).__name__}, expected a RewardOutput")
    if not isinstance(output.scores, Tensor):
        raise RewardError(f"reward '{name}' returned scores of type {type(output.scores).__name__}, expected a tensor")
    check_shape(name, "shape", output.scores, size)
    if output.scores.dtype != torch.float32:
        raise wrong_dtype(name, output.scores)
    check_shape(name, "valid of shape", output.valid, size)
    scores = output.scores.to(device)
    valid = output.valid.to(device, torch.bool) & ~torch.isnan(scores.detach())
    infinite = (torch.isinf(scores.detach()) & valid).nonzero().flatten().tolist()
    if infinite:
        got = f"{scores[infinite[0]].item()} for image {infinite[0]}"
        raise RewardError(f"reward '{name}' returned {got}: return NaN for a missing score")
    if reward.differentiable and torch.is_grad_enabled() and batch.images.requires_grad and not scores.requires_grad:
        raise RewardError(f"reward '{name}' says it is differentiable, but its scores do not depend on the images")
    components = {}
    for key, value in output.components.items():
        check_shape(name, f"component '{key}' of shape", value, size)
        components[key] = value.detach().to(device, torch.float32)
    uncertainty = output.uncertainty
    if uncertainty is not None:
        check_shape(name, "uncertainty of shape", uncertainty, size)
        uncertainty = uncertainty.to(device, torch.float32)
        if bool((uncertainty < 0).any()):
            raise RewardError(f"reward '{name}' returned a negative uncertainty ({uncertainty.min().item():g})")
        if bool(uncertainty.isinf().any()):
            raise RewardError(f"reward '{name}' returned an infinite uncertainty: return NaN where it is not known")
    scores = torch.where(valid, scores, torch.nan)
    return RewardOutput(scores, components, uncertainty, valid, dict(output.info))


def check_shape(name: str, what: str, value: Tensor, size: int) -> None:
    """Raise RewardError unless `value` has one entry a sample, shape (size,)."""
    shape = tuple(value.shape)
    if shape == (size,):
        return
    advice = "return one number per image"
    if value.numel() == size:
        advice += ", for example with .flatten()"
    raise RewardError(f"reward '{name}' returned {what} {shape}, expected ({size},): {advice}")


def wrong_dtype(name: str, scores: Tensor) -> RewardError:
    """The error for scores that are not float32."""
    return RewardError(
        f"reward '{name}' returned {scores.dtype} scores, expected torch.float32: compute the score in float32, "
        "half precision makes ties"
    )


def _merge(outputs: list[RewardOutput], order: Tensor) -> RewardOutput:
    """Outputs of the chunks as one, in the order of the batch."""
    device = outputs[0].scores.device
    index = order.to(device)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)[index]

    missing = [torch.full_like(output.scores.detach(), torch.nan) for output in outputs]
    keys = dict.fromkeys(key for output in outputs for key in output.components)
    components = {
        key: joined([output.components.get(key, blank) for output, blank in zip(outputs, missing, strict=True)])
        for key in keys
    }
    # a chunk that a service did not answer says nothing of how sure it is, and must not silence the others
    doubts = [
        blank if output.uncertainty is None else output.uncertainty
        for output, blank in zip(outputs, missing, strict=True)
    ]
    info: dict[str, Any] = {}
    for key in dict.fromkeys(key for output in outputs for key in output.info):
        parts = [output.info.get(key) for output in outputs]
        if all(
            isinstance(part, list) and len(part) == len(output.scores)
            for part, output in zip(parts, outputs, strict=True)
        ):
            flat = [entry for part in parts if isinstance(part, list) for entry in part]
            info[key] = [flat[row] for row in order.tolist()]
        else:
            info[key] = parts[-1]
    return RewardOutput(
        scores=joined([output.scores for output in outputs]),
        components=components,
        uncertainty=None if all(output.uncertainty is None for output in outputs) else joined(doubts),
        valid=joined([output.valid for output in outputs]),
        info=info,
    )
