"""Reward backpropagation and Flow-GRPO on the playground: the proxy that is trained and the gold reward that is watched.

    python benchmarks/backprop_learning.py run --methods draft_k refl --seeds 0 1 2   # skips finished runs; start it twice
    python benchmarks/backprop_learning.py add --methods draft_k --seeds 0 --scratch DIR   # take over the finished run DIR/draft_k-0
    python benchmarks/backprop_learning.py time       # seconds of an iteration of each method, side by side in one process
    python benchmarks/backprop_learning.py scales --methods drtune --seeds 0   # the adapter of a finished run at several strengths
    python benchmarks/backprop_learning.py show       # figure and tables from the result file

Every run is the real command (`python -m align.train`) on one thread. All train on the same differentiable proxy, a small open_clip
network, which Flow-GRPO only calls; the exact verifier (gold) is only measured.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import curves
from curves import ROOT, Rows, finals_of, place, spread
from rich.console import Console

from align.config import Config, load_config
from align.loops import iteration_of
from align.run import start

RESULTS = ROOT / "benchmarks" / "results" / "backprop_learning.json"
PROXY = ["rewards.proxy.type=proxy", "rewards.verifier.weight=0"]
# name -> configuration and overrides
METHODS: dict[str, tuple[str, list[str]]] = {
    "flow_grpo": ("configs/playground/flow_grpo.yaml", PROXY),
    **{
        name: (f"configs/playground/{name}.yaml", [])
        for name in ("draft_k", "draft_lv", "refl", "alignprop", "drtune", "flowbp_sparse")
    },
}
COLOURS = {
    "flow_grpo": "#57606a",
    "draft_k": "#1f6feb",
    "draft_lv": "#0b9aa2",
    "refl": "#8250df",
    "alignprop": "#d1611f",
    "drtune": "#1a7f37",
    "flowbp_sparse": "#bf3989",
}
METRICS = {"proxy": "proxy: CLIP cosine (trained)", "verifier": "gold: graded verifier"}
STATISTICS = (
    "train/active_steps",
    "train/adjoint_norm",
    "train/adjoint_growth",
    "train/grad_norm",
    "train/saturated_fraction",
)
ROUNDS = 3
SCALES = "0.25,0.5,0.75,1"


def empty() -> dict[str, Any]:
    """A result file without a run."""
    return curves.empty_result("backprop_learning.py", METHODS)


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    return curves.load(RESULTS, empty)


def settings(method: str, *more: str) -> Config:
    """The configuration of a method's runs."""
    config, overrides = METHODS[method]
    return load_config(ROOT / config, [*overrides, *more])


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file lacks and no other process works on, one after the other."""
    curves.run_missing({method: METHODS[method] for method in methods}, seeds, scratch, load, add)


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: curves and final scores by gold and proxy, and means of what the loop reports."""
    rows = curves.run_rows(method, seed, folder) + curves.run_rows(method, seed, folder, "proxy")
    rows += curves.statistic_rows(method, seed, folder, STATISTICS)
    curves.append(RESULTS, rows, empty)


