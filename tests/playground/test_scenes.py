"""Scenes: layout rules, held-out pairs, and rendering that covers the area that geometry says."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from align.playground.scenes import (
    ALL_PAIRS,
    CATEGORIES,
    COLORS,
    GAP,
    HELD_OUT_PAIRS,
    MARGIN,
    SEEN_PAIRS,
    SHAPES,
    SIZE,
    Obj,
    Scene,
    relation_holds,
    render,
    sample_scene,
)


def scenes(n: int, held_out: bool | None = None, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out) for _ in range(n)]


def test_held_out_pairs_spread_over_colours_and_leave_each_shape_and_colour_seen():
    assert len(ALL_PAIRS) == 30
    assert sorted(c for c, _ in HELD_OUT_PAIRS) == sorted(COLORS)
    assert {c for c, _ in SEEN_PAIRS} == set(COLORS)
    assert {s for _, s in SEEN_PAIRS} == set(SHAPES)
    assert {s for _, s in HELD_OUT_PAIRS} == set(SHAPES)


def test_held_out_switch_decides_which_pairs_occur():
    seen = {o.pair for scene in scenes(1500, False) for o in scene.objects}
    assert seen == set(SEEN_PAIRS)
    for scene in scenes(500, True):
        assert any(o.pair in HELD_OUT_PAIRS for o in scene.objects)
    assert {o.pair for scene in scenes(1500, None) for o in scene.objects} == set(ALL_PAIRS)


def test_objects_stay_inside_and_apart():
    for scene in scenes(1000):
        for o in scene.objects:
            w, h = o.half_box
            assert w + MARGIN - 1e-6 <= o.x <= SIZE - MARGIN - w + 1e-6
            assert h + MARGIN - 1e-6 <= o.y <= SIZE - MARGIN - h + 1e-6
        for a, b in combinations(scene.objects, 2):
            (aw, ah), (bw, bh) = a.half_box, b.half_box
            assert max(abs(a.x - b.x) - aw - bw, abs(a.y - b.y) - ah - bh) >= GAP - 1e-6


def test_categories_hold_what_they_say():
    for scene in scenes(1000):
        pairs = [o.pair for o in scene.objects]
        if scene.category == "count":
            assert 2 <= len(pairs) <= 4
            assert len(set(pairs)) == 1
        else:
            assert len(pairs) == {"single": 1, "two": 2, "relation": 2, "three": 3}[scene.category]
            assert len(set(pairs)) == len(pairs)
        assert (scene.relation is not None) == (scene.category == "relation")
        if scene.relation:
            a, b = scene.objects
            held = [r for r in ("left", "right", "above", "below") if relation_holds(r, a.x - b.x, a.y - b.y)]
            assert held == [scene.relation]
    assert {s.category for s in scenes(200)} == set(CATEGORIES)


def test_sampling_and_rendering_repeat_with_the_seed():
    one, two = scenes(20, seed=4), scenes(20, seed=4)
    assert one == two
    assert all((render(a) == render(b)).all() for a, b in zip(one, two, strict=True))
    assert scenes(20, seed=5) != one


# Areas of the shapes at size 1, from their outlines: the disc, the annulus, the box, half base times height, and ten
# triangles between the centre, a tip and a notch.
AREAS = {
    "circle": np.pi,
    "ring": np.pi * (1.04**2 - 0.5**2),
    "square": 1.8**2,
    "triangle": 1.1 * 1.92,
    "star": 10 * 0.5 * 1.16 * 0.52 * np.sin(np.pi / 5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", [0.9, 1.1])
def test_antialiased_cover_sums_to_the_area(shape: str, aspect: float):
    scene = Scene((Obj(shape, "red", 31.3, 32.8, 12.0, aspect),), "single", background=(0.0, 0.0, 0.0))
    cover = render(scene)[:, :, 0].astype(float) / COLORS["red"][0]
    # Only pixels that hold a corner are covered inexactly: below 1.5 % of the area at this size.
    assert cover.sum() == pytest.approx(AREAS[shape] * 12.0**2, rel=0.015)


def test_render_is_dark_where_nothing_is_and_true_to_colour_inside():
    for scene in scenes(100):
        image = render(scene)
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.uint8
        assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() <= 60
        for o in scene.objects:
            inside = image[int(o.y), int(o.x - (0.77 * o.size * o.aspect**0.5 if o.shape == "ring" else 0.0))]
            assert np.abs(inside.astype(float) - COLORS[o.color]).max() <= 10


def test_moving_an_object_by_a_pixel_moves_its_picture():
    obj = Obj("star", "green", 30.2, 31.7, 9.0)
    here = render(Scene((obj,), "single"))
    there = render(Scene((replace(obj, x=31.2, y=29.7),), "single"))
    assert np.abs(here[2:, :-1].astype(int) - there[:-2, 1:]).max() <= 1


def test_unknown_category_is_refused():
    with pytest.raises(ValueError, match="unknown category 'pair'"):
        sample_scene(np.random.default_rng(0), category="pair")
