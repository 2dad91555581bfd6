"""GenEval (arXiv 2310.11513) as a reward: are the asked objects there, in number, colour and position?

The score is a pure function of what a detector found. The dense form is the one of Flow-GRPO (arXiv 2505.05470). Both forms
ask for the exact number everywhere, so they are stricter than the benchmark's own metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, nearest
from rewards.detector import DEFAULT_DETECTOR, ColorNamer, Instance, InstanceDetector

RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MARGIN = 0.1
"""Share of the two sizes by which centres must differ before a direction counts."""

Box = tuple[float, float, float, float]

_MODES = ("dense", "strict")
# GenEval's prompts call three classes otherwise than COCO.
_COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


class Found(NamedTuple):
    """One detected object: (left, top, right, bottom) in pixels, and its colour where a clause asks for one."""

    box: Box
    color: str | None = None


@dataclass(frozen=True)
class Clause:
    """One entry of a prompt's `include`: so many of a class, of a colour, in a relation to the objects of a clause."""

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None
    """(relation, index of an earlier clause)."""


@dataclass(frozen=True)
class GenEvalScore:
    """The two scores of an image."""

    dense: float
    """Mean of `terms`; negative where far too many objects are found."""
    strict: bool
    """Every number exact, every colour and relation right."""
    terms: tuple[float, ...]


def geneval_score(
    objects: Mapping[str, Sequence[Found]], clauses: Sequence[Clause], compat_position_bug: bool = False
) -> GenEvalScore:
    """Score the objects of each class, already above their threshold, against at least one clause.

    Each clause of count q with n found gives 1 - |q - n| / q. If n = q, a colour gives 1 - |q - n_colour| / q, and where
    that is 1 a position gives 1 or 0: the relation must hold between all its objects and all of the clause it names.
    If n differs from q, a clause with colour or position gives one 0. Clauses of `exclude` play no part.

    compat_position_bug: a wrong relation gives 0 and also 1, as the server of Flow-GRPO released it.
    """
    terms: list[float] = []
    matched: list[Sequence[Found] | None] = []
    for clause in clauses:
        found = objects.get(clause.name, ())
        terms.append(1 - abs(clause.count - len(found)) / clause.count)
        right = len(found) == clause.count
        if not right and (clause.color is not None or clause.position is not None):
            terms.append(0.0)
        if right and clause.color is not None:
            named = sum(each.color == clause.color for each in found)
            terms.append(1 - abs(clause.count - named) / clause.count)
            right = named == clause.count
        if right and clause.position is not None:
            relation, target = clause.position
            others = matched[target]
            right = others is not None and all(relation in relations(a.box, b.box) for a in found for b in others)
            terms.append(float(right))
            if compat_position_bug and not right and others is not None:
                terms.append(1.0)
        matched.append(found if right else None)
    return GenEvalScore(sum(terms) / len(terms), all(group is not None for group in matched), tuple(terms))


