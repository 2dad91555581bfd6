"""Small charts as SVG text: crisp at any zoom, coloured by the page's CSS (so dark mode works), a few kilobytes each.

Each function returns an `<svg>` string whose every text is escaped. Coordinates are those of a 360 x 214 canvas, about
the width of a phone and of a third of a desktop page, so the lettering has one size on both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 36
MOST_POINTS = 300


@dataclass(frozen=True)
class Series:
    """A line: NaN in `y` leaves a gap. `low`/`high` draw a band; `style` is a CSS class of the page (c0..c5, faint)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: str = "c0"
    points: bool = False


@dataclass(frozen=True)
class Axes:
    """The frame of a chart: data ranges; `with_sign` writes ticks of x as differences, `whole_x` only integers."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    with_sign: bool = False
    whole_x: bool = False

    def px(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    reference: tuple[float, str] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines with bands over a common x. `label` names the chart to a screen reader; `reference` is a dashed level, `marks`
    are places on the x-axis with a word each."""
    ys = [v for s in series for v in (*s.y, *s.low, *s.high) if math.isfinite(v)]
    xs = [v for s in series for v in s.x if math.isfinite(v)]
    if reference is not None:
        ys.append(reference[0])
    axes = Axes(_span(xs, pad=0.0), _span(ys), x_label, whole_x=_whole(xs))
    parts = [_frame(axes)]
    for s in series:
        parts.append(_band(axes, s))
    if reference is not None:
        parts.append(_reference(axes, *reference))
    for mark in marks:
        parts.append(_mark(axes, *mark))
    for s in series:
        parts.append(_line(axes, s))
        if s.points:
            parts.append(_points(axes, s, named=len(series) > 1))
    return _svg(label, parts)


