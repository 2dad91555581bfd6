"""Does a reward keep the contract of `rewards.Reward`? One verdict for each of its points, and what to do about it.

Every point is tried on a small batch: the caller's, or `sample_batch`. A reward that passes can still judge badly; one
that fails would train a run on wrong numbers, or stop it.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, held, networks, one_line
from rewards.preprocess import resize

Status = Literal["pass", "fail", "n/a"]
PASS: Status = "pass"
FAIL: Status = "fail"
NOT_APPLICABLE: Status = "n/a"
Outcome = tuple[Status, str]

TOLERANCE = 1e-4
"""Largest change of a score, relative above 1, that is still the same score."""
LOOSE_TOLERANCE = 5e-2
"""The same for a reward that says it is not deterministic, such as a judge behind a batching server."""

_SIZES = ((48, 80), (80, 48), (33, 67))  # neither square nor a multiple of a usual patch
_HELD_BYTES = 1 << 20  # tensors above this, held by a constructor, are weights
_PROMPTS = ("a red circle", "two blue squares", 'a sign that says "OPEN"')


@dataclass(frozen=True)
class Verdict:
    """What was found at one point of the contract."""

    point: str
    status: Status
    detail: str
    """What was seen and, for a failure, what to do: one line."""


@dataclass
class _Probe:
    """The reward under test and its reference scores (B,) float32 on the CPU, NaN where missing."""

    reward: _Lenient
    batch: RewardBatch
    scores: Tensor
    tolerance: float

    def rescored(self, batch: RewardBatch) -> Tensor:
        """Scores (B,) of another batch, drawn from the same random state as the reference."""
        return _scores(self.reward, batch)

    def difference(self, found: Tensor, expected: Tensor) -> tuple[bool, str]:
        """Whether two sets of scores are the same, and the largest difference in words."""
        if not torch.equal(found.isnan(), expected.isnan()):
            return False, "a score appeared or went missing"
        gap = (found - expected).nan_to_num(0.0).abs()
        allowed = self.tolerance * expected.nan_to_num(0.0).abs().clamp_min(1.0)
        return bool((gap <= allowed).all()), f"largest change {gap.max().item() if len(gap) else 0.0:.2g}"


def check(
    reward: Reward,
    batch: RewardBatch | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Verdict]:
    """Try every point of the contract on a reward that is built and not yet set up; sets it up on the way.

    batch: images and prompts the reward can judge, at least 2 (default: `sample_batch`, 6 images of 64 x 64). Where
    no score can be had at all, the points after that are "n/a". Raises nothing that the reward raises.
    """
    device = torch.device(device)
    batch = batch or sample_batch()
    if len(batch) < 2:
        raise RewardError("the check needs at least 2 images")
    batch = dataclasses.replace(batch, images=batch.images.to(device))
    verdicts = [_tried("loads in setup only", _loads_nothing, reward)]
    verdicts.append(_tried("setup", _setup, reward, device, dtype))
    first: list[RewardOutput] = []
    if verdicts[-1].status == PASS:
        verdicts.append(_tried("one score per image", _first_call, reward, batch, first))
    if not first:
        missing = [name for name, _ in (*_FIRST_POINTS, *_POINTS)]
        return [
            *verdicts,
            *(Verdict(name, NOT_APPLICABLE, "not reached: repair the failure above") for name in missing),
        ]
    verdicts += [_tried(name, point, first[0]) for name, point in _FIRST_POINTS]
    lenient = _Lenient(reward)
    tolerance = TOLERANCE if reward.deterministic else LOOSE_TOLERANCE
    try:
        probe = _Probe(lenient, batch, _scores(lenient, batch), tolerance)
    except Exception as error:
        return [*verdicts, *(Verdict(name, FAIL, _said(error)) for name, _ in _POINTS)]
    return verdicts + [_tried(name, point, probe) for name, point in _POINTS]


def sample_batch() -> RewardBatch:
    """Six images (6, 3, 64, 64) of three prompts, two a group: drawn shapes and smooth random fields.

    The prompts are chosen so that every reward finds some it can judge, and the metadata is a GenEval prompt's.
    """
    axis = torch.linspace(0, 1, 64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05).float()
    left, right = (((x - c).abs() < 0.12) & ((y - 0.5).abs() < 0.12) for c in (0.25, 0.75))
    red, blue = torch.tensor([0.89, 0.16, 0.18]), torch.tensor([0.2, 0.38, 0.93])
    noise = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fields = resize(noise, (64, 64)).clamp(0.05, 0.95)
    images = [
        _drawn(disc, red),
        _drawn(disc, blue),
        _drawn((left | right).float(), blue),
        _drawn(left.float(), blue),
        fields[4],
        fields[5],
    ]
    # A trace of the random fields in every image: no two scores tie and no gradient vanishes by symmetry.
    stacked = 0.98 * torch.stack(images) + 0.02 * fields
    metadata = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    return RewardBatch(
        images=stacked,
        prompts=[prompt for prompt in _PROMPTS for _ in range(2)],
        metadata=[copy.deepcopy(metadata) for _ in range(6)],
        group_ids=torch.arange(6) // 2,
    )


def _drawn(mask: Tensor, colour: Tensor) -> Tensor:
    """(3, 64, 64): a flat colour where mask (64, 64) is 1, dark elsewhere."""
    return 0.11 + mask * (colour.view(3, 1, 1) - 0.11)


class _Lenient(Reward):
    """The reward under test with the faults of its first verdicts undone, so that one fault does not hide another."""

    def __init__(self, reward: Reward) -> None:
        self.inner = reward
        for attribute in ("name", "kind", "differentiable", "uses_prompt", "deterministic", "max_batch"):
            setattr(self, attribute, getattr(reward, attribute))

    def score(self, batch: RewardBatch) -> RewardOutput:
        output = self.inner.score(_copied(batch))
        with torch.set_grad_enabled(output.scores.requires_grad):  # a gradient nobody asked for must show
            scores = output.scores.float()
            scores = scores.masked_fill(scores.detach().isinf(), torch.nan)
        return RewardOutput(scores, valid=output.valid)


def _copied(batch: RewardBatch) -> RewardBatch:
    """What a reward may write to without spoiling the next call; gradients pass."""
    with torch.set_grad_enabled(batch.images.requires_grad):
        images = batch.images.clone()
    return dataclasses.replace(
        batch, images=images, prompts=list(batch.prompts), metadata=copy.deepcopy(batch.metadata)
    )


def _tried(name: str, point: Callable[..., Outcome], *arguments: Any) -> Verdict:
    try:
        status, detail = point(*arguments)
    except Exception as error:
        status, detail = FAIL, _said(error)
    return Verdict(name, status, detail)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, RewardError) else one_line(error)


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random state for every scoring, and the caller's afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  (the global state is what rewards draw from)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _scores(reward: Reward, batch: RewardBatch) -> Tensor:
    with _seeded(), torch.no_grad():
        return checked_score(reward, batch).scores.detach().cpu()


def _loads_nothing(reward: Reward) -> Outcome:
    found = list(held(reward))
    modules = [type(x).__name__ for x in found if isinstance(x, nn.Module)]
    size = sum(x.numel() * x.element_size() for x in found if isinstance(x, Tensor))
    if modules:
        return FAIL, f"the constructor built {', '.join(modules)}: build and load networks in setup(device, dtype)"
    if size > _HELD_BYTES:
        return FAIL, f"the constructor holds {size / 1e6:.1f} MB of tensors: load them in setup(device, dtype)"
    return PASS, "the constructor holds no network"


def _setup(reward: Reward, device: torch.device, dtype: torch.dtype) -> Outcome:
    with _seeded():
        reward.setup(device, dtype)
    return PASS, f"ready on {device} in {str(dtype).removeprefix('torch.')}"


def _first_call(reward: Reward, batch: RewardBatch, found: list[RewardOutput]) -> Outcome:
    """One call of `score` itself, without the checks and repairs of `checked_score`."""
    part = batch.select(torch.arange(min(len(batch), max(1, reward.max_batch))))
    with _seeded(), torch.no_grad():
        output = reward.score(_copied(part))
    if not isinstance(output, RewardOutput) or not isinstance(output.scores, Tensor):
        got = type(output.scores if isinstance(output, RewardOutput) else output).__name__
        return FAIL, f"score returned {got}: return RewardOutput(scores) with a tensor of one number per image"
    shape = tuple(output.scores.shape)
    if shape != (len(part),) or tuple(output.valid.shape) != shape:
        flat = ", for example with .flatten()" if output.scores.numel() == len(part) else ""
        return FAIL, f"scores of shape {shape} for {len(part)} images: return shape ({len(part)},){flat}"
    found.append(output)
    where = output.scores.device
    moved = "" if where == batch.images.device else f", moved back to {batch.images.device}"
    return PASS, f"shape {shape} on {where}{moved}"


def _float32(output: RewardOutput) -> Outcome:
    dtype = output.scores.dtype
    if dtype != torch.float32:
        return FAIL, f"scores are {dtype}: compute them in float32 and return .float(), half precision makes ties"
    return PASS, "float32"


def _finite(output: RewardOutput) -> Outcome:
    scores, valid = output.scores.detach().float(), output.valid.bool()
    infinite = (scores.isinf() & valid).nonzero().flatten().tolist()
    if infinite:
        return FAIL, f"image {infinite[0]} got {scores[infinite[0]].item()}: return NaN for a missing score"
    known = int((valid & ~scores.isnan()).sum())
    if not known:
        reason = next((str(text) for text in _listed(output.info, len(scores)) if text), "")
        also = f" ({reason})" if reason else ""
        return FAIL, f"no image got a score{also}: give images and prompts that this reward can judge"
    low, high = scores[valid].nan_to_num(torch.inf).min(), scores[valid].nan_to_num(-torch.inf).max()
    return PASS, f"{known} of {len(scores)} images have a score, {low:.4g} to {high:.4g}"


def _listed(info: dict[str, Any], size: int) -> list[Any]:
    lists = [value for value in info.values() if isinstance(value, list) and len(value) == size]
    return [entry for entries in lists for entry in entries]


def _input_unchanged(probe: _Probe) -> Outcome:
    inner = probe.reward.inner  # the lenient one hands out copies
    batch = _copied(probe.batch)
    with _seeded(), torch.no_grad():
        for index in torch.arange(len(batch)).split(max(1, inner.max_batch)):
            images = batch.images[index[0] : index[-1] + 1]  # a view: what is written to it is seen
            inner.score(dataclasses.replace(batch.select(index), images=images))
    if not torch.equal(batch.images, probe.batch.images):
        return FAIL, "score wrote to batch.images: work on batch.images.clone()"
    try:
        noted = batch.metadata != probe.batch.metadata
    except (RuntimeError, ValueError):  # arrays and tensors have no plain comparison
        noted = False
    if noted:
        return FAIL, "score changed batch.metadata: work on a copy"
    return PASS, "images and metadata are as they were"


def _permutation(probe: _Probe) -> Outcome:
    order = torch.arange(len(probe.batch)).flip(0)
    same, detail = probe.difference(probe.rescored(probe.batch.select(order)), probe.scores[order])
    if same:
        return PASS, f"reversing the batch reverses the scores ({detail})"
    return (
        FAIL,
        f"reversing the batch does not reverse the scores ({detail}): score image i by image i and prompt i only",
    )


def _split(probe: _Probe) -> Outcome:
    parts = _pieces(probe)
    if len(parts) < 2:
        return NOT_APPLICABLE, "the batch holds one group, and a group is never cut"
    found = torch.empty_like(probe.scores)
    for index in parts:
        found[index] = probe.rescored(probe.batch.select(index))
    same, detail = probe.difference(found, probe.scores)
    if same:
        return PASS, f"pieces score as the whole ({detail})"
    return (
        FAIL,
        f"scores change when the batch is cut ({detail}): use nothing of the batch as a whole, such as its mean",
    )


def _pieces(probe: _Probe) -> list[Tensor]:
    """The first sample and the rest; whole groups for a groupwise reward."""
    if probe.reward.kind == "pointwise":
        return [torch.arange(1), torch.arange(1, len(probe.batch))]
    ids = probe.batch.group_ids.cpu()
    return [(ids == group).nonzero().flatten() for group in ids.unique()]


def _independent(probe: _Probe) -> Outcome:
    kept = _pieces(probe)[0]
    if len(kept) == len(probe.batch):
        return NOT_APPLICABLE, "the batch holds one group"
    batch = probe.batch.select(torch.arange(len(probe.batch)))
    others = torch.ones(len(batch), dtype=torch.bool)
    others[kept] = False
    batch.images[others.to(batch.images.device)] = 1 - batch.images[others.to(batch.images.device)]
    batch.prompts = [
        f"{p}, upside down" if other else p for p, other in zip(batch.prompts, others.tolist(), strict=True)
    ]
    same, detail = probe.difference(probe.rescored(batch)[kept], probe.scores[kept])
    who = "samples" if probe.reward.kind == "pointwise" else "groups"
    if same:
        return PASS, f"other {who} do not matter ({detail})"
    remedy = "score each image alone, or set kind = 'groupwise'" if who == "samples" else "use one group at a time"
    return FAIL, f"a score changes with the other {who} of the batch ({detail}): {remedy}"


def _repeatable(probe: _Probe) -> Outcome:
    if not probe.reward.deterministic:
        same, detail = probe.difference(probe.rescored(probe.batch), probe.scores)
        if same:
            return PASS, f"not deterministic, as it says; the same random state gives the same scores ({detail})"
        return FAIL, f"the same random state gives other scores ({detail}): draw from torch, numpy.random or random"
    with torch.no_grad():  # not from one random state: a dropout that is on must show
        first, second = (checked_score(probe.reward, probe.batch).scores.cpu() for _ in range(2))
    same, detail = probe.difference(first, second)
    if same:
        return PASS, f"the same input gives the same score ({detail})"
    return FAIL, f"the same input gives other scores ({detail}): switch dropout off, or set deterministic = False"


def _prompts(probe: _Probe) -> Outcome:
    shift = max(1, len(probe.batch) // 3)
    prompts = probe.batch.prompts[shift:] + probe.batch.prompts[:shift]
    same, detail = probe.difference(probe.rescored(dataclasses.replace(probe.batch, prompts=prompts)), probe.scores)
    if not probe.reward.uses_prompt:
        if same:
            return PASS, "other prompts, same scores, as uses_prompt = False says"
        return FAIL, f"uses_prompt is False, and other prompts change the scores ({detail}): remove uses_prompt = False"
    if same:
        return NOT_APPLICABLE, "other prompts gave the same scores here; set uses_prompt = False if only pixels count"
    return PASS, "other prompts, other scores"


def _sizes(probe: _Probe) -> Outcome:
    valid = ~probe.scores.isnan()
    for size in _SIZES:
        images = resize(probe.batch.images, size).clamp(0, 1)
        name = f"{size[0]} x {size[1]} pixels (height x width)"
        try:
            found = probe.rescored(dataclasses.replace(probe.batch, images=images))
        except Exception as error:
            return FAIL, f"{name}: {_said(error)}: accept any height and width, rewards.preprocess resizes"
        if bool(valid.any()) and bool(found.isnan().all()):
            return FAIL, f"{name}: no image got a score: accept any height and width"
    return PASS, f"{', '.join(f'{h} x {w}' for h, w in _SIZES)} are accepted"


def _one_broken(probe: _Probe) -> Outcome:
    told, broken = [], 1
    kept = torch.tensor([i for i in range(len(probe.batch)) if i != broken])
    if probe.reward.kind == "groupwise":  # the others of its group may notice
        kept = kept[(probe.batch.group_ids.cpu() != probe.batch.group_ids.cpu()[broken])[kept]]
    for what, batch in _with_one_broken(probe.batch, broken).items():
        try:
            found = probe.rescored(batch)
        except Exception as error:
            return FAIL, f"one sample with {what} stops all ({_said(error)}): give NaN to that sample"
        same, detail = probe.difference(found[kept], probe.scores[kept])
        if not same:
            return FAIL, f"one sample with {what} changes the scores of others ({detail}): judge each alone"
        if bool(found[broken].isnan()):
            told.append(what)
    if told:
        return PASS, f"no exception, and no score for the one with {' or '.join(told)}"
    return PASS, "no exception; each got a score all the same: return NaN where the reward can tell"


def _with_one_broken(batch: RewardBatch, row: int) -> dict[str, RewardBatch]:
    images = batch.images.clone()
    images[row] = torch.nan
    prompts = ["" if i == row else prompt for i, prompt in enumerate(batch.prompts)]
    metadata: list[dict[str, Any]] = [{} if i == row else entry for i, entry in enumerate(batch.metadata)]
    return {
        "pixels of NaN": dataclasses.replace(batch, images=images),
        "an empty prompt": dataclasses.replace(batch, prompts=prompts),
        "no metadata": dataclasses.replace(batch, metadata=metadata),
    }


def _gradient(probe: _Probe) -> Outcome:
    images = probe.batch.images.clone().requires_grad_()
    batch = dataclasses.replace(probe.batch, images=images)
    with _seeded(), torch.enable_grad():
        scores = checked_score(probe.reward, batch).scores
        still = torch.is_grad_enabled()
        if not still:
            return FAIL, "score leaves gradients switched off: use `with torch.no_grad():`"
        if not probe.reward.differentiable:
            if scores.requires_grad:
                return FAIL, "score switches gradients on, though differentiable is False: remove enable_grad"
            return NOT_APPLICABLE, "it does not say that it is differentiable; its scores carry no gradient"
        known = ~scores.detach().isnan()
        if not bool(known.any()):
            return NOT_APPLICABLE, "no image got a score"
        # Unequal weights: the plain sum of scores that are centred within a group is constant.
        weights = torch.arange(1, len(batch) + 1, device=scores.device)
        (gradient,) = torch.autograd.grad((weights * scores)[known].sum(), images)
    norms = gradient[known].flatten(1).norm(dim=1)
    if not bool(norms.isfinite().all()):
        return FAIL, "the gradient of the images is not finite: look for sqrt, log or a division near 0"
    if not bool(norms.any()):
        return FAIL, "the gradient of the images is 0: no rounding, uint8, PIL or detach on the way"
    return PASS, f"finite; norms {norms.min().item():.2g} to {norms.max().item():.2g}"


def _frozen(probe: _Probe) -> Outcome:
    modules = networks(probe.reward)
    if not modules:
        return NOT_APPLICABLE, "it holds no torch module"
    free = sum(p.requires_grad for module in modules for p in module.parameters())
    if free:
        return FAIL, f"{free} parameters require gradients: call network.requires_grad_(False) in setup"
    return PASS, "no parameter requires a gradient"


def _evaluation_mode(probe: _Probe) -> Outcome:
    modules = networks(probe.reward)
    if not modules:
        return NOT_APPLICABLE, "it holds no torch module"
    if any(part.training for module in modules for part in module.modules()):
        return FAIL, "a module is in training mode, so dropout is on: call network.eval() in setup"
    return PASS, "every module is in evaluation mode"


_FIRST_POINTS: tuple[tuple[str, Callable[[RewardOutput], Outcome]], ...] = (
    ("float32 scores", _float32),
    ("finite scores", _finite),
)
_POINTS: tuple[tuple[str, Callable[[_Probe], Outcome]], ...] = (
    ("input left alone", _input_unchanged),
    ("order of the batch", _permutation),
    ("size of the batch", _split),
    ("other samples", _independent),
    ("repetition", _repeatable),
    ("prompts", _prompts),
    ("image sizes", _sizes),
    ("one broken sample", _one_broken),
    ("gradient", _gradient),
    ("frozen parameters", _frozen),
    ("evaluation mode", _evaluation_mode),
)
