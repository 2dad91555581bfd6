"""The verifier: right on ground truth, tolerant of softness, strict on everything else, and a reward."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.playground.captions import caption, make_spec, spec_of
from align.playground.reader import MIN_AREA, Reading, blur, read, wobble
from align.playground.scenes import COLORS, RELATIONS, SHAPES, Obj, Scene, relation_holds, render, sample_scene
from align.playground.verifier import VerifierReward, contact_sheet, judge, verify, verify_batch
from rewards.base import RewardBatch, checked_score

CHUNK = 100


@cache
def world(n: int = 4000) -> tuple[list[Scene], np.ndarray, list[Reading]]:
    """Scenes with any pairs, their renders and what the reader says of them."""
    rng = np.random.default_rng(11)
    scenes = [sample_scene(rng, held_out=None) for _ in range(n)]
    images = np.stack([render(s) for s in scenes])
    return scenes, images, [r for i in range(0, n, CHUNK) for r in read(images[i : i + CHUNK])]


def share_full(scenes: list[Scene], images: np.ndarray) -> float:
    full = 0
    for i in range(0, len(images), CHUNK):
        part = [spec_of(s) for s in scenes[i : i + CHUNK]]
        full += sum(v.full for v in verify_batch(images[i : i + CHUNK], part))
    return full / len(images)


def draw(*objects: Obj, **kwargs) -> np.ndarray:
    return render(Scene(objects, "two", **kwargs))


def test_ground_truth_is_a_full_match():
    scenes, _, readings = world()
    verdicts = [judge(r, spec_of(s)) for r, s in zip(readings, scenes, strict=True)]
    assert np.mean([v.full for v in verdicts]) >= 0.995
    assert all((v.graded == 1.0) == v.full for v in verdicts)


def test_captions_of_other_scenes_are_not():
    scenes, _, readings = world()
    specs = [spec_of(s) for s in scenes]
    graded, full = [], []
    for shift in (1, 2, 3):
        for reading, own, other in zip(readings, specs, specs[shift:] + specs[:shift], strict=True):
            if own != other:
                verdict = judge(reading, other)
                assert (verdict.graded == 1.0) == verdict.full
                graded.append(verdict.graded)
                full.append(verdict.full)
    # A few of them are true by chance: a relation's picture also shows the two objects.
    assert np.mean(full) <= 0.002
    assert np.mean(graded) < 0.25


def near_misses(scene: Scene, rng: np.random.Generator) -> list[dict]:
    """Specs that differ from the scene's own in one attribute and are wrong of it."""
    pairs = [o.pair for o in scene.objects]
    if scene.category == "count":
        n, (c, s) = len(pairs), pairs[0]
        specs = [make_spec("count", [(c, s)], k) for k in (2, 3, 4) if k != n]
        specs += [make_spec("count", [(d, s)], n) for d in COLORS if d != c]
        return specs + [make_spec("count", [(c, t)], n) for t in SHAPES if t != s]
    i = int(rng.integers(len(pairs)))
    color, shape = pairs[i]
    changed = [(c, shape) for c in COLORS if c != color] + [(color, s) for s in SHAPES if s != shape]
    specs = [
        make_spec(scene.category, [*pairs[:i], new, *pairs[i + 1 :]], relation=scene.relation)
        for new in changed
        if new not in pairs
    ]
    if len(pairs) > 1:  # one object too many in the picture
        specs.append(make_spec("single", pairs[:1]))
    if scene.relation:
        specs += [make_spec("relation", pairs, relation=r) for r in RELATIONS if r != scene.relation]
        specs.append(make_spec("relation", pairs[::-1], relation=scene.relation))
    return specs


def test_captions_wrong_in_one_attribute_are_not():
    scenes, _, readings = world()
    rng = np.random.default_rng(0)
    full = []
    for scene, reading in list(zip(scenes, readings, strict=True))[:1500]:
        full += [judge(reading, spec).full for spec in near_misses(scene, rng)]
    assert len(full) > 10_000
    assert np.mean(full) <= 0.002


@pytest.mark.parametrize("aspect", [0.85, 1.0, 1.15])
def test_soft_and_bent_renders_still_match(aspect: float):
    scenes, images, _ = world()
    part = slice(0, 500)
    bent = wobble(images[part], np.random.default_rng(1), amplitude=1.0, aspect=aspect)
    assert share_full(scenes[part], bent) >= 0.97
    assert share_full(scenes[part], blur(bent, 1.0)) >= 0.97


