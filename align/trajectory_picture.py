"""The picture of step-wise credit: a trajectory's completed states side by side, with values and the gains between."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor

from align.charts import tick_labels, ticks
from align.credit import turning_points
from align.grids import BEST, FAINT, INK, PAPER, RULE, ImageLike, as_image, fit_image, load_font, shorten

UP, DOWN, FLAT = BEST, "#c0362c", "#8b949e"
SMALLEST_CELL, LARGEST_CELL = 128, 192
MARGIN, GUTTER, GAP, ROW_GAP = 32, 126, 56, 44
TITLE, TEXT, NOTE = 34, 26, 24
MARK_LINE, VALUE_LINE, GAIN_LINE, CREDIT_LINE, CURVE = 34, 40, 36, 44, 120
LEGEND_LINE = NOTE + 10
FINER = 4  # shapes are drawn this many times larger and then reduced, which smooths their edges

STATE = ("State k", "the image that comes of it without further noise, and its reward, the value V_k.")
NOISE = "State 0 is the noise."
ARROW = ("Arrow", "what the noise of a step did, its gain d_k = V_{k+1} − V_k.")
TURN = (
    "Turning point",
    "a step that turns the value into the direction of the whole trajectory, up (green) or down (red). It can be "
    "credited with V_T − V_k (boxed).",
)
STRICT = ("Thick and filled", "the value goes on that way after the step (consistent). Thin: it does not.")
FIRST = ("First step", "no step is before it to turn from, so it only has to go in that direction.")

At = Callable[[float, float], tuple[float, float]]
Paint = Callable[[ImageDraw.ImageDraw, At], None]


def trajectory_picture(
    images: Sequence[Sequence[ImageLike]],
    values: Tensor,
    steps: Sequence[int],
    *,
    prompt: str,
    note: str = "",
    labels: Sequence[str] = (),
) -> Image.Image:
    """One row a trajectory: S completed states and the final image, values below, gains between, turning points marked.

    images: n rows of S + 1, PIL or float tensors (3, H, W) in [0, 1]. values (n, S + 1): their rewards, NaN where
    missing. steps: the S step indices. labels: a short name of each row. Turning points are those of TP-GRPO (arXiv
    2602.06422): plain and consistent ones, with the rule for the first step. ValueError if the counts do not fit.
    """
    rows, columns = len(images), len(steps) + 1
    if rows < 1 or columns < 2 or any(len(row) != columns for row in images) or values.shape != (rows, columns):
        raise ValueError(
            f"trajectory_picture: {columns - 1} steps need rows of {columns} images with as many values, got rows of "
            f"{[len(row) for row in images]} and values {tuple(values.shape)}"
        )
    cells = [[_fit_cell(as_image(image)) for image in row] for row in images]
    frame = _Frame(*cells[0][0].size, columns)
    marks = [_marks(row) for row in values]
    heights = [frame.row_height(row) for row in marks]
    kinds = {mark.kind for row in marks for mark in row}
    legend = _legend_lines(_legend(kinds, steps[0] == 0), frame.page_width - 2 * MARGIN)
    top = MARGIN + TITLE + (NOTE + 12 if note else 0) + 26
    first = top + TEXT + 10
    bottom = first + sum(heights) + ROW_GAP * rows
    page = Image.new("RGB", (frame.page_width, bottom + len(legend) * LEGEND_LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    _draw_head(draw, frame, top, prompt, note, steps)
    present = values[values.isfinite()]
    span = (float(present.min()), float(present.max())) if len(present) else (0.0, 1.0)
    y = first
    for index, row in enumerate(cells):
        _draw_row(page, frame, y, row, _Row(values[index].tolist(), marks[index], span))
        if labels:
            _rich(draw, (MARGIN, y + MARK_LINE + NOTE), labels[index], NOTE, INK)
        y += heights[index] + ROW_GAP
        draw.line((MARGIN, y - ROW_GAP // 2, frame.page_width - MARGIN, y - ROW_GAP // 2), RULE, 2)
    for number, line in enumerate(legend):
        _draw_words(draw, (MARGIN, bottom + NOTE + number * LEGEND_LINE), line)
    return page


class _Mark(NamedTuple):
    """How a state is marked: "turning point", "first step" or not at all; and V_T - V_k, which its step may get."""

    kind: str
    consistent: bool
    colour: str
    credit: float


class _Row(NamedTuple):
    """The numbers of one row, and the range of values that all rows share."""

    values: list[float]
    marks: list[_Mark]
    span: tuple[float, float]

    def written(self, value: float, sign: bool = False) -> str:
        """A value or a difference of values, with digits that tell apart a thousandth of the range."""
        if math.isnan(value):
            return "n/a"
        spread = self.span[1] - self.span[0] or 1.0
        digits = max(1, 3 - math.ceil(math.log10(spread)))
        plus = "+" if sign and value > 0 else ""
        return ("−" if value < 0 else plus) + f"{abs(value):.{digits}f}"


class _Frame(NamedTuple):
    """Sizes in pixels that all rows share."""

    width: int
    height: int
    columns: int

    @property
    def page_width(self) -> int:
        return self.left(self.columns) - GAP + MARGIN

    def left(self, column: int) -> int:
        return MARGIN + GUTTER + column * (self.width + GAP)

    def centre(self, column: float) -> float:
        """Middle of a column's image; half a column further is the middle of the gap after it."""
        return MARGIN + GUTTER + column * (self.width + GAP) + self.width / 2

    def row_height(self, marks: Sequence[_Mark]) -> int:
        credited = CREDIT_LINE if any(mark.kind for mark in marks) else 0
        return MARK_LINE + self.height + VALUE_LINE + GAIN_LINE + credited + 12 + CURVE


