"""Learning curves of the baselines on the playground: held-out verifier score against iterations, evaluations, seconds.

    python benchmarks/baselines.py run --seeds 0 1 2     # appends one finished run at a time, skips those that are there
    python benchmarks/baselines.py show                  # figure and tables from the result file

Every run is the real command (`python -m align.train`) on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import curves
from curves import ROOT, place

from align.run import environment

RESULTS = ROOT / "benchmarks" / "results" / "baselines.json"
FIGURE = ROOT / "docs" / "assets" / "baselines.png"
CONFIGS = {"nft": "configs/demo.yaml", "flow_grpo": "configs/playground/flow_grpo.yaml"}
PAGES = {"nft": "docs/methods/nft.md", "flow_grpo": "docs/methods/flow-grpo.md"}
COLOURS = {"nft": "#1f6feb", "flow_grpo": "#d1611f"}


def empty() -> dict[str, Any]:
    """A result file without a run."""
    return {
        "command": "python benchmarks/baselines.py run --seeds 0 1 2",
        "config": CONFIGS,
        "seeds": [],
        "machine": environment(),
        "rows": [],
    }


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    return curves.load(RESULTS, empty)


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file does not have yet, one after the other."""
    for seed in seeds:
        for method in methods:
            if any(r["method"] == method and r["seed"] == seed for r in load()["rows"]):
                continue
            curves.train(CONFIGS[method], [], f"{method}-{seed}", seed, scratch)
            add(method, seed, scratch / f"{method}-{seed}")


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: its curve, and base, final score and paired gain on all held-out prompts."""
    curves.append(RESULTS, curves.run_rows(method, seed, folder), empty)


def show() -> None:
    """Figure in docs/assets and a table in each method's page."""
    rows = load()["rows"]
    curves.draw(rows, COLOURS, FIGURE)
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
