"""The picture of a noise table: levels before and after, who gained and lost by each step's noise, and the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samplers.calibration import SETTLED_OVER

BEFORE, AFTER, LOSS_BEFORE, LOSS_AFTER = "#b8c4d6", "#2a5db0", "#edc4b6", "#c8502d"


def ends(shares: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Share (S) of each step in the first iteration, and its mean over the last ten, given one row per iteration."""
    last = shares[-SETTLED_OVER:]
    return list(shares[0]), [sum(column) / len(last) for column in zip(*last, strict=True)]


def draw_chart(path: Path, table: Mapping[str, Any]) -> Path:
    """Write a PNG with four panels of `table` (see `align.calibrate`)."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11.5, 7.6), dpi=120, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    (sigma, multiplier), (shares, search) = figure.subplots(2, 2)
    searched = range(len(table["up"][0]))  # the last step adds no noise and is left out
    unit = [s / m for s, m in zip(table["sigma"], table["multiplier"], strict=True)]
    before = [s / u for s, u in zip(table["history"][0], unit, strict=True)]
    for axes, old, new, title in (
        (sigma, table["history"][0], table["sigma"], r"noise level $\sigma$ of each step"),
        (multiplier, before, table["multiplier"], r"the same as a multiple of $\sqrt{t/(1-t)}$"),
    ):
        axes.plot(searched, [old[k] for k in searched], "o--", color=BEFORE, label="before", markersize=4)
        axes.plot(searched, [new[k] for k in searched], "o-", color=AFTER, label="after", markersize=5, linewidth=2)
        axes.set_ylim(0, 1.12 * max(*old, *new))
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(frameon=False)
    _draw_shares(shares, table)
    _draw_search(search, table, unit)
    for axes in (sigma, multiplier, shares):
        axes.set_xlabel("sampling step, from noise to image")
        axes.set_xticks(range(0, len(searched), 1 + len(searched) // 16))
        axes.set_xlim(-0.6, len(searched) - 0.4)
    for axes in (sigma, multiplier, shares, search):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d9d9d9", linewidth=0.6)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_shares(axes: Any, table: Mapping[str, Any]) -> None:
    (up_first, up_last), (down_first, down_last) = ends(table["up"]), ends(table["down"])
    places = range(len(up_first))
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

    columns = len(table["up"][0])
    paint: Any = ScalarMappable(BoundaryNorm([k - 0.5 for k in range(columns + 1)], 256), "viridis")
    for k in range(columns):
        axes.plot([row[k] / unit[k] for row in table["history"]], color=paint.to_rgba(k), linewidth=1.2)
    ticks = range(0, columns, 1 + columns // 16)
    axes.figure.colorbar(paint, ax=axes, ticks=ticks, label="sampling step", aspect=30).minorticks_off()
    axes.set_title("the search: multiplier of each step", loc="left", fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylim(0, 1.12 * max(max(line.get_ydata()) for line in axes.lines))
    axes.set_xlim(0, len(table["history"]) - 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
