"""The picture of a noise table: levels before and after, who gained and lost by each step's noise, and the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samplers.calibration import SETTLED_OVER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER, LOSS_BEFORE, LOSS_AFTER = "#b8c4d6", "#2a5db0", "#edc4b6", "#c8502d"


def ends(shares: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Share (S) of each step in the first iteration, and its mean over the last ten, given one row per iteration."""
    last = shares[-SETTLED_OVER:]
    return list(shares[0]), [sum(column) / len(last) for column in zip(*last, strict=True)]


def searched_steps(table: Mapping[str, Any]) -> list[int]:
    """Step of each column of `up` and `down`: all but the last, unless the table says that it was made for a window."""
    return list(table["fingerprint"].get("stochastic", range(len(table["up"][0]))))


def draw_chart(path: Path, table: Mapping[str, Any]) -> Path:
    """Write `chart` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chart(table).savefig(path)
    return path


def chart(table: Mapping[str, Any]) -> Figure:
    """Four panels of the searched steps of `table` (see `align.calibrate`); the others never have noise."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11.5, 7.6), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    (sigma, multiplier), (shares, search) = figure.subplots(2, 2)
    searched = searched_steps(table)
    unit = [s / m for s, m in zip(table["sigma"], table["multiplier"], strict=True)]
    before = [s / u for s, u in zip(table["history"][0], unit, strict=True)]
    for axes, old, new, title in (
        (sigma, table["history"][0], table["sigma"], r"noise level $\sigma$ of each step"),
        (multiplier, before, table["multiplier"], r"the same as a multiple of $\sqrt{t/(1-t)}$"),
    ):
        first, last = [old[k] for k in searched], [new[k] for k in searched]
        axes.plot(searched, first, "o--", color=BEFORE, label="before", markersize=4)
        axes.plot(searched, last, "o-", color=AFTER, label="after", markersize=5, linewidth=2)
        axes.set_ylim(0, 1.12 * max(first + last))
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(frameon=False)
    _draw_shares(shares, table)
    _draw_search(search, table, unit)
    for axes in (sigma, multiplier, shares):
        axes.set_xlabel("sampling step, from noise to image")
        axes.set_xticks(_ticks(searched))
        axes.set_xlim(searched[0] - 0.6, searched[-1] + 0.6)
    for axes in (sigma, multiplier, shares, search):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def _ticks(searched: Sequence[int]) -> range:
    return range(searched[0], searched[-1] + 1, 1 + len(searched) // 16)


def _draw_shares(axes: Any, table: Mapping[str, Any]) -> None:
    (up_first, up_last), (down_first, down_last) = ends(table["up"]), ends(table["down"])
    places = searched_steps(table)
    for offset, up, down, above, below, label in (
        (-0.2, up_first, down_first, BEFORE, LOSS_BEFORE, "before"),
        (0.2, up_last, down_last, AFTER, LOSS_AFTER, "after"),
    ):
        at = [k + offset for k in places]
        axes.bar(at, up, 0.38, color=above, label=f"gained, {label}")
        axes.bar(at, [-x for x in down], 0.38, color=below, label=f"lost, {label}")
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1], ["100 %", "50 %", "0", "50 %", "100 %"])
    axes.set_title("images that gain (up) and lose (down) by the noise of a step", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=2, loc="lower center", fontsize=8)


def _draw_search(axes: Any, table: Mapping[str, Any], unit: Sequence[float]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    searched = searched_steps(table)
    edges = [searched[0] - 0.5, *(k + 0.5 for k in searched)]
    paint: Any = ScalarMappable(BoundaryNorm(edges, 256), "viridis")
    for k in searched:
        axes.plot([row[k] / unit[k] for row in table["history"]], color=paint.to_rgba(k), linewidth=1.2)
    axes.figure.colorbar(paint, ax=axes, ticks=_ticks(searched), label="sampling step", aspect=30).minorticks_off()
    axes.set_title("the search: multiplier of each step", loc="left", fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylim(0, 1.12 * max(max(line.get_ydata()) for line in axes.lines))
    axes.set_xlim(0, len(table["history"]) - 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
