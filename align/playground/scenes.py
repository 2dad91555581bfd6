"""Procedural 64x64 scenes of coloured shapes: what they hold, how they are laid out, how they are drawn.

Coordinates are pixels with x to the right and y downwards; pixel (i, j) has its centre at (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

SIZE = 64
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (226, 42, 46),
    "green": (44, 182, 66),
    "blue": (52, 98, 236),
    "yellow": (246, 224, 62),
    "purple": (176, 72, 220),
    "orange": (246, 134, 24),
}
CATEGORIES: tuple[str, ...] = ("single", "count", "two", "relation", "three")
RELATIONS: tuple[str, ...] = ("left", "right", "above", "below")

# Each colour once; each shape and each colour still occurs in other pairs, so only the combination is new.
HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = (
    ("red", "triangle"),
    ("green", "ring"),
    ("blue", "square"),
    ("yellow", "star"),
    ("purple", "circle"),
    ("orange", "square"),
)
ALL_PAIRS: tuple[tuple[str, str], ...] = tuple((c, s) for c in COLORS for s in SHAPES)
SEEN_PAIRS: tuple[tuple[str, str], ...] = tuple(p for p in ALL_PAIRS if p not in HELD_OUT_PAIRS)

GAP = 4.0  # least free space between the bounding boxes of two objects, in pixels
MARGIN = 2.0  # least free space to the image border, in pixels

_CATEGORY_WEIGHTS = (0.16, 0.20, 0.20, 0.26, 0.18)
_RADII = {1: (10.0, 16.0), 2: (8.5, 12.5), 3: (8.0, 11.0), 4: (8.0, 10.5)}

# Half-width and half-height of each shape's bounding box at size 1; all have a similar visual weight.
_STAR_OUTER, _STAR_INNER = 1.16, 0.52
_HALF_BOX: dict[str, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (0.9, 0.9),
    "triangle": (1.1, 0.96),
    "star": (_STAR_OUTER * float(np.sin(np.pi * 0.4)), _STAR_OUTER * (1 + float(np.cos(np.pi * 0.2))) / 2),
    "ring": (1.04, 1.04),
}
_RING_INNER = 0.5


@dataclass(frozen=True)
class Obj:
    """One object: centre (x, y) of its bounding box and `size` in pixels; `aspect` is width over height."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    aspect: float = 1.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return (self.color, self.shape)

    @property
    def half_box(self) -> tuple[float, float]:
        """Half-width and half-height of the bounding box in pixels."""
        w, h = _HALF_BOX[self.shape]
        a = self.aspect**0.5
        return w * self.size * a, h * self.size / a


@dataclass(frozen=True)
class Scene:
    """Objects in the order in which a caption names them; `relation` holds of objects[0] to objects[1]."""

    objects: tuple[Obj, ...]
    category: str
    relation: str | None = None
    background: tuple[float, float, float] = (28.0, 28.0, 32.0)
    slope: tuple[float, float] = field(default=(0.0, 0.0))


def relation_holds(relation: str, dx: float, dy: float, *, least: float = 6.0, slack: float = 0.75) -> bool:
    """Whether an object at offset (dx, dy) pixels from another stands left / right / above / below of it.

    The offset along the relation's axis must be at least `least` pixels and `slack` times the offset across it.
    """
    along, across = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= least and along >= slack * abs(across)


def sample_scene(rng: np.random.Generator, held_out: bool | None = False, category: str | None = None) -> Scene:
    """Draw a scene.

    held_out: False uses seen colour-shape pairs only, True has at least one held-out pair, None any pairs.
    category: one of CATEGORIES, or None to draw one. Raises ValueError for an unknown category.
    """
    if category is None:
        category = CATEGORIES[int(np.searchsorted(np.cumsum(_CATEGORY_WEIGHTS[:-1]), rng.random(), side="right"))]
    elif category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; choose from {', '.join(CATEGORIES)}")
    pairs = _draw_pairs(rng, held_out, category)
    relation = RELATIONS[int(rng.integers(4))] if category == "relation" else None
    objects = _layout(rng, pairs, relation)
    level = rng.uniform(14.0, 42.0)
    r, g, b = (level + rng.uniform(-6.0, 6.0, 3)).tolist()
    sx, sy = rng.uniform(-7.0, 7.0, 2).tolist()
    return Scene(objects, category, relation, (r, g, b), (sx, sy))


def _draw_pairs(rng: np.random.Generator, held_out: bool | None, category: str) -> list[tuple[str, str]]:
    pool = SEEN_PAIRS if held_out is False else ALL_PAIRS
    distinct = {"single": 1, "count": 1, "two": 2, "relation": 2, "three": 3}[category]
    if held_out:
        chosen = [HELD_OUT_PAIRS[int(rng.integers(len(HELD_OUT_PAIRS)))]]
    else:
        chosen = []
    while len(chosen) < distinct:
        pair = pool[int(rng.integers(len(pool)))]
        if pair not in chosen:
            chosen.append(pair)
    if held_out and distinct > 1:
        chosen = [chosen[i] for i in rng.permutation(distinct)]
    return chosen * int(rng.integers(2, 5)) if category == "count" else chosen


