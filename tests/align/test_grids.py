"""Grids: what stands where, how large, and that nothing a prompt can hold breaks them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from align.grids import BEST, as_image, comparison_grid, format_score, image_sheet, save_png

RED, BLUE = (255, 0, 0), (0, 0, 255)
GREEN = tuple(int(BEST[i : i + 2], 16) for i in (1, 3, 5))


def solid(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def box_of(page: Image.Image, colour: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels of exactly `colour`; right and bottom are exclusive."""
    rows, columns = np.nonzero((np.asarray(page) == colour).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def count_of(page: Image.Image, colour: tuple[int, ...], left: int = 0, right: int = 10_000) -> int:
    return int((np.asarray(page)[:, left:right] == colour).all(-1).sum())


def test_small_images_grow_by_a_whole_factor_and_large_ones_shrink():
    small = comparison_grid({"base": [solid(RED)]}, ["p"])
    left, top, right, bottom = box_of(small, RED)
    assert (right - left, bottom - top) == (192, 192)  # 3 x 64
    odd = comparison_grid({"base": [solid(RED, (100, 50))]}, ["p"])
    left, top, right, bottom = box_of(odd, RED)
    assert (right - left, bottom - top) == (200, 100)  # 2 x 100 is the first multiple past 192
    large = comparison_grid({"base": [solid(RED, (1024, 768))]}, ["p"])
    left, top, right, bottom = box_of(large, RED)
    assert (right - left, bottom - top) == (384, 288)
    chosen = comparison_grid({"base": [solid(RED)]}, ["p"], cell=256)
    left, _, right, _ = box_of(chosen, RED)
    assert right - left == 256


def test_enlarging_keeps_pixels_sharp():
    tensor = torch.zeros(3, 64, 64)
    tensor[0, ::2, ::2] = 1  # the finest pattern there is: any interpolation would make other colours
    page = comparison_grid({"base": [tensor]}, ["p"])
    assert count_of(page, RED) == 32 * 32 * 9


def test_rows_are_prompts_and_columns_are_models():
    colours = [RED, BLUE, (0, 255, 255), (255, 0, 255)]
    images = [solid(colour) for colour in colours]
    page = comparison_grid({"base": images[:2], "tuned": images[2:]}, ["a", "b"])
    red, blue, cyan, magenta = (box_of(page, colour) for colour in colours)
    assert red[0] == blue[0] < cyan[0] == magenta[0]
    assert red[1] == cyan[1] < blue[1] == magenta[1]


def test_fold_lays_rows_side_by_side():
    images = [solid(RED), solid((250, 0, 0)), solid(BLUE), solid((0, 0, 250))]
    tall, wide = (comparison_grid({"base": images}, "abcd", fold=fold) for fold in (1, 2))
    assert wide.width > tall.width
    assert wide.height < tall.height
    red, blue = box_of(wide, RED), box_of(wide, BLUE)
    assert red[1] == blue[1]
    assert red[2] < blue[0]


@pytest.mark.parametrize(
    ("base", "tuned", "winner"),
    [(0.2, 0.7, "tuned"), (0.9, 0.7, "base"), (0.5, 0.5, None), (None, 0.1, None), (math.nan, math.inf, None)],
)
def test_the_best_score_of_a_row_is_green(base: float | None, tuned: float | None, winner: str | None):
    images = {"base": [solid(RED)], "tuned": [solid(BLUE)]}
    page = comparison_grid(images, ["p"], {"base": {"r": [base]}, "tuned": {"r": [tuned]}})
    found = {}
    for label, colour in (("base", RED), ("tuned", BLUE)):
        left, _, right, _ = box_of(page, colour)
        found[label] = count_of(page, GREEN, left, right) > 0
    assert found == {"base": winner == "base", "tuned": winner == "tuned"}


def test_scores_make_room_for_every_reward():
    images = {"base": [solid(RED)]}
    heights = [comparison_grid(images, ["p"], {"base": {f"r{i}": [0.5] for i in range(n)}}).height for n in (1, 2, 3)]
    assert heights[2] - heights[1] == heights[1] - heights[0] > 0


def test_a_mismatch_says_what_is_wrong():
    with pytest.raises(ValueError, match="column 'tuned' has 1 images for 2 prompts"):
        comparison_grid({"base": [solid(RED)] * 2, "tuned": [solid(RED)]}, ["a", "b"])
    with pytest.raises(ValueError, match="scores of 'base' / 'clip': 1 for 2 prompts"):
        comparison_grid({"base": [solid(RED)] * 2}, ["a", "b"], {"base": {"clip": [1.0]}})
    with pytest.raises(ValueError, match="'tned', which is no column"):
        comparison_grid({"tuned": [solid(RED)]}, ["a"], {"tned": {"clip": [1.0]}})
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        comparison_grid({"base": [torch.zeros(64, 64, 3)]}, ["a"])
    with pytest.raises(ValueError, match="one caption an image"):
        image_sheet([solid(RED)], [])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=400), min_size=1, max_size=2))