def stacked_chart(layers: Mapping[str, Sequence[float]], x: Sequence[float], *, label: str, x_label: str) -> str:
    """Areas on top of each other, the first at the bottom; NaN counts as 0. `layers`: name -> one value an x."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    bins = _bins(order, MOST_POINTS // 2)
    xs = [sum(x[i] for i in b) / len(b) for b in bins]
    floor = [0.0] * len(bins)
    areas = []
    for number, values in enumerate(layers.values()):
        means = [sum(v for i in b if math.isfinite(v := values[i])) / len(b) for b in bins]
        ceiling = [f + max(m, 0.0) for f, m in zip(floor, means, strict=True)]
        areas.append((number, floor, ceiling))
        floor = ceiling
    if len(xs) == 1:  # one iteration still has a width to show
        xs = [xs[0] - 0.5, xs[0] + 0.5]
        areas = [(n, low * 2, high * 2) for n, low, high in areas]
    axes = Axes(_span(xs, pad=0.0), (0.0, _span([0.0, *floor])[1]), x_label, whole_x=_whole(x))
    parts = [_frame(axes)]
    for number, low, high in areas:
        outline = [*zip(xs, high, strict=True), *reversed(list(zip(xs, low, strict=True)))]
        parts.append(f'<path class="area c{number % 6}" d="{_path(axes, outline)}Z"/>')
    return _svg(label, parts)


def balance_chart(
    x: Sequence[int],
    up: Sequence[float],
    down: Sequence[float],
    before: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    label: str,
    x_label: str,
) -> str:
    """Two shares in [0, 1] at each x: `up` as a bar above zero, `down` as one below; NaN draws none.

    `before`: the same two at another time, as a short line across each bar's column.
    """
    shares = [v for v in (*up, *down, *(v for side in before or () for v in side)) if math.isfinite(v)]
    reach = max(shares, default=0.0) * 1.06 or 1.0
    axes = Axes((min(x, default=0) - 0.6, max(x, default=0) + 0.6), (-reach, reach), x_label, whole_x=True)
    parts = [_frame(axes, signless=True)]
    zero = axes.py(0)
    half = 0.36 * (axes.px(1) - axes.px(0))
    for sign, kind, now, then in ((1, "gain", up, before and before[0]), (-1, "loss", down, before and before[1])):
        for i, k in enumerate(x):
            middle = axes.px(k)
            if math.isfinite(now[i]):
                top, bottom = sorted((zero, axes.py(sign * now[i])))
                parts.append(
                    f'<rect class="bar {kind}" x="{middle - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}"'
                    f' height="{bottom - top:.1f}" rx="1.5"><title>step {k}: {now[i]:.1%}</title></rect>'
                )
            if then and math.isfinite(then[i]):
                y = axes.py(sign * then[i])
                ends = f'x1="{middle - half - 3:.1f}" x2="{middle + half + 3:.1f}"'
                parts.append(f'<line class="before" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    return _svg(label, parts)


def histogram(values: Sequence[float], *, label: str, x_label: str, bins: int = 21) -> str:
    """Counts of finite `values` in `bins` (odd) equal bins centred on 0: losses left of it, gains right of it."""
    values = [v for v in values if math.isfinite(v)]
    reach = max([abs(v) for v in values], default=0.0)
    reach = reach if reach > 1e-300 else 1.0  # a bin of the smallest numbers would have no width
    half = bins // 2
    size = reach / (half + 0.5) * (1 + 1e-9)
    counts = [0] * bins
    for v in values:
        counts[round(v / size) + half] += 1
    axes = Axes((-reach, reach), (0.0, max(*counts, 1) * 1.06), x_label, with_sign=True)
    parts = [_frame(axes, whole=True)]
    for index, count in enumerate(counts):
        if count:
            left, right = (axes.px((index - half + side) * size) for side in (-0.5, 0.5))
            top = axes.py(count)
            kind = "flat" if index == half else "loss" if index < half else "gain"
            parts.append(
                f'<rect class="bar {kind}" x="{left + 0.75:.1f}" y="{top:.1f}" width="{right - left - 1.5:.1f}"'
                f' height="{HEIGHT - BOTTOM - top:.1f}" rx="1.5"><title>{count}</title></rect>'
            )
    zero = axes.px(0)
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _svg(label, parts)


def interval_bar(low: float, middle: float, high: float, *, label: str, reach: float = 0.0) -> str:
    """A confidence interval against zero in one line of text; its scale is its own unless `reach`, the most that any
    bar beside it shows, is larger."""
    reach = max(abs(low), abs(high), abs(middle), reach) * 1.08 or 1.0
    a, m, b = (60 + v / reach * 56 for v in (low, middle, high))
    kind = "gain" if low > 0 else "loss" if high < 0 else "flat"
    return (
        f'<svg class="interval" viewBox="0 0 120 18" role="img" aria-label="{escape(label)}">'
        '<line class="zero" x1="60" x2="60" y1="1" y2="17"/>'
        f'<rect class="bar {kind}" x="{a:.1f}" y="6.5" width="{max(b - a, 1):.1f}" height="5" rx="2.5"/>'
        f'<circle class="bar {kind}" cx="{m:.1f}" cy="9" r="4.5"/></svg>'
    )


def compact(value: float, digits: int = 4) -> str:
    """A number of about `digits` significant digits in little room: 0.25, 40, 1500, 12k, 1.5M, 4e-4."""
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e13:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0, 1, "")):
        if size >= limit:
            return f"{value / unit:.{digits}g}{letter}"
    return "n/a"


def tick_labels(values: Sequence[float]) -> list[str]:
    """`compact` with as many digits as ascending, evenly spaced ticks have."""
    if len(values) < 2:
        return [compact(value) for value in values]
    first, last = (math.floor(math.log10(v * (1 + 1e-9))) for v in (max(map(abs, values)), values[1] - values[0]))
    return [compact(value, max(4, first - last + 1)) for value in values]


def signed(value: float) -> str:
    """A tick with its sign, and a bare 0."""
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Up to `most` round numbers (steps of 1, 2 or 5 times a power of ten) within [low, high], as many as fit."""
    power = math.floor(math.log10((high - low) / most))
    for step in (m * 10.0**p for p in (power, power + 1, power + 2) for m in (1, 2, 5)):
        if whole and step < 1:
            continue
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [round(n * step, 12 - power) for n in range(first, last + 1)]
    return []