def _layout(rng: np.random.Generator, pairs: list[tuple[str, str]], relation: str | None) -> tuple[Obj, ...]:
    """Place the objects by rejection; a crowded start is drawn again, a little smaller each time."""
    n = len(pairs)
    low, high = _RADII[n]
    shrink = 1.0
    while True:
        base = rng.uniform(low, high)
        objects: list[Obj] = []
        u = rng.random((n, 24, 2)).tolist()
        style = rng.random((n, 5)).tolist()
        for (color, shape), tries, (s, a, t0, t1, t2) in zip(pairs, u, style, strict=True):
            # Equal objects of a count share their size but for a little jitter, as a reader expects.
            size = shrink * base * (0.94 + 0.12 * s)
            aspect = 0.89 + 0.23 * a
            tint = (16 * t0 - 8, 16 * t1 - 8, 16 * t2 - 8)
            w, h = Obj(shape, color, 0.0, 0.0, size, aspect).half_box
            for ux, uy in tries:
                x = MARGIN + w + ux * (SIZE - 2 * (MARGIN + w))
                y = MARGIN + h + uy * (SIZE - 2 * (MARGIN + h))
                new = Obj(shape, color, x, y, size, aspect, tint)
                if all(_apart(new, old) for old in objects) and (
                    relation is None or not objects or _clearly(relation, objects[0], new)
                ):
                    objects.append(new)
                    break
            else:
                break
        if len(objects) == n:
            return tuple(objects)
        shrink = max(0.97 * shrink, 0.9)


def _apart(a: Obj, b: Obj) -> bool:
    (aw, ah), (bw, bh) = a.half_box, b.half_box
    return abs(a.x - b.x) >= aw + bw + GAP or abs(a.y - b.y) >= ah + bh + GAP


def _clearly(relation: str, a: Obj, b: Obj) -> bool:
    """A stricter form of the relation than the verifier asks, so that no scene is a borderline case."""
    return relation_holds(relation, a.x - b.x, a.y - b.y, least=14.0, slack=1.6)


@lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray]:
    c = np.arange(SIZE, dtype=np.float32) + 0.5
    return c[None, :], c[:, None]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to a shape of size 1 centred on its bounding box; x, y broadcast.

    Exact near edges, which is where antialiasing needs it; outside of corners it is a lower bound.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 1.0
    if shape == "ring":
        outer = _HALF_BOX["ring"][0]
        return np.abs(np.sqrt(x * x + y * y) - (outer + _RING_INNER) / 2) - (outer - _RING_INNER) / 2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - _HALF_BOX["square"][0]
    if shape == "triangle":
        w, h = _HALF_BOX["triangle"]
        norm = (w * w + 4 * h * h) ** 0.5
        return np.maximum((2 * h * np.abs(x) - w * (y + h)) / norm, y - h)
    if shape == "star":
        # Fold the plane into one tenth of the star, where its outline is a single straight edge.
        y = y + (_HALF_BOX["star"][1] - _STAR_OUTER)
        radius = np.sqrt(x * x + y * y)
        fold = np.abs((np.arctan2(x, -y) + np.pi / 5) % (np.pi * 0.4) - np.pi / 5)
        ex = _STAR_INNER * np.cos(np.pi / 5) - _STAR_OUTER
        ey = _STAR_INNER * np.sin(np.pi / 5)
        return (ey * (radius * np.cos(fold) - _STAR_OUTER) - ex * (radius * np.sin(fold))) / np.hypot(ex, ey)
    raise ValueError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 (64, 64, 3), antialiased over one pixel by signed distances."""
    xs, ys = _grid()
    ramp = scene.slope[0] * (xs / SIZE - 0.5) + scene.slope[1] * (ys / SIZE - 0.5)
    image = ramp[:, :, None] + np.asarray(scene.background, np.float32)
    for o in scene.objects:
        w, h = o.half_box
        x0, x1 = max(int(o.x - w - 1), 0), min(int(o.x + w + 2), SIZE)
        y0, y1 = max(int(o.y - h - 1), 0), min(int(o.y + h + 2), SIZE)
        a = o.aspect**0.5
        x = (xs[:, x0:x1] - np.float32(o.x)) * np.float32(1 / (o.size * a))
        y = (ys[y0:y1] - np.float32(o.y)) * np.float32(a / o.size)
        cover = np.clip(0.5 - np.float32(o.size) * signed_distance(o.shape, x, y), 0.0, 1.0)[:, :, None]
        fill = np.asarray(COLORS[o.color], np.float32) + np.asarray(o.tint, np.float32)
        window = image[y0:y1, x0:x1]
        window += cover * (fill - window)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
