"""Rules of credit on the playground: held-out verifier score against iterations, evaluations and seconds.

    python benchmarks/credit.py run --methods terminal gain --seeds 0 1 2   # skips finished runs; start it twice for two cores
    python benchmarks/credit.py add --methods terminal --seeds 0 --scratch DIR   # take over the finished run DIR/terminal-0
    python benchmarks/credit.py show                                        # figure, chart and tables from the result file

Every run is the real command (`python -m align.train`) on one thread. The noise table of `gain_psi` does not depend on
the seed of a run: it is measured once, and what that took is part of the cost of every run that uses it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import curves
from curves import ROOT, Rows, change_at, place, spread

from align.psi_chart import draw_chart
from align.runfolder import metric_rows

RESULTS = ROOT / "benchmarks" / "results" / "credit.json"
TABLE = RESULTS.with_name("credit_psi.json")
FIGURE = ROOT / "docs" / "assets" / "credit.png"
CHART = ROOT / "docs" / "assets" / "credit_psi.png"
SHARED_TABLE = "sampler.psi=auto"
# name -> configuration and overrides; all but nft differ in nothing but the rule of credit (and its noise table)
DENSE = "configs/playground/dense_grpo.yaml"
EARLY = ["sampler.window_size=5", "sampler.window_range=[0,5]"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "terminal": (DENSE, ["credit.rule=terminal"]),
    "value": (DENSE, ["credit.rule=value"]),
    "gain": (DENSE, ["credit.rule=gain"]),
    "gain_psi": (DENSE, ["credit.rule=gain", SHARED_TABLE]),
    "turning_point": (DENSE, ["credit.rule=turning_point"]),
    # the window of configs/playground/flow_grpo.yaml, where the terminal reward learns best
    "terminal_early": (DENSE, ["credit.rule=terminal", *EARLY]),
    "value_early": (DENSE, ["credit.rule=value", *EARLY]),
    "gain_early": (DENSE, ["credit.rule=gain", *EARLY]),
    "nft": ("configs/demo.yaml", []),
}
COLOURS = {
    "terminal": "#d1611f",
    "value": "#8a6d3b",
    "gain": "#1a7f37",
    "gain_psi": "#0b9aa2",
    "turning_point": "#8250df",
    "terminal_early": "#f0a57f",
    "value_early": "#c9b48a",
    "gain_early": "#7cc48d",
    "nft": "#6e7781",
}
PAGES = {
    "docs/methods/dense-grpo.md": [m for m in METHODS if m != "turning_point"],
    "docs/methods/tp-grpo.md": ["terminal", "gain", "turning_point", "nft"],
}
KEPT = ("credit/", "values/", "gain/")


def empty() -> dict[str, Any]:
    """A result file without a run."""
    return curves.empty_result("credit.py", METHODS)


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    return curves.load(RESULTS, empty)


def finished(method: str, seed: int) -> bool:
    """Whether the result file has this run."""
    return any(r["method"] == method and r.get("seed") == seed for r in load()["rows"])


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file lacks and no other process works on, one after the other."""
    stored = load()
    for method in {r["method"] for r in stored["rows"]} & set(methods):
        if stored["config"][method] != empty()["config"][method]:
            raise SystemExit(f"{method}: {RESULTS} has runs with other settings; delete its rows first")
    for seed in seeds:
        for method in methods:
            name = f"{method}-{seed}"
            with curves.claimed(scratch / "locks" / name) as mine:
                if not mine or finished(method, seed):
                    continue
                config, overrides = METHODS[method]
                if SHARED_TABLE in overrides:
                    calibrate(method, scratch)
                    overrides = [f"sampler.psi={TABLE}" if o == SHARED_TABLE else o for o in overrides]
                curves.train(config, overrides, name, seed, scratch)
                add(method, seed, scratch / name)


