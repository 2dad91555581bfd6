"""Shared parts of the benchmarks that train: start real runs, keep their curves in a result file, draw and place them.

Several processes may work on one result file at once: every change of it is made under a lock, and a run is started by
the process that claims it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from align.config import load_resolved
from align.run import environment
from align.runfolder import metric_rows
from align.tracking import write_json

ROOT = Path(__file__).parent.parent
Rows = list[dict[str, Any]]

# 97.5 % quantile of Student's t with n - 1 degrees of freedom, by n
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def load(path: Path, empty: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result file, or an empty one."""
    return dict(json.loads(path.read_text())) if path.is_file() else empty()


def empty_result(script: str, methods: Mapping[str, tuple[str, list[str]]]) -> dict[str, Any]:
    """A result file without a run, of benchmarks/`script`; methods: name -> configuration and overrides."""
    machine = environment()
    return {
        "command": f"python benchmarks/{script} run",
        "config": {name: [config, *overrides] for name, (config, overrides) in methods.items()},
        "seeds": [],
        "machine": machine,
        "versions": machine["versions"],
        "rows": [],
    }


def run_missing(
    methods: Mapping[str, tuple[str, list[str]]],
    seeds: Sequence[int],
    scratch: Path,
    load: Callable[[], dict[str, Any]],
    add: Callable[[str, int, Path], None],
) -> None:
    """Every (seed, method) that the result file lacks and no other process works on, one after the other."""
    for seed in seeds:
        for method, (config, overrides) in methods.items():
            name = f"{method}-{seed}"
            with claimed(scratch / "locks" / name) as mine:
                if not mine or any(r["method"] == method and r.get("seed") == seed for r in load()["rows"]):
                    continue
                train(config, overrides, name, seed, scratch)
                add(method, seed, scratch / name)


def statistic_rows(method: str, seed: int, folder: Path, keys: Sequence[str]) -> Rows:
    """Means over a run's iterations of the training metrics `keys`, those that it has."""
    trained = [r for r in metric_rows(folder / "metrics.jsonl")[0] if r["kind"] == "train"]
    rows: Rows = []
    for key in keys:
        values = [r[key] for r in trained if r.get(key) is not None]
        if values:
            row = {"method": method, "seed": seed, "kind": "statistic", "metric": key, "n": len(values)}
            rows.append(row | {"mean": statistics.mean(values)})
    return rows


def finals_of(rows: Rows, method: str, metric: str) -> Rows:
    """The final rows of a method by seed."""
    found = [r for r in rows if r["kind"] == "final" and r["method"] == method and r["metric"] == metric]
    return sorted(found, key=lambda r: r["seed"])


def append(
    path: Path,
    rows: Rows,
    empty: Callable[[], dict[str, Any]],
    instead: Callable[[dict[str, Any]], bool] = lambda row: False,
) -> None:
    """Add rows to the result file, whoever else does so at the same time. instead: whether they take a row's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent, os.O_RDONLY):  # the folder: no lock file is left beside the results
        result = load(path, empty)
        result["config"] = empty()["config"]
        result["rows"] = [row for row in result["rows"] if not instead(row)] + rows
        result["seeds"] = sorted({r["seed"] for r in result["rows"] if "seed" in r})
        write_json(path, result)


@contextlib.contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the file `path`, which no other can until the end, however that comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        mine = True
        try:
            held.enter_context(_locked(path, os.O_RDWR | os.O_CREAT, 0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        yield mine


@contextlib.contextmanager
def _locked(path: Path, flags: int, mode: int = 0) -> Iterator[None]:
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | mode)
        yield
    finally:
        os.close(descriptor)


def train(config: str, overrides: Sequence[str], name: str, seed: int, scratch: Path) -> None:
    """One run by the real command on one thread, into scratch/name; continues one that was stopped."""
    command = [sys.executable, "-m", "align.train", config, f"name={name}", f"train.seed={seed}", *overrides]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"output_dir={scratch}"], cwd=ROOT, check=True, env=one_thread)


def run_rows(method: str, seed: int, folder: Path, metric: str = "verifier") -> Rows:
    """A finished run: its curve, and base, final score and paired gain on all held-out prompts, by one reward."""
    summary = json.loads((folder / "summary.json").read_text())
    settings = load_resolved(folder / "config.yaml").eval
    shown = min(settings.during, settings.prompts)
    rows: Rows = [
        {
            "method": method,
            "seed": seed,
            "kind": "curve",
            "metric": metric,
            "iteration": row["iteration"],
            "mean": row[f"eval/{metric}"],
            "ci95": row[f"eval/{metric}_ci95"],
            "n": shown,
            "nfe": row["nfe"],
            "seconds": round(row["seconds"], 1),
        }
        for row in metric_rows(folder / "metrics.jsonl")[0]
        if row["kind"] == "eval"
    ]
    scores = {k: json.loads((folder / "eval" / f"{k}.json").read_text())["scores"][metric] for k in ("base", "tuned")}
    rows.append(
        {
            "method": method,
            "seed": seed,
            "kind": "final",
            "metric": metric,
            "iteration": summary["iterations"],
            "base": summary["base"][metric],
            "mean": summary["tuned"][metric],
            "gain": summary["tuned"][metric] - summary["base"][metric],
            "gain_ci95": summary["delta_ci95"][metric],
            "full_base": statistics.mean(s == 1 for s in scores["base"]),
            "full": statistics.mean(s == 1 for s in scores["tuned"]),
            "n": len(scores["tuned"]),
            "nfe": summary["nfe"],
            "seconds": round(summary["seconds"], 1),
        }
    )
    return rows


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and half width of its 95 % interval by Student's t; None for fewer than two values or more than ten."""
    if len(values) not in STUDENT:
        return None
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def spread(values: Sequence[float]) -> str:
    """Mean with its interval over the seeds, as far as there are enough."""
    if not values:
        return ""
    found = interval(values)
    if found is None:
        return f"{statistics.mean(values):+.3f}"
    mean, half = found
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def change_at(curve: Rows, nfe: float) -> float | None:
    """Change since the base when a run has spent `nfe` evaluations, between the points of its curve; None outside it."""
    for before, after in pairwise(curve):
        if before["nfe"] <= nfe <= after["nfe"]:
            share = (nfe - before["nfe"]) / (after["nfe"] - before["nfe"])
            return float(before["mean"] + share * (after["mean"] - before["mean"]) - curve[0]["mean"])
    return None


