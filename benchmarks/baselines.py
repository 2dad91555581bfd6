"""Learning curves of the baselines on the playground: held-out verifier score against iterations, evaluations, seconds.

    python benchmarks/baselines.py run --seeds 0 1 2     # appends one finished run at a time, skips those that are there
    python benchmarks/baselines.py show                  # figure and tables from the result file

Every run is the real command (`python -m align.train`) on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from align.run import environment
from align.runfolder import metric_rows
from align.tracking import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "baselines.json"
FIGURE = ROOT / "docs" / "assets" / "baselines.png"
CONFIGS = {"nft": "configs/demo.yaml", "flow_grpo": "configs/playground/flow_grpo.yaml"}
PAGES = {"nft": "docs/methods/nft.md", "flow_grpo": "docs/methods/flow-grpo.md"}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    if RESULTS.is_file():
        return dict(json.loads(RESULTS.read_text()))
    return {
        "command": "python benchmarks/baselines.py run --seeds 0 1 2",
        "config": CONFIGS,
        "seeds": [],
        "machine": environment(),
        "rows": [],
    }


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file does not have yet, one after the other."""
    for seed in seeds:
        for method in methods:
            if any(r["method"] == method and r["seed"] == seed for r in load()["rows"]):
                continue
            name = f"{method}-{seed}"
            command = [sys.executable, "-m", "align.train", CONFIGS[method], f"name={name}", f"train.seed={seed}"]
            subprocess.run(
                [*command, f"output_dir={scratch}"], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            add(method, seed, scratch / name)


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: its curve, and base, final score and paired gain on all held-out prompts."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [
        {
            "method": method,
            "seed": seed,
            "kind": "curve",
            "metric": "verifier",
            "iteration": row["iteration"],
            "mean": row["eval/verifier"],
            "ci95": row["eval/verifier_ci95"],
            "n": 128,
            "nfe": row["nfe"],
            "seconds": round(row["seconds"], 1),
        }
        for row in metric_rows(folder / "metrics.jsonl")[0]
        if row["kind"] == "eval"
    ]
    scores = {
        k: json.loads((folder / "eval" / f"{k}.json").read_text())["scores"]["verifier"] for k in ("base", "tuned")
    }
    rows.append(
        {
            "method": method,
            "seed": seed,
            "kind": "final",
            "metric": "verifier",
            "iteration": summary["iterations"],
            "base": summary["base"]["verifier"],
            "mean": summary["tuned"]["verifier"],
            "gain": summary["tuned"]["verifier"] - summary["base"]["verifier"],
            "gain_ci95": summary["delta_ci95"]["verifier"],
            "full_base": statistics.mean(s == 1 for s in scores["base"]),
            "full": statistics.mean(s == 1 for s in scores["tuned"]),
            "n": len(scores["tuned"]),
            "nfe": summary["nfe"],
            "seconds": round(summary["seconds"], 1),
        }
    )
    result = load()
    result["rows"] += rows
    result["seeds"] = sorted({r["seed"] for r in result["rows"]})
    write_json(RESULTS, result)


def show() -> None:
    """Figure in docs/assets and a table in each method's page."""
    rows = load()["rows"]
    draw(rows)
    for method, page in PAGES.items():
        finals = [r for r in rows if r["kind"] == "final" and r["method"] == method]
        if finals:
            figure = "![held-out score of the baselines](../assets/baselines.png)"
            source = "From `benchmarks/results/baselines.json`; seconds were taken while other work shared the machine."
            text = f"{table(finals)}\n\n{figure}\n\n{source}"
            place(ROOT / page, text + (attempts() if method == "flow_grpo" else longer(rows)))
    if any(r["method"] == "nft" for r in rows):
        place(ROOT / "README.md", readme(rows))


def readme(rows: list[dict[str, Any]]) -> str:
    """The README's result: what the demo's configuration gains, and its grid."""
    finals = [r for r in rows if r["kind"] == "final" and r["method"] == "nft"]
    gains = ", ".join(f"{r['gain']:+.3f} [{r['gain_ci95'][0]:+.3f}, {r['gain_ci95'][1]:+.3f}]" for r in finals)
    return (
        f"What `make demo` does, measured on {finals[0]['n']} held-out prompts with the same noise before and after: the "
        f"graded verifier score rises from {finals[0]['base']:.3f} by {gains} (one interval a seed, 95 %); the share "
        f"of pictures that match their prompt exactly goes from {finals[0]['full_base']:.2f} to "
        f"{statistics.mean(r['full'] for r in finals):.2f}. Configuration: [`configs/demo.yaml`](configs/demo.yaml), "
        "results: [`benchmarks/results/baselines.json`](benchmarks/results/baselines.json), made by "
        "`python benchmarks/baselines.py run`.\n\n![base and tuned on the same prompts and noise](docs/assets/demo_grid.png)"
    )


