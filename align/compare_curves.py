"""The curves of several runs on common axes: the same series as SVG for the page and as one PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from align.charts import Series, compact, line_chart
from align.compare_runs import Entry, trained_first
from align.errors import UserError
from align.grids import save_png
from align.report_curves import FURTHER, KNOWN, moving_average, time_unit
from align.runfolder import column
from align.schema import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

X_LABELS = {"iteration": "iteration", "nfe": "network evaluations", "seconds": "seconds"}
# Okabe and Ito's colours, told apart with any kind of colour vision; the page's style sheet has the same in this order
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FEW, CROWD = 10, 3
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))


@dataclass(frozen=True)
class Curve:
    """A line of run number `run`; `thin` where an average of it is drawn over it."""

    run: int
    series: Series
    thin: bool = False


@dataclass(frozen=True)
class Overlay:
    """One metric of all runs against one kind of cost."""

    metric: str
    title: str
    x_label: str
    curves: tuple[Curve, ...]

    @property
    def svg(self) -> Markup:
        label = f"{self.title} against {self.x_label}"
        return Markup(line_chart([c.series for c in self.curves], label=label, x_label=self.x_label))


def chosen_metrics(entries: Sequence[Entry], names: Sequence[str]) -> list[str]:
    """`names`, or by default every held-out score and the training reward. Raises: UserError for one in no run."""
    recorded = {
        key
        for entry in entries
        for row in (*entry.run.train, *entry.run.evals)
        for key, value in row.items()
        if "/" in key and not key.endswith("_ci95") and isinstance(value, (int, float))
    }
    for name in names:
        if name not in recorded:
            raise UserError(f"--metric {name}: none of the runs has recorded it{nearest(name, recorded)}")
    held_out = {key.removeprefix("eval/") for key in recorded if key.startswith("eval/")}
    ordered = dict.fromkeys(name for entry in entries for name in trained_first(entry, held_out))
    return list(names) or [f"eval/{name}" for name in ordered] + ["reward/mean"] * ("reward/mean" in recorded)


def chosen_costs(names: Sequence[str]) -> list[str]:
    """`names`, or all there are. Raises: UserError for an unknown one."""
    for name in names:
        if name not in X_LABELS:
            raise UserError(f"--x {name}: one of {', '.join(X_LABELS)}{nearest(name, X_LABELS)}")
    return list(dict.fromkeys(names)) or list(X_LABELS)


def overlays(entries: Sequence[Entry], metrics: Sequence[str], costs: Sequence[str]) -> list[list[Overlay]]:
    """One list a metric, in it one overlay a kind of cost; a run without the metric has no curve."""
    unit = time_unit([s for e in entries for s in column(e.run.train + e.run.evals, "seconds")])
    return [[_overlay(entries, metric, cost, unit) for cost in costs] for metric in metrics]


def title_of(metric: str) -> str:
    """'verifier on held-out prompts', 'Training reward', or the metric's own name."""
    if metric.startswith("eval/"):
        return f"{metric.removeprefix('eval/')} on held-out prompts"
    known: Mapping[str, tuple[str, str]] = {**KNOWN, **FURTHER}
    return known[metric][0] if metric in known else metric


def is_crowded(entries: Sequence[Entry]) -> bool:
    """Whether bands and single iterations of so many runs would hide each other: they are then left out."""
    return len(entries) > CROWD