def command_line(
    text: str | None,
    methods: Sequence[str] | Mapping[str, Any],
    scratch: Path,
    run: Callable[[list[str], list[int], Path], None],
    add: Callable[[str, int, Path], None],
    show: Callable[[], None],
    more: Mapping[str, Callable[[list[str], list[int], Path], None]] | None = None,
) -> None:
    """run, add, show and `more`, with --methods, --seeds and --scratch (`scratch` if not given)."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "show", "add", *(more or {})])
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=scratch)
    arguments = parser.parse_args()
    folder = arguments.scratch.resolve()
    if arguments.action == "run":
        run(arguments.methods, arguments.seeds, folder)
    elif arguments.action == "add":
        for method in arguments.methods:
            for seed in arguments.seeds:
                add(method, seed, folder / f"{method}-{seed}")
    elif arguments.action == "show":
        show()
    else:
        (more or {})[arguments.action](arguments.methods, arguments.seeds, folder)


def place(page: Path, text: str, mark: str = "results") -> None:
    """Put `text` between the page's marks `<!-- mark -->` and `<!-- end of mark -->`; the second may be missing."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    head, found, rest = page.read_text().partition(begin)
    if not found:
        raise ValueError(f"{page} has no mark {begin}")
    tail = rest.partition(end)[2] if end in rest else rest
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


GOLD = {"verifier": "graded verifier, held-out prompts"}


def draw(
    rows: Rows,
    colours: Mapping[str, str],
    figure_path: Path,
    bands: bool = False,
    metrics: Mapping[str, str] = GOLD,
    costs: Mapping[str, str] | None = None,
) -> None:
    """Mean over seeds (line), each seed (thin line); bands: 95 % intervals over the seeds.

    metrics: metric -> label, a row of panels each; costs: key -> label, a column each (all three costs if None).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = costs or {"iteration": "iterations", "nfe": "network evaluations", "seconds": "seconds on one thread"}
    shape = {
        "figsize": (4.33 * len(costs), 1.2 + (2.8 if len(metrics) == 1 else 2.2) * len(metrics)),
        "sharex": "col",
        "sharey": "row",
        "squeeze": False,
    }
    figure, axes = plt.subplots(len(metrics), len(costs), layout="constrained", **shape)
    for panels, (metric, ylabel) in zip(axes, metrics.items(), strict=True):
        for axis, key in zip(panels, costs, strict=True):
            for method, colour in colours.items():
                mine = [r for r in rows if r["kind"] == "curve" and r["method"] == method and r["metric"] == metric]
                _draw_method(axis, mine, key, colour, method, bands)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(ylabel)
    for axis, (key, label) in zip(axes[-1], costs.items(), strict=True):
        axis.set_xlabel(label + " (thousands)" * (key == "nfe"))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=min(5, 2 * len(costs), len(labels)))
    figure_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(figure_path, dpi=110)
    plt.close(figure)


def _draw_method(axis: Any, rows: Rows, key: str, colour: str, method: str, bands: bool) -> None:
    """One method in one panel."""
    scale = 1e-3 if key == "nfe" else 1
    curves = [[r for r in rows if r["seed"] == s] for s in sorted({r["seed"] for r in rows})]
    for curve in curves:
        axis.plot([r[key] * scale for r in curve], [r["mean"] for r in curve], color=colour, alpha=0.3, lw=1)
    points = list(zip(*curves, strict=False)) if curves else []
    xs = [statistics.mean(r[key] * scale for r in p) for p in points]
    ys = [statistics.mean(r["mean"] for r in p) for p in points]
    axis.plot(xs, ys, color=colour, lw=2.2, label=f"{method} ({len(curves)} seeds)")
    found = [interval([r["mean"] for r in p]) for p in points] if bands else []
    if found and None not in found:
        half = [f[1] for f in found if f is not None]
        low, high = ([y + s * h for y, h in zip(ys, half, strict=True)] for s in (-1, 1))
        axis.fill_between(xs, low, high, color=colour, alpha=0.1, lw=0)
