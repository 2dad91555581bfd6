"""Captions of scenes, the parser that inverts them, and the prompt sets.

A spec is the JSON-able target that the verifier checks:
`{"category": str, "objects": [{"color", "shape", "count"}, ...], "relation": "left"|"right"|"above"|"below"|None}`.
Objects stand in caption order where a relation holds of the first to the second, else sorted by (colour, shape).
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np

from align.playground.scenes import CATEGORIES, COLORS, HELD_OUT_PAIRS, SHAPES, Scene, sample_scene

Spec = dict[str, Any]

NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}
MAX_TOKENS = 14

# Every word of the world, each one token of the text encoders. The shipped weights fix this list and its order.
WORDS: tuple[str, ...] = (
    "a", "an", "one", *NUMBERS.values(),
    *COLORS, *SHAPES, *(s + "s" for s in SHAPES),
    "and", "with", ",",
    "left", "right", "above", "below", "over", "under", "to", "the", "of",
    "picture", "there", "is", "are",
)  # fmt: skip

_RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "is left of", "is to the left of"),
    "right": ("right of", "to the right of", "is right of", "is to the right of"),
    "above": ("above", "is above", "over"),
    "below": ("below", "is below", "under"),
}
_PHRASE_TO_RELATION = {p: r for r, phrases in _RELATION_PHRASES.items() for p in phrases}
_COLOR, _SHAPE = "|".join(COLORS), "|".join(SHAPES)
_THING = rf"(?:an?|one) ({_COLOR}) ({_SHAPE})"
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("single", re.compile(_THING)),
    ("count", re.compile(rf"({'|'.join(NUMBERS.values())}) ({_COLOR}) ({_SHAPE})s")),
    ("two", re.compile(rf"{_THING} (?:and|with) {_THING}")),
    ("relation", re.compile(rf"{_THING} ({'|'.join(_PHRASE_TO_RELATION)}) {_THING}")),
    ("three", re.compile(rf"{_THING} (?:,|and|with) {_THING} (?:, )?and {_THING}")),
)
_INTRO = re.compile(r"(?:a picture of|there is|there are) ")

SPLITS: tuple[str, ...] = ("train", "seen_test", "heldout_test")
_DEFAULT_SIZE = {"train": 1024, "seen_test": 256, "heldout_test": 256}
_CYCLE = ("relation", "two", "count", "three", "relation", "two", "single", "three", "relation", "count")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the scene's paraphrases, at most 14 tokens; the plain form most often."""
    things = [_thing(o.color, o.shape) for o in scene.objects]
    plain = rng.random() < 0.6
    intro = "" if plain or rng.random() < 0.5 else "a picture of "
    if scene.category == "single":
        forms = (things[0], "one " + things[0].split(" ", 1)[1], "there is " + things[0])
        return intro + things[0] if intro or plain else _pick(rng, forms)
    if scene.category == "count":
        o = scene.objects[0]
        body = f"{NUMBERS[len(things)]} {o.color} {o.shape}s"
        return intro + body if intro or plain else "there are " + body
    if scene.category == "relation":
        phrases = _RELATION_PHRASES[str(scene.relation)]
        # The longest phrase with an intro would exceed the token limit, so only plain phrases get one.
        phrase = phrases[0] if plain or intro else _pick(rng, phrases)
        return f"{intro}{things[0]} {phrase} {things[1]}"
    order = [things[i] for i in rng.permutation(len(things))]
    if scene.category == "two":
        return f"{intro}{order[0]} {'with' if not plain and not intro else 'and'} {order[1]}"
    return f"{intro}{order[0]}, {order[1]} and {order[2]}"