def averaged(iterations: int) -> int:
    """Iterations in the moving average of a training curve."""
    return max(5, iterations // 10)


def style_of(number: int) -> str:
    """The page's CSS classes of run `number`: a colour, and dashes from the eighth run on."""
    return f"c{number % len(COLOURS)} dash{number // len(COLOURS) % len(DASHES)}"


def _overlay(entries: Sequence[Entry], metric: str, cost: str, unit: tuple[str, float]) -> Overlay:
    label, size = unit if cost == "seconds" else (X_LABELS[cost], 1.0)
    curves: list[Curve] = []
    crowded, smooth = is_crowded(entries), False
    for number, entry in enumerate(entries):
        evaluated = metric.startswith("eval/")
        rows = entry.run.evals if evaluated else entry.run.train
        rows = [row for row in rows if math.isfinite(column([row], cost)[0])]
        x, y = [value / size for value in column(rows, cost)], column(rows, metric)
        if not any(map(math.isfinite, y)):
            continue
        style = style_of(number)
        if evaluated:
            half = [] if crowded else column(rows, f"{metric}_ci95")
            low, high = ([v + sign * h for v, h in zip(y, half, strict=False)] for sign in (-1, 1))
            curves.append(Curve(number, Series(entry.label, x, y, low, high, style, points=True)))
        elif len(y) <= FEW:
            curves.append(Curve(number, Series(entry.label, x, y, style=style, points=True)))
        else:
            if not crowded:
                curves.append(Curve(number, Series(entry.label, x, y, style=f"{style} thin"), thin=True))
            smooth = True
            curves.append(Curve(number, Series(entry.label, x, moving_average(y, averaged(len(y))), style=style)))
    curves.sort(key=lambda curve: not curve.thin)  # averages lie over the single iterations of all runs
    title = title_of(metric) + (", moving average" if smooth else "")
    return Overlay(metric, title, label, tuple(curves))


def save_curves(path: Path, panels: Sequence[Sequence[Overlay]], labels: Sequence[str]) -> Path:
    """Write `figure` as a PNG."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure(panels, labels))
    canvas.draw()
    return save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def figure(panels: Sequence[Sequence[Overlay]], labels: Sequence[str]) -> Figure:
    """A row a metric, a column a kind of cost, one legend above. `labels`: of all runs, in their order."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    wide, tall = max(len(row) for row in panels), len(panels)
    width = 0.6 + 4.4 * wide
    columns = min(len(labels), max(1, int(width * 11 / (8 + max(map(len, labels))))))  # 11 letters an inch
    made = Figure(
        figsize=(width, 0.4 + 0.22 * math.ceil(len(labels) / columns) + 3.1 * tall),
        dpi=120,
        layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1),
    )
    grid = made.subplots(tall, wide, squeeze=False, sharex="col", sharey="row")
    for line, overlays_of_metric in zip(grid, panels, strict=True):
        line[0].set_title(_plain(overlays_of_metric[0].title), loc="left", fontsize=12, parse_math=False)
        for axes, overlay in zip(line, overlays_of_metric, strict=True):
            _draw(axes, overlay)
    by_row = [number for first in range(columns) for number in range(first, len(labels), columns)]
    legend = made.legend(
        [Line2D([], [], **_look(number, marker=True)) for number in by_row],
        [_plain(labels[number]) for number in by_row],
        loc="outside upper left",
        ncols=columns,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return made


def _draw(axes: Any, overlay: Overlay) -> None:
    for curve in overlay.curves:
        s, look = curve.series, _look(curve.run, marker=curve.series.points)
        look |= {"linewidth": 0.8, "alpha": 0.35} if curve.thin else {}
        axes.plot(s.x, s.y, **look)
        if s.low:
            axes.fill_between(s.x, s.low, s.high, color=look["color"], alpha=0.1, linewidth=0)
    axes.set_xlabel(overlay.x_label)
    axes.tick_params(labelbottom=True)
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.locator_params(axis="x", nbins=6, integer=overlay.x_label == X_LABELS["iteration"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d9d9d9", linewidth=0.6)
    axes.set_axisbelow(True)


def _look(number: int, marker: bool) -> dict[str, Any]:
    """How matplotlib draws run `number`: a colour and a marker of its own, from the eighth run on dashed."""
    look = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
    return {**look, "linewidth": 1.8} | ({"marker": MARKERS[number % len(MARKERS)], "markersize": 5} if marker else {})


def _plain(text: str) -> str:
    """Text that matplotlib draws as it stands: it would leave out a label with a leading underscore."""
    return f"\u200b{text}" if text.startswith("_") else text
