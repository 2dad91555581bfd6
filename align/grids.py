"""Pictures for people: prompts x models with the scores under each cell, and plain contact sheets.

Everything here returns a `PIL.Image`; `save_png` writes one so that a reader never meets half a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont

ImageLike: TypeAlias = Image.Image | torch.Tensor
Scores: TypeAlias = Mapping[str, Mapping[str, Sequence[float | None]]]

SMALLEST_CELL, LARGEST_CELL = 192, 384
PAPER, INK, FAINT, RULE, BEST = "#ffffff", "#1b1f24", "#6b7480", "#e3e6ea", "#12803c"
MARGIN, GAP, LINE = 28, 18, 23
TEXT, SMALL, HEAD, TITLE = 17, 16, 19, 25
PROMPT_WIDTH = 230


def comparison_grid(
    columns: Mapping[str, Sequence[ImageLike]],
    prompts: Sequence[str],
    scores: Scores | None = None,
    *,
    cell: int | None = None,
    title: str | None = None,
    fold: int = 1,
) -> Image.Image:
    """One row a prompt, one column a model, each image's scores under it, the row's best score in bold green.

    `columns`: label -> one image a prompt, PIL or float tensor (3, H, W) in [0, 1]. `scores`: label -> reward -> one
    number a prompt, higher is better; None or NaN is written "n/a", and a column that is not in it has none. `cell`:
    longest side of an image in pixels; by default small images are enlarged by a whole factor to at least 192 and large
    ones reduced to 384. `fold` lays the rows out in that many blocks side by side, which suits a landscape page.
    ValueError if a column or a list of scores has not exactly one entry a prompt.
    """
    scores = scores or {}
    _check_lengths(columns, prompts, scores)
    pictures = {label: _fit_all([as_image(i) for i in images], cell) for label, images in columns.items()}
    everything = [p for images in pictures.values() for p in images]
    width = max([SMALLEST_CELL if cell is None else cell, *(p.width for p in everything)])
    height = max((p.height for p in everything), default=0)
    rewards = list(dict.fromkeys(reward for by_reward in scores.values() for reward in by_reward))

    heads = {label: _wrap(label, HEAD, width, 6) for label in pictures}  # what tells run names apart may stand last
    head_height = 38 + LINE * (max([len(lines) for lines in heads.values()], default=1) - 1)
    fold = max(1, min(fold, len(prompts)))
    rows_a_block = math.ceil(len(prompts) / fold)
    row_height = height + (10 + LINE * len(rewards) if rewards else 0)
    block = _Block(width, height, row_height, PROMPT_WIDTH + len(pictures) * (GAP + width))
    page = Image.new(
        "RGB",
        (
            2 * MARGIN + fold * block.total_width + (fold - 1) * 3 * GAP,
            2 * MARGIN + (52 if title else 0) + head_height + rows_a_block * (row_height + GAP) - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    top = MARGIN
    if title:
        _text(draw, (MARGIN, top + TITLE), shorten(title, TITLE, page.width - 2 * MARGIN), TITLE, bold=True)
        top += 52
    for index in range(fold):
        left = MARGIN + index * (block.total_width + 3 * GAP)
        for column, lines in enumerate(heads.values()):
            for number, line in enumerate(lines):
                at = (block.cell_x(left, column), top + HEAD + number * LINE)
                _text(draw, at, line, HEAD, bold=True)
    for row, prompt in enumerate(prompts):
        left = MARGIN + row // rows_a_block * (block.total_width + 3 * GAP)
        y = top + head_height + row % rows_a_block * (row_height + GAP)
        _draw_row(page, draw, block, (left, y), prompt, {k: v[row] for k, v in pictures.items()})
        judged = [label in scores for label in pictures]
        _draw_scores(draw, block, (left, y + height + 8), _row_scores(pictures, rewards, scores, row), judged)
    return page


def image_sheet(images: Sequence[ImageLike], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """A contact sheet: `images` (PIL or float tensor (3, H, W) in [0, 1]) in reading order, a caption under each.

    Captions are wrapped to three lines. ValueError if there is not one caption an image, or fewer than one column.
    """
    if len(images) != len(captions):
        raise ValueError(f"image_sheet needs one caption an image: {len(images)} images, {len(captions)} captions")
    if columns < 1:
        raise ValueError(f"image_sheet needs at least one column, got {columns}")
    pictures = _fit_all([as_image(image) for image in images], None)
    width = max((p.width for p in pictures), default=SMALLEST_CELL)
    wrapped = [_wrap(caption, TEXT, width, 3) for caption in captions]
    columns = max(1, min(columns, len(pictures)))
    starts = range(0, len(pictures), columns)
    heights = [
        max(p.height for p in pictures[s : s + columns]) + 8 + LINE * max(len(w) for w in wrapped[s : s + columns])
        for s in starts
    ]
    page = Image.new(
        "RGB",
        (
            2 * MARGIN + columns * (width + GAP) - GAP,
            2 * MARGIN + sum(heights) + GAP * max(0, len(heights) - 1),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for start, height in zip(starts, heights, strict=True):
        below = y + max(p.height for p in pictures[start : start + columns]) + 8
        for column, index in enumerate(range(start, min(start + columns, len(pictures)))):
            x = MARGIN + column * (width + GAP)
            page.paste(pictures[index], (x, y))
            for number, line in enumerate(wrapped[index]):
                _text(draw, (x, below + TEXT - 2 + number * LINE), line, TEXT)
        y += height + GAP
    return page


def save_png(image: Image.Image, path: Path | str) -> Path:
    """Write `image` to `path` (folders are made) beside itself first, then rename: `path` is whole or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(beside, format="PNG", optimize=True)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def as_image(image: ImageLike) -> Image.Image:
    """An RGB `PIL.Image` of a PIL image of any mode, or of a float tensor (3, H, W), clipped to [0, 1]."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image tensor has the shape (3, H, W), got {tuple(image.shape)}")
    pixels = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def format_score(value: float | None) -> str:
    """A score in the few digits a reader compares: '0.662', '24.71', '-118.3'; 'n/a' where it is missing."""
    if value is None or not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= 10_000 or 0 < size < 0.001:
        return f"{value:.3g}"
    digits = 3 if size < 10 else 2 if size < 100 else 1
    return f"{value:.{digits}f}"


class _Block(NamedTuple):
    """Sizes in pixels shared by the rows of a grid."""

    width: int
    height: int
    row_height: int
    total_width: int

    def cell_x(self, left: int, column: int) -> int:
        return left + PROMPT_WIDTH + GAP + column * (self.width + GAP)


def _check_lengths(columns: Mapping[str, Sequence[ImageLike]], prompts: Sequence[str], scores: Scores) -> None:
    for label, images in columns.items():
        if len(images) != len(prompts):
            raise ValueError(f"column {label!r} has {len(images)} images for {len(prompts)} prompts")
    for label, by_reward in scores.items():
        if label not in columns:
            raise ValueError(f"scores are given for {label!r}, which is no column ({', '.join(columns)})")
        for reward, values in by_reward.items():
            if len(values) != len(prompts):
                raise ValueError(f"scores of {label!r} / {reward!r}: {len(values)} for {len(prompts)} prompts")


def _fit_all(images: Sequence[Image.Image], cell: int | None) -> list[Image.Image]:
    return [fit_image(image, cell) for image in images]


def fit_image(image: Image.Image, cell: int | None) -> Image.Image:
    longest = max(image.size)
    if cell is None and longest < SMALLEST_CELL:
        target = longest * math.ceil(SMALLEST_CELL / longest)  # a whole factor keeps every pixel the same size
    else:
        target = cell if cell is not None else min(longest, LARGEST_CELL)
    if target == longest:
        return image
    size = (max(1, round(image.width * target / longest)), max(1, round(image.height * target / longest)))
    return image.resize(size, Image.Resampling.NEAREST if target > longest else Image.Resampling.LANCZOS)


def _row_scores(
    pictures: Mapping[str, object], rewards: Sequence[str], scores: Scores, row: int
) -> dict[str, list[float | None]]:
    """reward -> one value a column, None where it is missing or not finite."""
    table: dict[str, list[float | None]] = {}
    for reward in rewards:
        values = [scores[label][reward][row] if reward in scores.get(label, {}) else None for label in pictures]
        table[reward] = [float(v) if v is not None and math.isfinite(v) else None for v in values]
    return table


def _draw_row(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    block: _Block,
    corner: tuple[int, int],
    prompt: str,
    pictures: Mapping[str, Image.Image],
) -> None:
    left, y = corner
    draw.line((left, y - GAP // 2, left + block.total_width, y - GAP // 2), fill=RULE)
    for number, line in enumerate(_wrap(prompt, TEXT, PROMPT_WIDTH, block.height // LINE) or ["(empty prompt)"]):
        _text(draw, (left, y + TEXT + number * LINE), line, TEXT, INK if prompt.strip() else FAINT)
    for column, picture in enumerate(pictures.values()):
        page.paste(picture, (block.cell_x(left, column), y))


def _draw_scores(
    draw: ImageDraw.ImageDraw,
    block: _Block,
    corner: tuple[int, int],
    table: Mapping[str, Sequence[float | None]],
    judged: Sequence[bool],
) -> None:
    left, y = corner
    for number, (reward, values) in enumerate(table.items()):
        written = [format_score(v) for v in values]
        present = [v for v in values if v is not None]
        best = format_score(max(present, default=None))
        tied = len(set(written) - {"n/a"}) < 2
        for column, (text, value) in enumerate(zip(written, values, strict=True)):
            if not judged[column]:
                continue
            x, baseline = block.cell_x(left, column), y + SMALL + number * LINE
            wins = value is not None and text == best and not tied
            colour = BEST if wins else INK if value is not None else FAINT
            room = block.width - _length(text, SMALL) - 12
            _text(draw, (x, baseline), shorten(reward, SMALL, room), SMALL, FAINT)
            _text(draw, (x + block.width, baseline), text, SMALL, colour, bold=wins, anchor="rs")


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    colour: str = INK,
    *,
    bold: bool = False,
    anchor: str = "ls",
) -> None:
    """Draw one line; `at` is the baseline. Bold is a thin stroke: the built-in font has one weight."""
    font = load_font(size, text.isascii())
    draw.text(at, text, font=font, fill=colour, anchor=anchor, stroke_width=0.45 if bold else 0, stroke_fill=colour)


@lru_cache
def load_font(size: int, ascii_only: bool = True) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which knows little beyond ASCII; other text takes the wider font that matplotlib carries."""
    matplotlib = None if ascii_only else find_spec("matplotlib")
    if matplotlib is not None and matplotlib.submodule_search_locations:
        file = Path(matplotlib.submodule_search_locations[0], "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if file.is_file():
            return ImageFont.truetype(str(file), size - 1)
    return ImageFont.load_default(size)


def _length(text: str, size: int) -> float:
    return load_font(size, text.isascii()).getlength(text)


def _clean(text: str) -> str:
    """One line of characters that a font can be asked for: no control characters, no lone surrogates."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def shorten(text: str, size: int, width: float) -> str:
    text = _clean(text[:500])
    if _length(text, size) <= width:
        return text
    return text[: _fitting(text, size, width - _length("...", size))].rstrip() + "..."


def _fitting(text: str, size: int, width: float) -> int:
    """How many first characters of `text` fit in `width`; text only grows with its characters, so halving finds it."""
    font = load_font(size, text.isascii())
    low, high = 0, min(len(text), max(1, int(width)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _wrap(text: str, size: int, width: float, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels: longer words are cut, what does not fit becomes '...'."""
    done: list[str] = []
    current = ""
    # A prompt of any length costs what can be shown: no letter is narrower than two pixels.
    words = _clean(text[: int(width) * max(1, lines)]).split()
    while words and len(done) <= lines:
        word = words.pop(0)
        candidate = f"{current} {word}" if current else word
        if _length(candidate, size) <= width:
            current = candidate
        elif current:
            done.append(current)
            current = ""
            words.insert(0, word)
        else:
            cut = max(1, _fitting(word, size, width))
            done.append(word[:cut])
            if word[cut:]:
                words.insert(0, word[cut:])
    if current:
        done.append(current)
    if len(done) <= lines:
        return done
    return [*done[: lines - 1], shorten(done[lines - 1] + " ...", size, width)] if lines else []