def _marks(values: Tensor) -> list[_Mark]:
    """The mark of the state before each step (S), of one row's values (S + 1)."""
    plain, strict = (turning_points(values[None], consistent, first_step=True)[0] for consistent in (False, True))
    rest, gains = values[-1] - values[:-1], values.diff()
    names = ["first step"] + ["turning point"] * (len(gains) - 1)
    return [
        _Mark(name if plain[k] else "", bool(strict[k]), UP if gains[k] > 0 else DOWN, float(rest[k]))
        for k, name in enumerate(names)
    ]


def _fit_cell(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    whole = longest * math.ceil(SMALLEST_CELL / longest)
    return fit_image(image, whole if longest < SMALLEST_CELL else min(longest, LARGEST_CELL))


def _draw_head(
    draw: ImageDraw.ImageDraw, frame: _Frame, top: int, prompt: str, note: str, steps: Sequence[int]
) -> None:
    room = frame.page_width - 2 * MARGIN
    title, below = shorten(prompt, TITLE, room) or "(empty prompt)", shorten(note, NOTE, room)
    draw.text((MARGIN, MARGIN + TITLE - 6), title, INK, load_font(TITLE, title.isascii()), "ls", stroke_width=0.6)
    draw.text((MARGIN, MARGIN + TITLE + NOTE + 8), below, FAINT, load_font(NOTE, below.isascii()), "ls")
    _rich(draw, (MARGIN, top + TEXT), "state k", NOTE, FAINT)
    for column, name in enumerate([*map(str, steps), "final"]):
        _rich(draw, (frame.centre(column), top + TEXT), name, TEXT, INK, anchor="m")


def _draw_row(page: Image.Image, frame: _Frame, y: int, cells: Sequence[Image.Image], row: _Row) -> None:
    """Images with their marks, the lines of numbers below them, and the curve of the values."""
    draw = ImageDraw.Draw(page)
    top = y + MARK_LINE
    values_at = top + frame.height + VALUE_LINE - 8
    gains_at = values_at + GAIN_LINE
    credit_at = gains_at + CREDIT_LINE
    _rich(draw, (MARGIN, values_at), "value V_k", NOTE, FAINT)
    _rich(draw, (MARGIN, gains_at), "gain d_k", NOTE, FAINT)
    if any(mark.kind for mark in row.marks):
        _rich(draw, (MARGIN, credit_at), "V_T − V_k", NOTE, FAINT)
    for column, (cell, value) in enumerate(zip(cells, row.values, strict=True)):
        page.paste(cell, (frame.left(column), top))
        known, at = math.isfinite(value), (frame.centre(column), values_at)
        _rich(draw, at, row.written(value), TEXT, INK if known else FAINT, bold=known, anchor="m")
    for k, mark in enumerate(row.marks):
        gain = row.values[k + 1] - row.values[k]
        middle = frame.centre(k + 0.5)
        _draw_arrow(page, (middle, top + frame.height / 2), gain)
        _rich(draw, (middle, gains_at), row.written(gain, sign=True), NOTE, _colour(gain), anchor="m")
        if mark.kind:
            _draw_mark(page, frame, (k, top, credit_at), mark, row.written(mark.credit, sign=True))
    bottom = y + frame.row_height(row.marks)
    _draw_curve(page, frame, (bottom - CURVE, bottom), row)


def _draw_arrow(page: Image.Image, middle: tuple[float, float], gain: float) -> None:
    """An arrow that rises, falls, or lies level for a gain of 0; nothing where the gain is not known."""
    if math.isnan(gain):
        return
    x, y = middle
    rise = 11 if gain > 0 else -11 if gain < 0 else 0
    reach = 11 if rise else 13

    def paint(draw: ImageDraw.ImageDraw, at: At) -> None:
        tail, tip = (x - reach, y + rise), (x + reach, y - rise)
        draw.line((*at(*tail), *at(*tip)), _colour(gain), 4 * FINER)
        for turn in (0.75 * math.pi, -0.75 * math.pi):
            direction = math.atan2(-rise, reach) + turn
            barb = (tip[0] + 13 * math.cos(direction), tip[1] + 13 * math.sin(direction))
            draw.line((*at(*tip), *at(*barb)), _colour(gain), 4 * FINER)
        draw.circle(at(*tip), 2 * FINER, _colour(gain))

    _smooth(page, (x - 18, y - 18, x + 18, y + 18), paint)


def _draw_mark(page: Image.Image, frame: _Frame, place: tuple[int, int, int], mark: _Mark, text: str) -> None:
    """Name and frame of a marked state, and the box with `text`, what its step may be credited with."""
    column, top, credit_at = place
    left, draw = frame.left(column), ImageDraw.Draw(page)
    name = (frame.centre(column), top - 14)
    _rich(draw, name, mark.kind, NOTE - 2, mark.colour, bold=mark.consistent, anchor="m")
    width = 6 if mark.consistent else 2
    draw.rectangle(
        (left - 2 - width, top - 2 - width, left + frame.width + 1 + width, top + frame.height + 1 + width),
        outline=mark.colour,
        width=width,
    )
    middle = frame.centre(column + 0.5)
    half = _rich_length(text, NOTE) / 2 + 12
    box = (middle - half, credit_at - 25, middle + half, credit_at + 9)

    def paint(shapes: ImageDraw.ImageDraw, at: At) -> None:
        corners = (*at(box[0] + 1, box[1] + 1), *at(box[2] - 1, box[3] - 1))
        fill = mark.colour if mark.consistent else PAPER
        shapes.rounded_rectangle(corners, 8 * FINER, fill, mark.colour, 2 * FINER)

    _smooth(page, box, paint)
    _rich(draw, (middle, credit_at), text, NOTE, PAPER if mark.consistent else mark.colour, anchor="m")


def _draw_curve(page: Image.Image, frame: _Frame, between: tuple[int, int], row: _Row) -> None:
    """The values as a line under their images; marked states are diamonds."""
    top, bottom = between[0] + 12, between[1] - 12
    low, high = row.span
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    draw = ImageDraw.Draw(page)

    def height(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    levels = ticks(low, high, most=3)
    for level, name in zip(levels, tick_labels(levels), strict=True):
        draw.line((frame.left(0), height(level), frame.page_width - MARGIN, height(level)), RULE, 2)
        _rich(draw, (frame.left(0) - 14, height(level) + 7), name.replace("-", "−"), NOTE - 2, FAINT, anchor="r")
    points = [(frame.centre(k), height(value)) for k, value in enumerate(row.values)]

    def paint(shapes: ImageDraw.ImageDraw, at: At) -> None:
        for k in range(len(points) - 1):
            gain = row.values[k + 1] - row.values[k]
            if not math.isnan(gain):
                shapes.line((*at(*points[k]), *at(*points[k + 1])), _colour(gain), 4 * FINER)
        for k, (x, y) in enumerate(points):
            if math.isnan(y):
                continue
            mark = row.marks[k] if k < len(row.marks) else None
            if mark is None or not mark.kind:
                shapes.circle(at(x, y), 5 * FINER, INK)
                continue
            corners = [at(x, y - 12), at(x + 12, y), at(x, y + 12), at(x - 12, y)]
            shapes.polygon(corners, mark.colour if mark.consistent else PAPER, mark.colour, 3 * FINER)

    _smooth(page, (frame.left(0), between[0] - 2, frame.page_width - MARGIN, between[1] + 2), paint)


def _smooth(page: Image.Image, box: tuple[float, float, float, float], paint: Paint) -> None:
    """Let `paint` draw inside `box` on an enlarged copy, and put it back reduced; its `at` maps page positions."""
    left, top, right, bottom = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
    size = (right - left, bottom - top)
    patch = page.crop((left, top, right, bottom)).resize((size[0] * FINER, size[1] * FINER), Image.Resampling.NEAREST)
    paint(ImageDraw.Draw(patch), lambda x, y: ((x - left) * FINER, (y - top) * FINER))
    page.paste(patch.resize(size, Image.Resampling.BOX), (left, top))


def _colour(gain: float) -> str:
    return UP if gain > 0 else DOWN if gain < 0 else FLAT


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """`text` cut into (piece, whether it is a subscript): V_k, V_{k+1}; a minus sign is a piece of its own."""
    for subscript, plain in re.findall(r"_(\{[^}]*\}|\w)|([^_−]+|−)", text):
        yield (subscript.strip("{}"), True) if subscript else (plain, False)


def _piece_length(piece: str, size: int) -> float:
    return 0.62 * size if piece == "−" else float(load_font(size).getlength(piece))


def _rich_length(text: str, size: int) -> float:
    return sum(_piece_length(piece, _sub(size) if lower else size) for piece, lower in _pieces(text))


def _sub(size: int) -> int:
    return round(0.72 * size)


def _rich(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: str,
    *,
    bold: bool = False,
    anchor: str = "l",
) -> float:
    """Draw one line with subscripts and true minus signs; `at` is left ("l"), middle or right of the baseline.

    Returns where it ends. The built-in font has neither, nor a second weight: bold is a thin stroke.
    """
    x = at[0] - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor] * _rich_length(text, size)
    for piece, lower in _pieces(text):
        own = _sub(size) if lower else size
        if piece == "−":
            y = round(at[1] - 0.3 * size)
            draw.rectangle((x + 0.08 * size, y, x + 0.54 * size, y + max(1, round(size / 12)) - 1), colour)
        else:
            drop = 0.22 * size if lower else 0.0
            draw.text(
                (x, at[1] + drop), piece, colour, load_font(own), "ls", stroke_width=0.5 if bold else 0, stroke_fill=colour
            )
        x += _piece_length(piece, own)
    return x


def _legend(kinds: set[str], from_noise: bool) -> list[tuple[str, str]]:
    """Only what is in the picture is explained."""
    state = (STATE[0], f"{STATE[1]} {NOISE}") if from_noise else STATE
    return [state, ARROW, *([TURN, STRICT] if any(kinds) else []), *([FIRST] if "first step" in kinds else [])]


def _legend_lines(entries: Sequence[tuple[str, str]], width: float) -> list[list[tuple[str, bool]]]:
    """Entries (name, meaning) as lines of (word, bold), each on a line of its own, wrapped at `width` pixels."""
    space = _rich_length(" ", NOTE)
    lines: list[list[tuple[str, bool]]] = []
    for name, meaning in entries:
        words = [(word, True) for word in f"{name}:".split()] + [(word, False) for word in meaning.split()]
        lines.append([words[0]])
        room = width - _rich_length(words[0][0], NOTE)
        for word in words[1:]:
            room -= space + _rich_length(word[0], NOTE)
            if room < 0:
                lines.append([])
                room = width - _rich_length(word[0], NOTE)
            lines[-1].append(word)
    return lines


def _draw_words(draw: ImageDraw.ImageDraw, at: tuple[float, float], words: Sequence[tuple[str, bool]]) -> None:
    x = at[0]
    for word, bold in words:
        x = _rich(draw, (x, at[1]), word, NOTE, INK if bold else FAINT, bold=bold) + _rich_length(" ", NOTE)
