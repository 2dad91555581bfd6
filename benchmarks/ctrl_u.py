"""Ctrl-U and ControlNet++ on the playground: how well images keep their layout, from one ControlNet and on the same conditions.

    python benchmarks/ctrl_u.py run --methods controlnet_pp ctrl_u --seeds 0 1 2   # skips finished runs; start it twice
    python benchmarks/ctrl_u.py add --methods ctrl_u --seeds 0 --scratch DIR   # take over the finished run DIR/ctrl_u-0
    python benchmarks/ctrl_u.py show       # figure and tables from the result file

Every run is the real command (`python -m align.train`) on one thread and starts from the shipped ControlNet. The arms differ in the
reward alone: none (the diffusion loss goes on), one prediction, the plain mean of two, two with uncertainty, of that the penalty or
the weights alone, and all of it with shared noise, as in the released code. `condition` is the network that the reward trains
against; `layout`, by the exact reader, and the verifier (gold) are only measured.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import curves
from curves import ROOT, Rows, finals_of, place, spread

RESULTS = ROOT / "benchmarks" / "results" / "ctrl_u.json"
CTRL_U = "configs/playground/ctrl_u.yaml"
# name -> configuration and overrides
METHODS: dict[str, tuple[str, list[str]]] = {
    "controlnet": (CTRL_U, ["consistency.grad_scale=0"]),
    "controlnet_pp": ("configs/playground/controlnet_pp.yaml", []),
    "average": (CTRL_U, ["consistency.ctrlu.mode=average"]),
    "ctrl_u": (CTRL_U, []),
    # the same penalty on the disagreement, with weights of 1; and the same weights without it
    "penalty_only": (CTRL_U, ["consistency.ctrlu.u_scale=1.0e-3", "consistency.ctrlu.eta=1000"]),
    "weights_only": (CTRL_U, ["consistency.ctrlu.eta=0", "consistency.ctrlu.detach_weight=true"]),
    "ctrl_u_shared": (CTRL_U, ["consistency.ctrlu.share_noise=true"]),
}
COLOURS = {
    "controlnet": "#57606a",
    "controlnet_pp": "#1f6feb",
    "average": "#d1611f",
    "ctrl_u": "#1a7f37",
    "penalty_only": "#0b9aa2",
    "weights_only": "#bf3989",
    "ctrl_u_shared": "#8250df",
}
METRICS = {
    "layout": "layout: mIoU, exact reader",
    "condition": "condition: mIoU, D (trained)",
    "verifier": "gold: graded verifier",
}
STATISTICS = (
    "train/diffusion_loss",
    "train/disagreement",
    "train/trust",
    "train/disagreement_corr",
    "train/saturated_fraction",
    "train/grad_norm",
    "time/train",
)


def empty() -> dict[str, Any]:
    """A result file without a run."""
    return curves.empty_result("ctrl_u.py", METHODS)


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    return curves.load(RESULTS, empty)


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file lacks and no other process works on, one after the other."""
    curves.run_missing({method: METHODS[method] for method in methods}, seeds, scratch, load, add)


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: curves and final scores by each measure, and means of what the loop reports."""
    rows = [row for metric in METRICS for row in curves.run_rows(method, seed, folder, metric)]
    for row in rows:
        if row["metric"] != "verifier":  # only the verifier knows a full match
            row.pop("full", None), row.pop("full_base", None)
    rows += curves.statistic_rows(method, seed, folder, STATISTICS)
    curves.append(RESULTS, rows, empty)


def show() -> None:
    """Figure in docs/assets, tables in the page."""
    rows = load()["rows"]
    present = [m for m in METHODS if any(r["kind"] == "final" and r["method"] == m for r in rows)]
    figure = ROOT / "docs" / "assets" / "ctrl-u.png"
    costs = {"iteration": "iterations", "nfe": "network evaluations"}
    curves.draw(rows, {m: COLOURS[m] for m in present}, figure, metrics=METRICS, costs=costs)
    pictures = ROOT / "docs" / "assets" / "ctrl-u-grid.png"  # align grid outputs/ctrl_u/ctrl_u-0 --n 6 --out FILE
    text = [
        f"![condition, the ControlNet of the start and Ctrl-U's, same noise](../assets/{pictures.name})",
        f"![layout, condition and gold against iterations and evaluations](../assets/{figure.name})",
        comparison(rows, present),
        "Against each other, runs of equal seed:\n\n" + pairs(rows, present),
        "What the loop reports, means over iterations and seeds:\n\n" + reported(rows, present),
        "Each run:\n\n" + single_runs(rows, present),
        "From `benchmarks/results/ctrl_u.json`.",
    ]
    place(ROOT / "docs" / "methods" / "ctrl-u.md", "\n\n".join(text))


def comparison(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a method: changes against the base, means over the seeds."""
    lines = [
        "| method | seeds | layout | condition (D) | gold | evaluations | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        found = {k: finals_of(rows, method, k) for k in METRICS}
        cells = [f"`{method}`", str(len(found["layout"]))]
        cells += [spread([r["gain"] for r in found[k]]) for k in METRICS]
        last = found["layout"]
        cells += [f"{last[0]['nfe']:,}", f"{statistics.mean(r['seconds'] for r in last):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    base = {k: finals_of(rows, methods[0], k)[0] for k in METRICS}
    values = ", ".join(
        f"{name} {base[k]['base']:.3f}" for k, name in zip(METRICS, ("layout", "condition", "gold"), strict=True)
    )
    lines.append(
        f"\nChanges against the ControlNet of the start ({values}) on {base['layout']['n']} held-out scenes, same noise; means over "
        "seeds with their 95 % interval (Student's t). Seconds of one thread of a shared machine: compare evaluations instead."
    )
    return "\n".join(lines)


def pairs(rows: Rows, methods: list[str]) -> str:
    """Markdown table of differences between methods, paired by seed."""
    wanted = [
        ("controlnet_pp", "controlnet"),
        ("ctrl_u", "controlnet"),
        ("ctrl_u", "controlnet_pp"),
        ("average", "controlnet_pp"),
        ("ctrl_u", "average"),
        ("penalty_only", "average"),
        ("weights_only", "average"),
        ("ctrl_u_shared", "controlnet_pp"),
    ]
    lines = ["| difference | layout | condition (D) | gold |", "|---|---|---|---|"]
    for one, other in wanted:
        if one in methods and other in methods:
            cells = []
            for metric in METRICS:
                against = {r["seed"]: r["gain"] for r in finals_of(rows, other, metric)}
                mine = finals_of(rows, one, metric)
                cells.append(spread([r["gain"] - against[r["seed"]] for r in mine if r["seed"] in against]))
            lines.append(f"| `{one}` - `{other}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def reported(rows: Rows, methods: list[str]) -> str:
    """Markdown table of the training metrics."""
    keys = STATISTICS[:-1]
    lines = [f"| method | {' | '.join(f'`{k}`' for k in keys)} |", f"|---|{'---|' * len(keys)}"]
    for method in methods:
        cells = []
        for key in keys:
            values = [
                r["mean"] for r in rows if r["kind"] == "statistic" and r["method"] == method and r["metric"] == key
            ]
            cells.append(f"{statistics.mean(values):.3g}" if values else "")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def single_runs(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a run, with the interval over its scenes."""
    lines = ["| method | seed | layout [95 % over scenes] | condition (D) | gold |", "|---|---|---|---|---|"]
    for method in methods:
        by_seed = {k: {r["seed"]: r for r in finals_of(rows, method, k)} for k in METRICS}
        for seed in sorted(by_seed["layout"]):
            found = [by_seed[k][seed] for k in METRICS]
            cells = [f"{r['gain']:+.3f} [{r['gain_ci95'][0]:+.3f}, {r['gain_ci95'][1]:+.3f}]" for r in found]
            lines.append(f"| `{method}` | {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    curves.command_line(__doc__, METHODS, ROOT / "outputs" / "ctrl_u", run, add, show)