def scales(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Append the scores of finished runs' adapters at several strengths; their grids go to docs/assets."""
    for method in methods:
        for seed in seeds:
            run_dir = scratch / f"{method}-{seed}"
            out = run_dir / "eval" / "scales"
            if not (out / "summary.json").is_file():
                command = [
                    sys.executable,
                    "-m",
                    "align.cli",
                    "eval",
                    str(run_dir),
                    "--scales",
                    SCALES,
                    "--out",
                    str(out),
                ]
                subprocess.run(command, cwd=ROOT, check=True)
            found = json.loads((out / "summary.json").read_text())["columns"]
            rows = []
            for entry in found.values():
                for share in [a for a in entry["adapters"] if f"{a['strength']:g}" in SCALES.split(",")]:
                    for metric in METRICS:
                        row = {
                            "method": method,
                            "seed": seed,
                            "kind": "scale",
                            "scale": share["strength"],
                            "metric": metric,
                        }
                        row |= {"mean": entry["mean"][metric], "gain_ci95": entry["delta_ci95"][metric]}
                        rows.append(row | {"gain": entry["mean"][metric] - found["base"]["mean"][metric]})
            curves.append(RESULTS, rows, empty)
            shutil.copy(out / "grid.png", ROOT / "docs" / "assets" / f"scales-{method}.png")


def time(methods: list[str], *_: Any) -> None:
    """Seconds of an iteration: the methods take turns in this process, the median of each counts."""
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = {m: start(settings(m, f"output_dir={scratch}", f"name={m}", "trackers=[]"), quiet) for m in methods}
        found: dict[str, list[float]] = {m: [] for m in methods}
        for turn in range(ROUNDS + 1):
            for method, one in runs.items():
                metrics = iteration_of(one.config)(one, lambda *_: None)
                if turn:  # the first warms up
                    found[method].append(sum(metrics[f"time/{part}"] for part in ("sample", "score", "train")))
    rows = []
    for method, seconds in found.items():
        rows.append({"method": method, "kind": "time", "metric": "seconds_per_iteration", "n": ROUNDS})
        rows[-1] |= {"mean": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    curves.append(RESULTS, rows, empty)


def show() -> None:
    """Figure in docs/assets, tables in the page."""
    rows = load()["rows"]
    clock = {r["method"]: r["mean"] for r in rows if r["kind"] == "time"}
    samples = {m: settings(m).samples_per_iteration for m in METHODS}
    for r in rows:
        if r["kind"] in ("curve", "final"):
            r["samples"] = r["iteration"] * samples[r["method"]]
            r["quiet"] = r["iteration"] * clock[r["method"]]
    present = [m for m in METHODS if any(r["kind"] == "final" and r["method"] == m for r in rows)]
    figure = ROOT / "docs" / "assets" / "reward-backprop.png"
    costs = {"samples": "images sampled", "quiet": "seconds on one thread"}
    curves.draw(rows, {m: COLOURS[m] for m in present}, figure, metrics=METRICS, costs=costs)
    text = [
        f"![proxy and gold reward against images and seconds](../assets/{figure.name})",
        comparison(rows, present),
        "Where gold turns:\n\n" + turning(rows, present),
        *strengths(rows),
        "Each run:\n\n" + single_runs(rows, present),
        "From `benchmarks/results/backprop_learning.json`.",
    ]
    place(ROOT / "docs" / "methods" / "reward-backprop.md", "\n\n".join(text))


def mean_curve(rows: Rows, method: str, metric: str) -> list[tuple[int, float]]:
    """(iteration, change since the base), means over the seeds."""
    mine = [r for r in rows if r["kind"] == "curve" and r["method"] == method and r["metric"] == metric]
    points = [
        (i, statistics.mean(r["mean"] for r in mine if r["iteration"] == i)) for i in {r["iteration"] for r in mine}
    ]
    points.sort()
    return [(i, value - points[0][1]) for i, value in points]


def comparison(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a method: means over the seeds."""
    lines = [
        "| method | seeds | proxy | gold | minus `flow_grpo`: proxy | gold | images | evaluations | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = {k: {r["seed"]: r["gain"] for r in finals_of(rows, "flow_grpo", k)} for k in METRICS}
    for method in methods:
        found = {k: finals_of(rows, method, k) for k in METRICS}
        cells = [f"`{method}`", str(len(found["proxy"]))]
        cells += [spread([r["gain"] for r in found[k]]) for k in METRICS]
        for k in METRICS:
            pairs = [r["gain"] - first[k][r["seed"]] for r in found[k] if r["seed"] in first[k]]
            cells.append("" if method == "flow_grpo" else spread(pairs))
        last = found["proxy"][0]
        cells += [f"{last['samples']:,}", f"{last['nfe']:,}", f"{last['quiet']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    base = {k: finals_of(rows, methods[0], k)[0]["base"] for k in METRICS}
    count = finals_of(rows, methods[0], "proxy")[0]["n"]
    lines.append(
        f"\nChanges against the base (proxy {base['proxy']:.3f}, gold {base['verifier']:.3f}) on {count} held-out prompts, same "
        "noise; means over seeds with their 95 % interval (Student's t); `minus` pairs runs of equal seed. Seconds: iterations "
        f"times the median of {ROUNDS} iterations, taken side by side in one process on one thread, evaluations of the run left "
        "out."
    )
    return "\n".join(lines)


def turning(rows: Rows, methods: list[str]) -> str:
    """Markdown table: the highest point of each method's mean gold curve, and what the rest of the run did."""
    lines = [
        "| method | gold is highest at iteration | gold there | proxy there | gold at the end | proxy at the end |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        proxy, gold = (dict(mean_curve(rows, method, k)) for k in METRICS)
        peak, end = max(gold, key=lambda i: gold[i]), max(gold)
        where = f"{peak} of {end}" if peak else f"0 of {end} (the base)"
        cells = [f"{c[i]:+.3f}" for i in (peak, end) for c in (gold, proxy)]
        lines.append(f"| `{method}` | {where} | {' | '.join(cells)} |")
    lines.append(
        "\nMeans over the seeds on the curve's 128 prompts, changes against the base. A highest point is picked after the fact, so the "
        "value there is flattered by about its noise."
    )
    return "\n".join(lines)


def strengths(rows: Rows) -> list[str]:
    """Markdown table and picture of the adapters that were tried at several strengths, or nothing."""
    found = [r for r in rows if r["kind"] == "scale"]
    if not found:
        return []
    levels = sorted({r["scale"] for r in found})
    lines = [f"| strength | {' | '.join(f'{x:g}' for x in levels)} |", f"|---|{'---|' * len(levels)}"]
    for method, seed in sorted({(r["method"], r["seed"]) for r in found}):
        for metric in METRICS:
            cells = []
            for level in levels:
                keys = {"method": method, "seed": seed, "metric": metric, "scale": level}
                row = next((r for r in found if all(r[k] == v for k, v in keys.items())), None)
                cells.append(
                    f"{row['gain']:+.3f} [{row['gain_ci95'][0]:+.3f}, {row['gain_ci95'][1]:+.3f}]" if row else ""
                )
            name = "gold" if metric == "verifier" else metric
            lines.append(f"| `{method}`, seed {seed}: {name} | {' | '.join(cells)} |")
    text = (
        "Adapters at part of their strength (`align eval RUN --scales 0.25,0.5,0.75,1`), change against the base:\n\n"
    )
    return [text + "\n".join(lines)]


def single_runs(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a run, with the interval over its prompts."""
    lines = ["| method | seed | proxy [95 % over prompts] | gold [95 %] | full match |", "|---|---|---|---|---|"]
    for method in methods:
        proxies = {r["seed"]: r for r in finals_of(rows, method, "proxy")}
        for r in finals_of(rows, method, "verifier"):
            cells = [
                f"{x['gain']:+.3f} [{x['gain_ci95'][0]:+.3f}, {x['gain_ci95'][1]:+.3f}]"
                for x in (proxies[r["seed"]], r)
            ]
            lines.append(
                f"| `{method}` | {r['seed']} | {' | '.join(cells)} | {r['full_base']:.3f} -> {r['full']:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    curves.command_line(
        __doc__, METHODS, ROOT / "outputs" / "backprop", run, add, show, {"time": time, "scales": scales}
    )
