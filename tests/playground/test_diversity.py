"""Diversity of a group's images: closed forms, the axioms of a metric, and agreement with brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.playground.diversity import (
    FAR,
    MOST_OBJECTS,
    layout_distances,
    layout_diversity,
    read_layouts,
)
from align.playground.reader import Found, Reading, read
from align.playground.scenes import COLORS, SHAPES, SIZE, render, sample_scene


def found(x: float, y: float, color: str | None = "red", shape: str | None = "circle") -> Found:
    return Found(x, y, 200.0, color, shape, dict.fromkeys(SHAPES, 2.0))


def reading(*objects: Found) -> Reading:
    return Reading(objects, 0)


def random_reading(rng: np.random.Generator, most: int = 4) -> Reading:
    colors, shapes = (None, *COLORS), (None, *SHAPES)
    return reading(
        *(
            found(*rng.uniform(0, SIZE, 2), colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))])
            for _ in range(rng.integers(most + 1))
        )
    )


def distance(a: Reading, b: Reading) -> float:
    return float(layout_distances([a], [b])[0])


def brute_force(a: Reading, b: Reading) -> float:
    """The definition, over every one-to-one matching."""
    few, many = sorted((a.objects, b.objects), key=len)
    if not many:
        return 0.0

    def cost(p: Found, q: Found) -> float:
        away = min(float(np.hypot(p.x - q.x, p.y - q.y)) / FAR, 1.0)
        return ((p.color != q.color) + (p.shape != q.shape) + away) / 3

    best = min(
        sum(cost(p, q) for p, q in zip(few, chosen, strict=True)) for chosen in itertools.permutations(many, len(few))
    )
    return (best + len(many) - len(few)) / len(many)


def test_layouts_that_differ_in_one_thing_have_the_stated_distance():
    base = reading(found(20, 20), found(40, 40, "blue", "star"))
    # Two objects: what one pair costs is divided by 3 terms and 2 objects.
    assert distance(base, reading(found(20, 20, "green"), base.objects[1])) == pytest.approx(1 / 6)
    assert distance(base, reading(found(20, 20, shape=None), base.objects[1])) == pytest.approx(1 / 6)
    assert distance(base, reading(found(20, 20 + FAR / 4), base.objects[1])) == pytest.approx(1 / 24)
    assert distance(base, reading(found(20, 63), base.objects[1])) == pytest.approx(1 / 6)  # farther than FAR
    assert distance(base, reading(*base.objects, found(5, 60))) == pytest.approx(1 / 3)
    assert distance(base, reading()) == 1.0
    assert distance(reading(), reading()) == 0.0


def test_the_order_of_the_objects_and_specks_do_not_count():
    a = reading(found(20, 20), found(40, 40, "blue", "star"), found(10, 50, None, "ring"))
    assert distance(a, replace(reading(*a.objects[::-1]), speck_area=90)) == 0.0


def test_distances_agree_with_brute_force_and_are_a_metric():
    rng = np.random.default_rng(0)
    pool = [random_reading(rng) for _ in range(24)]
    first, second = zip(*itertools.product(pool, pool), strict=True)
    table = layout_distances(first, second).reshape(24, 24)
    expected = np.array([brute_force(a, b) for a, b in zip(first, second, strict=True)]).reshape(24, 24)
    assert np.abs(table - expected).max() < 1e-12
    assert (np.diag(table) == 0).all()
    assert np.abs(table - table.T).max() < 1e-12
    assert table.max() <= 1.0
    through = (table[:, :, None] + table[None]).min(1)  # the shortest way over a third layout
    assert (table <= through + 1e-12).all()


def test_crowds_are_cut_to_the_largest_objects():
    rng = np.random.default_rng(1)
    crowd = reading(*(found(*rng.uniform(0, SIZE, 2)) for _ in range(MOST_OBJECTS + 3)))
    assert distance(crowd, reading(*crowd.objects[:MOST_OBJECTS])) == 0.0
    assert distance(crowd, reading(crowd.objects[0])) == pytest.approx(1 - 1 / MOST_OBJECTS)


def test_layout_diversity_of_pictures():
    rng = np.random.default_rng(2)
    scene = sample_scene(rng, category="single")
    (only,) = scene.objects
    moved = replace(scene, objects=(replace(only, x=SIZE - only.x, y=only.y),))
    others = [sample_scene(rng, category=category) for category in ("two", "three")]
    pictures = np.stack([render(s) for s in (scene, scene, moved, *others)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    readings = read_layouts(images)
    assert readings == read(pictures)
    pairs = [readings[i] for i in (0, 1, 0, 2, 3, 4)]
    same, shifted, different = layout_diversity(pairs, torch.tensor([0, 0, 1, 1, 2, 2])).tolist()
    assert same == 0.0
    # The verifier reads a centre to a pixel, which is 1 / FAR of a term.
    assert shifted == pytest.approx(min(abs(SIZE - 2 * only.x) / FAR, 1.0) / 3, abs=1 / FAR)
    assert different > 0.3


def test_a_wrong_number_of_group_ids_is_an_error():
    with pytest.raises(ValueError, match="one group id for each of 3 images"):
        layout_diversity([reading()] * 3, torch.zeros(2, dtype=torch.long))