def _thing(color: str, shape: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def tokens(text: str) -> list[str]:
    """Words of a caption in lower case, a comma being a word of its own; a final full stop is dropped."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower().strip().removesuffix("."))


def make_spec(category: str, pairs: list[tuple[str, str]], count: int = 1, relation: str | None = None) -> Spec:
    """Spec of (colour, shape) pairs in canonical order; `count` is the number of each."""
    ordered = pairs if category == "relation" else sorted(pairs)
    return {
        "category": category,
        "objects": [{"color": c, "shape": s, "count": count} for c, s in ordered],
        "relation": relation,
    }


def spec_of(scene: Scene) -> Spec:
    """The spec that a scene satisfies and that its captions ask for."""
    pairs = [o.pair for o in scene.objects]
    if scene.category == "count":
        return make_spec("count", pairs[:1], len(pairs))
    return make_spec(scene.category, pairs, relation=scene.relation)


def parse(text: str) -> Spec:
    """The spec a caption asks for, from its text alone. Raises ValueError for text outside the grammar."""
    body = _INTRO.sub("", " ".join(tokens(text)), count=1) if text else ""
    for category, pattern in _PATTERNS:
        match = pattern.fullmatch(body)
        if match is None:
            continue
        words = list(match.groups())
        if category == "count":
            number = next(n for n, word in NUMBERS.items() if word == words[0])
            return make_spec("count", [(words[1], words[2])], number)
        relation = _PHRASE_TO_RELATION[words.pop(2)] if category == "relation" else None
        pairs = list(zip(words[::2], words[1::2], strict=True))
        if len(set(pairs)) == len(pairs):
            return make_spec(category, pairs, relation=relation)
    raise ValueError(
        f"the playground cannot read the prompt {text!r}; write for example 'three blue stars', "
        "'a red circle and a green square' or 'a red circle left of a green square'"
    )


def _is_test(text: str, spec: Spec) -> bool:
    """Whether a seen prompt belongs to the test split: one fifth of the contents, chosen by a stable hash.

    A single object has only 24 contents, so there the wording decides: strings are disjoint, contents are not.
    """
    if spec["category"] == "single":
        key = text
    else:
        names = [f"{o['count']} {o['color']} {o['shape']}" for o in spec["objects"]]
        relation = spec["relation"] or ""
        if relation in ("right", "below"):  # the converse says the same of the same picture
            names.reverse()
            relation = {"right": "left", "below": "above"}[relation]
        key = f"{relation}:{','.join(names)}"
    return zlib.crc32(key.encode()) % 5 == 0


def prompts(split: str, n: int | None = None) -> list[dict[str, Any]]:
    """A fixed prompt set: `[{"prompt": str, "metadata": spec}, ...]` of distinct strings.

    split: "train" and "seen_test" hold seen colour-shape pairs only and share no string (and, but for single
    objects, no content); every "heldout_test" prompt has at least one held-out pair. n defaults to 1024 / 256 / 256,
    and a shorter set is a prefix of a longer one. Categories come in a fixed cycle; small ones run out first.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown prompt split {split!r}; choose from {', '.join(SPLITS)}")
    wanted = _DEFAULT_SIZE[split] if n is None else n
    rng = np.random.default_rng([2026, SPLITS.index(split)])
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    exhausted: set[str] = set()
    turn = 0
    while len(rows) < wanted:
        category = _CYCLE[turn % len(_CYCLE)]
        turn += 1
        if category in exhausted:
            if len(exhausted) == len(CATEGORIES):
                raise ValueError(f"split {split!r} has only {len(rows)} distinct prompts, {wanted} were asked for")
            continue
        for _ in range(200):
            scene = sample_scene(rng, held_out=split == "heldout_test", category=category)
            text, spec = caption(scene, rng), spec_of(scene)
            fits = split == "heldout_test" or _is_test(text, spec) == (split == "seen_test")
            if fits and text not in seen:
                seen.add(text)
                rows.append({"prompt": text, "metadata": spec})
                break
        else:
            exhausted.add(category)
    return rows


def has_held_out_pair(spec: Spec) -> bool:
    """Whether the spec names at least one colour-shape pair that pre-training never showed."""
    return any((o["color"], o["shape"]) in HELD_OUT_PAIRS for o in spec["objects"])