def _span(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """A range that holds all values and is never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-290):
        grow = abs(low) * 0.1 or 0.5
        return low - grow, high + grow
    return low - pad * (high - low), high + pad * (high - low)


def _whole(values: Sequence[float]) -> bool:
    return all(float(v).is_integer() for v in values)


def _frame(axes: Axes, whole: bool = False, signless: bool = False) -> str:
    parts = []
    levels = ticks(*axes.y, whole=whole)
    for value, text in zip(levels, tick_labels(levels), strict=True):
        text = text.removeprefix("-") if signless else text
        y = axes.py(value)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.8:.1f}" text-anchor="end">{escape(text)}</text>')
    places = ticks(*axes.x, whole=axes.whole_x)
    for value, text in zip(places, map(signed, places) if axes.with_sign else tick_labels(places), strict=True):
        x = axes.px(value)
        anchor, x = ("end", WIDTH - 1.0) if x > WIDTH - RIGHT - 8 else ("middle", x)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{escape(text)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(axes.x_label)}</text>'
    )
    return "".join(parts)


def _reference(axes: Axes, level: float, text: str) -> str:
    y = axes.py(level)
    above = y - 4 if y > TOP + 16 else y + 13
    return (
        f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="note" x="{WIDTH - RIGHT}" y="{above:.1f}" text-anchor="end">{escape(text)}</text>'
    )


def _mark(axes: Axes, place: float, text: str) -> str:
    x = axes.px(place)
    right = x < (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="mark" x="{x + (5 if right else -5):.1f}" y="{TOP + 9}" '
        f'text-anchor="{"start" if right else "end"}">{escape(text)}</text>'
    )


def _band(axes: Axes, series: Series) -> str:
    if not series.low or not series.high:
        return ""
    parts = []
    for run in _runs(list(zip(series.x, series.low, series.high, strict=True))):
        if len(run) == 1:  # a lone interval has no width to fill
            x, *ends = run[0]
            path = _path(axes, [(x, end) for end in ends])
            parts.append(f'<path class="whisker {series.style}" d="{path}"/>')
            continue
        kept = [run[b[-1]] for b in _bins(range(len(run)), MOST_POINTS)]
        outline = [(p[0], p[2]) for p in kept] + [(p[0], p[1]) for p in reversed(kept)]
        parts.append(f'<path class="band {series.style}" d="{_path(axes, outline)}Z"/>')
    return "".join(parts)


def _line(axes: Axes, series: Series) -> str:
    parts = []
    for run in _runs(list(zip(series.x, series.y, strict=True))):
        if len(run) == 1:  # a lone value between gaps has no length: show a dot
            parts.append(_dot(axes, run[0][0], run[0][1], series.style, 1.8))
        else:
            parts.append(f'<path class="line {series.style}" d="{_path(axes, _thin(run))}"/>')
    return "".join(parts)


def _points(axes: Axes, series: Series, named: bool) -> str:
    parts = []
    name = f"{series.label}, " if named else ""
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if math.isfinite(x) and math.isfinite(y):
            spread = ""
            if series.high and math.isfinite(series.high[i]):
                spread = f" ± {series.high[i] - y:.3g}"
            parts.append(_dot(axes, x, y, series.style, 3, f"{name}{axes.x_label} {compact(x)}: {y:.4g}{spread}"))
    return "".join(parts)


def _dot(axes: Axes, x: float, y: float, style: str, radius: float, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle class="dot {style}" cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="{radius}">{inner}</circle>'


def _runs(rows: Sequence[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """The stretches of `rows` in which every value is finite."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for row in rows:
        if all(math.isfinite(v) for v in row):
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(run: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """At most `MOST_POINTS` points, the lowest and the highest of each stretch kept: a spike survives."""
    if len(run) <= MOST_POINTS:
        return run
    kept = set()
    for b in _bins(range(len(run)), MOST_POINTS // 2):
        kept |= {min(b, key=lambda i: run[i][1]), max(b, key=lambda i: run[i][1])}
    return [run[i] for i in sorted(kept | {0, len(run) - 1})]


def _bins(items: Sequence[int], most: int) -> list[Sequence[int]]:
    """`items` cut into at most `most` consecutive parts of nearly equal size."""
    count = min(most, len(items))
    edges = [round(i * len(items) / count) for i in range(count + 1)] if count else []
    return [items[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _path(axes: Axes, points: Sequence[tuple[float, ...]]) -> str:
    return "M" + "L".join(f"{axes.px(p[0]):.1f} {axes.py(p[1]):.1f}" for p in points)


def _svg(label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