def relations(a: Box, b: Box, margin: float = MARGIN) -> set[str]:
    """Where box `a` lies as seen from box `b`: at most one of left of / right of, and one of above / below.

    The offset of the centres, shortened in each axis by margin * (size of a + size of b), is divided by the length of the
    whole offset; a component beyond 0.5 is a relation.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    length = math.hypot(*offset)
    if length == 0:
        return set()
    x, y = (math.copysign(max(abs(o) - margin * s, 0.0), o) / length for o, s in zip(offset, sizes, strict=True))
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


def read_clauses(metadata: Mapping[str, Any]) -> list[Clause]:
    """The clauses of GenEval's metadata, `{"include": [{"class", "count", "color", "position"}, ...]}`.

    Raises: ValueError, with the reason, if there is none or one makes no sense.
    """
    include = metadata.get("include")
    if not isinstance(include, Sequence) or not include:
        raise ValueError("the prompt's metadata has no include")
    clauses: list[Clause] = []
    for entry in include:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
            raise ValueError("an entry of include names no class")
        count, color, position = entry.get("count", 1), entry.get("color"), entry.get("position")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a positive integer, got {count!r}")
        if color is not None and color not in COLORS:
            raise ValueError(f"color must be one of {', '.join(COLORS)}, got {color!r}")
        if position is not None:
            position = _position(position, len(clauses))
        clauses.append(Clause(entry["class"], count, color, position))
    return clauses


def _position(position: Any, index: int) -> tuple[str, int]:
    if isinstance(position, Sequence) and len(position) == 2:
        relation, target = position
        if relation in RELATIONS and isinstance(target, int) and 0 <= target < index:
            return str(relation), target
    raise ValueError(f"position must be [{' | '.join(RELATIONS)}, index of an earlier entry], got {position!r}")


class GenEvalReward(Reward):
    """`geneval_score` of what a COCO instance detector finds, from the metadata of GenEval's prompt files.

    Objects count above a confidence of `threshold`, or `count_threshold` where the metadata's tag is "counting". The
    detector is Mask2Former Swin-S through transformers, which has the architecture of GenEval's own and other weights:
    compare scores of one detector only. Colours are named by CLIP on the object cut out on grey. A prompt without
    `include`, or with a class the detector does not know, has no score; `info["problem"]` says why. Components: "dense"
    and "strict".
    """

    name = "geneval"
    uses_prompt = False  # the metadata says what is asked
    max_batch = 8

    def __init__(
        self,
        mode: str = "dense",
        detector: str = DEFAULT_DETECTOR,
        clip: Mapping[str, Any] | None = None,
        threshold: float = 0.3,
        count_threshold: float = 0.9,
        max_objects: int = 16,
        compat_position_bug: bool = False,
    ) -> None:
        """mode: dense or strict; detector: folder or hub id of a Mask2Former for instances, in the format of transformers;
        clip: model and pretrained, or config and pretrained, as of the reward clip (default: OpenAI's ViT-L-14);
        max_objects: most of one class, the most confident ones.
        """
        if mode not in _MODES:
            raise RewardError(f"mode '{mode}' must be dense or strict{nearest(mode, _MODES)}")
        if not 0 <= threshold < 1 or not 0 <= count_threshold < 1 or max_objects < 1:
            raise RewardError("threshold and count_threshold must be in [0, 1), max_objects 1 or more")
        self.mode, self.compat_position_bug = mode, compat_position_bug
        self.threshold, self.count_threshold, self.max_objects = threshold, count_threshold, max_objects
        self.detector = InstanceDetector(detector)
        self.colors = ColorNamer(COLORS, clip)

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load detector and CLIP, both in float32. Raises: RewardError if a package or weights are missing."""
        self.detector.setup(self.name, device)
        self.colors.setup(self.name, device)

    def score(self, batch: RewardBatch) -> RewardOutput:
        size = len(batch)
        dense, strict, problems = torch.full((size,), torch.nan), torch.full((size,), torch.nan), [""] * size
        asked: dict[int, list[Clause]] = {}
        for i, metadata in enumerate(batch.metadata):
            try:
                asked[i] = self._known(read_clauses(metadata))
            except ValueError as error:
                problems[i] = str(error)
            if not bool(batch.images[i].isfinite().all()):
                asked.pop(i, None)
                problems[i] = "pixels are not finite"
        if asked:
            images = batch.images[list(asked)]
            lowest = min(self.threshold, self.count_threshold)
            for (i, clauses), image, found in zip(asked.items(), images, self.detector(images, lowest), strict=True):
                counting = batch.metadata[i].get("tag") == "counting"
                objects = self._objects(image, clauses, found, self.count_threshold if counting else self.threshold)
                result = geneval_score(objects, clauses, self.compat_position_bug)
                dense[i], strict[i] = result.dense, float(result.strict)
        scores = dense if self.mode == "dense" else strict
        return RewardOutput(scores, {"dense": dense, "strict": strict}, info={"problem": problems})

    def _known(self, clauses: Sequence[Clause]) -> list[Clause]:
        """The clauses under the detector's names. Raises: ValueError for a class it does not know."""
        renamed = []
        for clause in clauses:
            name = clause.name if clause.name in self.detector.names else _COCO_NAMES.get(clause.name, clause.name)
            if name not in self.detector.names:
                raise ValueError(f"the detector knows no '{clause.name}'{nearest(clause.name, self.detector.names)}")
            renamed.append(replace(clause, name=name))
        return renamed

    def _objects(
        self, image: Tensor, clauses: Sequence[Clause], found: Mapping[str, Sequence[Instance]], threshold: float
    ) -> dict[str, list[Found]]:
        """The objects that count; colours only of the classes a clause asks the colour of."""
        objects = {}
        for name in dict.fromkeys(clause.name for clause in clauses):
            kept = [instance for instance in found.get(name, ()) if instance.confidence > threshold]
            kept = sorted(kept, key=lambda instance: -instance.confidence)[: self.max_objects]
            wanted = any(clause.name == name and clause.color is not None for clause in clauses)
            colors = self.colors(image, kept, name) if wanted and kept else [None] * len(kept)
            objects[name] = [Found(instance.box, color) for instance, color in zip(kept, colors, strict=True)]
        return objects