def calibrate(method: str, scratch: Path) -> None:
    """Measure the noise table of `method` with the real command, unless the result file has it. Start-up is counted too."""
    with curves.claimed(scratch / "locks" / "psi", wait=True):
        if TABLE.is_file() and calibration_row(load()["rows"], method):
            return
        config, overrides = METHODS[method]
        found = scratch / "psi.json"
        command = [sys.executable, "-m", "align.cli", "calibrate", config, "--out", str(found)]
        started = time.perf_counter()
        subprocess.run(
            [*command, *(o for o in overrides if o != SHARED_TABLE), f"output_dir={scratch}"],
            cwd=ROOT,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seconds = time.perf_counter() - started
        table = json.loads(found.read_text())
        shutil.copy(found, TABLE)
        row = {"method": method, "kind": "calibration", "metric": "noise level", "seconds": round(seconds, 1)}
        curves.append(RESULTS, [row | {k: table[k] for k in ("nfe", "iterations", "settled", "multiplier")}], empty)


def calibration_row(rows: Rows, method: str) -> dict[str, Any] | None:
    """What the calibration of `method` took, if it has one."""
    return next((r for r in rows if r["kind"] == "calibration" and r["method"] == method), None)


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: curve, final scores, and the means of its credit statistics over the iterations."""
    rows = curves.run_rows(method, seed, folder)
    calibration = calibration_row(load()["rows"], method)
    if calibration is not None:
        for row in rows:  # the run counts what its table took from its first iteration on
            row["seconds"] = max(row["seconds"], calibration["seconds"])
            row["nfe"] = max(row["nfe"], calibration["nfe"])
    columns: dict[str, list[float]] = {}
    for row in metric_rows(folder / "metrics.jsonl")[0]:
        for key, value in row.items():
            if key.startswith(KEPT) and value is not None:
                columns.setdefault(key, []).append(value)
    rows += [
        {"method": method, "seed": seed, "kind": "statistic", "metric": key, "mean": statistics.mean(v), "n": len(v)}
        for key, v in sorted(columns.items())
    ]
    curves.append(RESULTS, rows, empty)


def show() -> None:
    """Figure and chart in docs/assets, tables in the methods' pages."""
    rows = load()["rows"]
    present = {r["method"] for r in rows if r["kind"] == "final"}
    curves.draw(rows, {m: c for m, c in COLOURS.items() if m in present}, FIGURE, bands=True)
    if TABLE.is_file():
        draw_chart(CHART, json.loads(TABLE.read_text()))
    for page, methods in PAGES.items():
        text = [comparison(rows, methods), f"![held-out score by rule of credit](../assets/{FIGURE.name})"]
        text += ["Each run:\n\n" + single_runs(rows, methods), calibration_text(rows, methods)]
        text += [steps_table(rows, methods), turning_table(rows, methods)]
        text += ["From `benchmarks/results/credit.json`; seconds were taken while other runs shared the machine."]
        place(ROOT / page, "\n\n".join(part for part in text if part))


def finals_of(rows: Rows, method: str) -> Rows:
    """The final rows of a method by seed."""
    found = [r for r in rows if r["kind"] == "final" and r["method"] == method]
    return sorted(found, key=lambda r: r["seed"])


def curve_of(rows: Rows, method: str, seed: int) -> Rows:
    """One held-out curve in order."""
    found = [r for r in rows if r["kind"] == "curve" and r["method"] == method and r["seed"] == seed]
    return sorted(found, key=lambda r: r["iteration"])


def comparison(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a method: means over the seeds."""
    terminal = {r["seed"]: r for r in finals_of(rows, "terminal")}
    budget = statistics.mean(r["nfe"] for r in terminal.values()) if terminal else None
    lines = [
        "| credit | seeds | gain | minus `terminal` | full match | evaluations | seconds (one thread) | gain at equal evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        finals = finals_of(rows, method)
        if not finals:
            continue
        beside = [r["gain"] - terminal[r["seed"]]["gain"] for r in finals if r["seed"] in terminal]
        equal = [change_at(curve_of(rows, method, r["seed"]), budget) for r in finals] if budget else []
        cells = [
            f"`{method}`",
            str(len(finals)),
            spread([r["gain"] for r in finals]),
            spread(beside) if method != "terminal" else "",
            f"{finals[0]['full_base']:.3f} -> {statistics.mean(r['full'] for r in finals):.3f}",
            f"{statistics.mean(r['nfe'] for r in finals):,.0f}",
            f"{statistics.mean(r['seconds'] for r in finals):,.0f}",
            spread([e for e in equal if e is not None]) if equal and None not in equal else "not reached",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    count = next((r["n"] for r in rows if r["kind"] == "final"), 0)
    lines.append(
        f"\nGain: mean over seeds of tuned - base on {count} held-out prompts, same noise, with its 95 % interval over "
        "seeds (Student's t). Minus `terminal`: the same for the difference of runs with equal seed. Equal evaluations: "
        "where `terminal` ends, between the points of the curve, on the curve's 128 prompts; not reached where a run ended "
        "before or was still calibrating."
    )
    return "\n".join(lines)


def single_runs(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a run, with the interval over its prompts."""
    lines = ["| credit | seed | gain [95 % over prompts] | full match | seconds |", "|---|---|---|---|---|"]
    for r in (r for method in methods for r in finals_of(rows, method)):
        low, high = r["gain_ci95"]
        lines.append(
            f"| `{r['method']}` | {r['seed']} | {r['gain']:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"| {r['full_base']:.3f} -> {r['full']:.3f} | {r['seconds']:,.0f} |"
        )
    return "\n".join(lines)


def calibration_text(rows: Rows, methods: list[str]) -> str:
    """What the noise table took, and its chart."""
    found = [r for method in methods if (r := calibration_row(rows, method))]
    if not found:
        return ""
    row = found[0]
    state = "settled" if row["settled"] else "was stopped, not settled,"
    return (
        f"The noise table of `{row['method']}` {state} after {row['iterations']} iterations: {row['nfe']:,} evaluations "
        f"and {row['seconds']:,.0f} s, which its cost above contains.\n\n![calibrated noise](../assets/{CHART.name})"
    )


def means(rows: Rows, method: str) -> dict[str, float]:
    """Statistics of a method, averaged over its runs."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "statistic" and row["method"] == method:
            found.setdefault(row["metric"], []).append(row["mean"])
    return {key: statistics.mean(values) for key, values in found.items()}


def steps_table(rows: Rows, methods: list[str]) -> str:
    """Markdown table of what values and gains look like at each trained step."""
    names = ("values/step", "values/rank_corr", "gain/up", "gain/down", "gain/zero_spread")
    lines = []
    for method in methods:
        stats = means(rows, method)
        for step in sorted({key[-2:] for key in stats if key.startswith("gain/up_")}):
            cells = [f"{stats[f'{n}_{step}']:.3f}" if f"{n}_{step}" in stats else "" for n in names]
            lines.append(f"| `{method}` | {int(step)} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = (
        "| credit | step | value before | rank correlation with the end | gain > 0 | gain < 0 | groups without spread |"
    )
    return "\n".join(
        ["Values and gains by step, means over all iterations:\n", head, "|---|---|---|---|---|---|---|", *lines]
    )


def turning_table(rows: Rows, methods: list[str]) -> str:
    """How often turning points are found, beside pure noise."""
    stats = means(rows, "turning_point") if "turning_point" in methods else {}
    if not stats:
        return ""
    lines = ["| turning points | found | in pure noise |", "|---|---|---|"]
    for name, key in (("share of later steps", "turning_point"), ("share of first steps", "first_step")):
        lines.append(f"| {name} | {stats[f'credit/{key}_rate']:.3f} | {stats[f'credit/{key}_null']:.3f} |")
    return "\n".join([*lines, f"\nBalancing kept {stats['credit/kept_fraction']:.0%} of them."])


if __name__ == "__main__":
    curves.command_line(__doc__, METHODS, ROOT / "outputs" / "credit", run, add, show)