def longer(rows: list[dict[str, Any]]) -> str:
    """The same configuration left to run twice as long."""
    found = [r for r in rows if r["method"] == "nft_long" and r["kind"] == "final"]
    curve = [f"{r['mean']:.3f}" for r in rows if r["method"] == "nft_long" and r["kind"] == "curve"]
    if not found:
        return ""
    head = f"Left to run twice as long (`train.iterations=80`), every tenth iteration: {', '.join(curve)}."
    return f"\n\n{head}\n\n{table(found)}"


def attempts() -> str:
    """Flow-GRPO settings that learnt less here, and how much of each variant's gradient is signal."""
    results = ROOT / "benchmarks" / "results"
    curves: dict[str, list[str]] = {}
    for row in json.loads((results / "flow_grpo_attempts.json").read_text())["rows"]:
        curves.setdefault(row["method"], []).append(f"{row['mean']:.3f} ({row['iteration']})")
    lines = ["\n\nSettings that learnt less, held-out score (iteration):\n"]
    lines += [f"- {name}: {', '.join(points)}" for name, points in curves.items()]
    agreement = results / "gradient_agreement.json"
    if agreement.is_file():
        lines += [
            "\nA likely reason is the share of signal in the gradient: the mean cosine between the gradients of independent "
            "iterations of 192 images at the base (`benchmarks/gradient_agreement.py`).\n",
            "| variant | cosine | pairs |",
            "|---|---|---|",
        ]
        found = json.loads(agreement.read_text())["rows"]
        lines += [f"| {row['method']} | {row['mean']:.3f} | {row['n']} |" for row in found]
    return "\n".join(lines)


def table(finals: list[dict[str, Any]]) -> str:
    """Markdown table, one row a seed."""
    lines = [
        "| seed | iterations | evaluations | seconds (one thread) | base | tuned | gain [95 %] | full match |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in finals:
        low, high = r["gain_ci95"]
        lines.append(
            f"| {r['seed']} | {r['iteration']} | {r['nfe']:,} | {r['seconds']:.0f} | {r['base']:.3f} | {r['mean']:.3f} "
            f"| {r['gain']:+.3f} [{low:+.3f}, {high:+.3f}] | {r['full_base']:.3f} -> {r['full']:.3f} |"
        )
    gains = [r["gain"] for r in finals]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    lines.append(
        f"\nMean gain over {len(gains)} seeds: {statistics.mean(gains):+.3f} (standard deviation {spread:.3f})."
    )
    return "\n".join(lines)


def place(page: Path, text: str) -> None:
    """Put `text` between the page's result marks."""
    head, _, rest = page.read_text().partition(BEGIN)
    tail = rest.partition(END)[2] if END in rest else rest
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def draw(rows: list[dict[str, Any]]) -> None:
    """Mean over seeds (line), each seed (thin line), against the three costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    names = {"iteration": "iterations", "nfe": "network evaluations (thousands)", "seconds": "seconds on one thread"}
    for axis, (key, label) in zip(axes, names.items(), strict=True):
        for method, colour in (("nft", "#1f6feb"), ("flow_grpo", "#d1611f")):
            curves = [
                [r for r in rows if r["kind"] == "curve" and r["method"] == method and r["seed"] == s]
                for s in sorted({r["seed"] for r in rows if r["method"] == method})
            ]
            scale = 1e-3 if key == "nfe" else 1
            for curve in curves:
                axis.plot([r[key] * scale for r in curve], [r["mean"] for r in curve], color=colour, alpha=0.3, lw=1)
            points = list(zip(*curves, strict=False)) if curves else []
            xs = [statistics.mean(r[key] * scale for r in p) for p in points]
            ys = [statistics.mean(r["mean"] for r in p) for p in points]
            axis.plot(xs, ys, color=colour, lw=2.2, label=f"{method} ({len(curves)} seeds)")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("graded verifier, held-out prompts")
    axes[0].legend(frameon=False, loc="upper left")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "action", choices=["run", "show", "add"], help="add: take over the finished run --scratch/METHOD-SEED"
    )
    parser.add_argument("--methods", nargs="+", default=list(CONFIGS), choices=[*CONFIGS, "nft_long"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, default=ROOT / "outputs" / "baselines")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.methods, arguments.seeds, arguments.scratch)
    if arguments.action == "add":
        for method in arguments.methods:
            for seed in arguments.seeds:
                add(method, seed, arguments.scratch / f"{method}-{seed}")
    show()


if __name__ == "__main__":
    main()