def test_any_text_is_safe(texts: list[str]):
    images = [solid(RED, (16, 16))] * len(texts)
    page = comparison_grid({texts[0]: images}, texts, {texts[0]: {texts[-1]: [0.5] * len(texts)}}, title=texts[0])
    # every image is whole: no text was drawn over it
    assert count_of(page, RED) == len(texts) * 192 * 192
    assert count_of(image_sheet(images, texts), RED) == len(texts) * 192 * 192


@pytest.mark.parametrize(
    "text", ["", " \n\t", "a" * 5000, "word " * 2000, "Ärger – “…” → Привет 你好 😀", "\x00\ud800\u202e"], ids=range(6)
)
def test_awkward_prompts_change_no_layout(text: str):
    plain = comparison_grid({"base": [solid(RED)]}, ["p"])
    page = comparison_grid({"base": [solid(RED)]}, [text])
    assert page.size == plain.size
    assert box_of(page, RED) == box_of(plain, RED)


def test_a_long_prompt_is_written_in_several_lines_and_stays_in_its_column():
    page = np.asarray(comparison_grid({"base": [solid(RED)]}, ["a very long prompt " * 40]).convert("L"))
    left, top, _, bottom = box_of(comparison_grid({"base": [solid(RED)]}, ["p"]), RED)
    column = page[top:bottom, : left - 4] < 128
    assert column[:, :28].sum() == 0  # the margin
    rows = column.any(1)
    lines = int((rows[1:] & ~rows[:-1]).sum())
    assert lines >= 6
    assert column[:, left - 18 :].sum() == 0  # the gap before the picture


def test_tensors_are_clipped_and_rounded():
    pixels = torch.tensor([-1.0, 0.0, 0.5, 1.0, 3.0, math.nan]).expand(3, 1, 6)
    expected = [0, 0, 128, 255, 255, 0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert np.asarray(as_image(pixels.to(dtype)))[0, :, 0].tolist() == expected
    assert as_image(Image.new("LA", (4, 4))).mode == "RGB"


def test_sheet_runs_in_reading_order():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    page = image_sheet([solid(c) for c in colours], ["one", "two", "three"], columns=2)
    first, second, third = (box_of(page, c) for c in colours)
    assert first[1] == second[1] < third[1]
    assert first[0] == third[0] < second[0]
    assert image_sheet([], []).width > 0


def test_save_is_whole_or_not_at_all(tmp_path: Path):
    path = save_png(solid(RED), tmp_path / "new" / "grid.png")
    before = path.read_bytes()
    assert Image.open(path).size == (64, 64)

    broken = solid(BLUE)
    broken.save = lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        save_png(broken, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["grid.png"]


def test_scores_are_short_and_readable():
    values = [0.6622, 24.713, -118.26, 123456.0, 0.00012, 0.0, None, math.nan, -math.inf]
    assert [format_score(v) for v in values] == [
        "0.662", "24.71", "-118.3", "1.23e+05", "0.00012", "0.000", "n/a", "n/a", "n/a",
    ]  # fmt: skip


def test_a_column_that_nobody_judged_has_no_scores():
    """What an image was made from stands beside it without numbers; a judged column that lacks one says n/a."""
    columns = {"condition": [solid(RED)], "base": [solid(BLUE)]}
    page = comparison_grid(columns, ["p"], {"base": {"layout": [0.5]}})
    left, _, right, bottom = box_of(page, RED)
    below = np.asarray(page)[bottom:, left:right]
    assert (below == 255).all()
    left, _, right, bottom = box_of(page, BLUE)
    assert not (np.asarray(page)[bottom:, left:right] == 255).all()
    missing = comparison_grid(columns, ["p"], {"base": {"layout": [0.5]}, "condition": {"layout": [None]}})
    left, _, right, bottom = box_of(missing, RED)
    assert not (np.asarray(missing)[bottom:, left:right] == 255).all()