def test_blurred_dim_and_noisy_renders_still_match():
    scenes, images, _ = world()
    scenes, images = scenes[:500], images[:500]
    rng = np.random.default_rng(2)
    noisy = np.clip(blur(images, 0.8) + rng.normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    for changed in (blur(images, 1.0), (images * 0.8).astype(np.uint8), noisy):
        assert share_full(scenes, changed) >= 0.97


@pytest.mark.parametrize("level", [0, 30, 128, 255])
def test_blank_scores_zero(level: int):
    image = np.full((64, 64, 3), level, np.uint8)
    for scene in world()[0][:50]:
        verdict = verify(image, spec_of(scene))
        assert verdict.graded == 0.0
        assert not verdict.full


def test_noise_scores_next_to_nothing():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    verdicts = verify_batch(noise, [spec_of(s) for s in world()[0][:60]])
    assert np.mean([v.graded for v in verdicts]) < 0.05


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8, 32]), st.sampled_from([2, 3, 256]))
def test_any_image_is_read_without_errors(seed: int, block: int, levels: int):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, levels, (2, 64 // block, 64 // block, 3)) * (255 // (levels - 1))
    images = coarse.repeat(block, 1).repeat(block, 2).astype(np.uint8)
    for verdict in verify_batch(images, [make_spec("count", [("red", "star")], 3)] * 2):
        assert 0.0 <= verdict.graded <= 1.0
        assert (verdict.graded == 1.0) == verdict.full
        assert all(np.isfinite(list(o.shape_distances.values())).all() for o in verdict.objects)


def test_reading_does_not_depend_on_the_batch():
    _, images, readings = world()
    assert [read(image[None])[0] for image in images[:30]] == readings[:30]


A, B, C = Obj("circle", "red", 16, 16, 9), Obj("square", "green", 46, 20, 9), Obj("star", "blue", 32, 48, 9)
THREE = make_spec("three", [A.pair, B.pair, C.pair])


def test_each_object_that_is_put_right_raises_the_score():
    steps = [
        draw(),
        draw(replace(A, color="purple", shape="ring")),
        draw(replace(A, color="purple")),
        draw(A),
        draw(A, replace(B, shape="triangle")),
        draw(A, B),
        draw(A, B, replace(C, color="yellow")),
        draw(A, B, C),
    ]
    graded = [verify(image, THREE).graded for image in steps]
    assert graded[0] == 0.0
    assert graded[-1] == 1.0
    assert all(later > earlier + 0.01 for earlier, later in zip(graded, graded[1:], strict=False))


def test_wrong_binding_is_not_a_match():
    swapped = draw(replace(A, color="green"), replace(B, color="red"))
    verdict = verify(swapped, make_spec("two", [A.pair, B.pair]))
    assert not verdict.full
    assert 0.2 < verdict.graded < 0.6


def test_extra_objects_are_punished_more_the_more_there_are():
    single = make_spec("single", [A.pair])
    graded = [verify(draw(*objects), single).graded for objects in ((A,), (A, B), (A, B, C))]
    assert graded[0] == 1.0
    assert graded[1] < 0.5
    assert graded[2] < graded[1] - 0.05
    assert not verify(draw(A, replace(A, x=46.0)), single).full


def test_specks_are_ignored_until_they_cover_more_than_an_object_hides():
    single = make_spec("single", [A.pair])
    image = draw(A)
    side = int(MIN_AREA**0.5) - 1
    spots = [(y, x) for y in (40, 50, 58) for x in (8, 20, 32, 44, 56)]
    image[spots[0][0] : spots[0][0] + side, spots[0][1] : spots[0][1] + side] = COLORS["blue"]
    assert verify(image, single).full
    for y, x in spots:
        image[y : y + side, x : x + side] = COLORS["blue"]
    assert not verify(image, single).full


def test_counts_fall_off_on_both_sides():
    ring = [Obj("ring", "yellow", x, y, 9) for x, y in ((16, 16), (46, 16), (16, 46), (46, 46))]
    graded = [verify(draw(*ring[:n]), make_spec("count", [ring[0].pair], 3)).graded for n in range(5)]
    assert graded[3] == 1.0
    assert graded[0] == 0.0
    assert graded[1] < graded[2] < 1.0
    assert graded[4] < 1.0


def test_relation_counts_once_both_objects_are_there():
    left = Obj("circle", "red", 14, 32, 9)
    right = Obj("square", "green", 50, 34, 9)
    specs = {r: make_spec("relation", [left.pair, right.pair], relation=r) for r in RELATIONS}
    verdicts = {r: verify(draw(left, right), s) for r, s in specs.items()}
    assert [r for r, v in verdicts.items() if v.full] == ["left"]
    assert verdicts["right"].graded == pytest.approx(0.8 * 0.6)
    assert verify(draw(left), specs["left"]).graded < verdicts["right"].graded


def test_diagonal_neighbours_satisfy_at_most_the_relation_they_lean_to():
    assert relation_holds("left", -20, 10)
    assert not relation_holds("above", -20, 10)
    assert not relation_holds("left", -4, 0)


def test_a_blob_of_two_fused_shapes_is_one_object_and_no_shape():
    for gap in (14, 18):
        fused = draw(Obj("circle", "red", 32 - gap / 2, 32, 10), Obj("circle", "red", 32 + gap / 2, 32, 10))
        verdict = verify(fused, make_spec("count", [("red", "circle")], 2))
        assert not verdict.full
        assert [(o.color, o.shape) for o in verdict.objects] == [("red", None)]


def test_an_object_of_two_colours_has_none():
    image = draw(Obj("circle", "red", 32, 32, 14))
    half = image[:, 32:]
    half[half[:, :, 0] > 120] = COLORS["green"]
    (found,) = verify(image, make_spec("single", [("red", "circle")])).objects
    assert found.color is None


def test_objects_on_a_bright_background_are_read():
    image = draw(A, B, background=(200.0, 200.0, 200.0))
    assert verify(image, make_spec("two", [A.pair, B.pair])).full


@pytest.mark.parametrize(
    "spec",
    [{}, {"objects": [], "relation": None}, {"objects": [{"color": "pink", "shape": "circle"}], "relation": None},
     {"objects": [{"color": "red", "shape": "circle", "count": 9}], "relation": None},
     {"objects": [{"color": "red", "shape": "circle"}], "relation": "left"}],
)  # fmt: skip
def test_malformed_specs_and_images_are_refused(spec: dict):
    with pytest.raises(ValueError):
        verify(draw(A), spec)
    with pytest.raises(ValueError, match="uint8"):
        verify(draw(A).astype(np.float32), THREE)


def reward_batch(images: np.ndarray, prompts: list[str], metadata: list[dict] | None = None) -> RewardBatch:
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return RewardBatch(floats, prompts, metadata or [{} for _ in prompts], torch.zeros(len(prompts), dtype=torch.int64))


def test_reward_reads_the_prompt_where_there_is_no_metadata():
    scenes, images, readings = world()
    rng = np.random.default_rng(3)
    texts = [caption(s, rng) for s in scenes[1:41]]
    bare = checked_score(VerifierReward(), reward_batch(images[:40], texts))
    told = checked_score(VerifierReward(), reward_batch(images[:40], texts, [spec_of(s) for s in scenes[1:41]]))
    expected = [judge(r, spec_of(s)).graded for r, s in zip(readings[:40], scenes[1:41], strict=True)]
    assert bare.scores.tolist() == pytest.approx(expected)
    assert torch.equal(bare.scores, told.scores)
    assert torch.equal(bare.components["graded"], bare.scores)
    full = checked_score(VerifierReward(graded=False), reward_batch(images[:40], texts))
    assert torch.equal(full.scores, full.components["full"])
    assert torch.equal(full.scores == 1, bare.scores == 1)


def test_reward_gives_no_score_to_a_prompt_it_cannot_read():
    _, images, _ = world()
    output = checked_score(VerifierReward(), reward_batch(images[:2], ["a cat", "a red circle"]))
    assert output.valid.tolist() == [False, True]
    assert torch.isnan(output.scores[0])
    assert "a cat" in output.info["problem"][0]
    assert not checked_score(VerifierReward(), reward_batch(images[:2], ["a cat", "a dog"])).valid.any()


def test_reward_resizes_other_sizes_by_area_and_survives_nan():
    scenes, images, _ = world()
    texts = [caption(s, np.random.default_rng(0)) for s in scenes[:8]]
    large = images[:8].repeat(4, 1).repeat(4, 2)
    assert checked_score(VerifierReward(), reward_batch(large, texts)).scores.tolist() == [1.0] * 8
    batch = reward_batch(images[:8], texts)
    batch.images[0] = torch.nan
    assert checked_score(VerifierReward(), batch).scores.tolist() == [0.0] + [1.0] * 7


def test_contact_sheet_is_written(tmp_path):
    contact_sheet(tmp_path / "sub" / "sheet.png")
    assert (tmp_path / "sub" / "sheet.png").stat().st_size > 10_000
