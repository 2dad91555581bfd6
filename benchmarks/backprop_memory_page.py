"""Tables and figure of `backprop_memory.py`, from its result files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from curves import ROOT, Rows, place

FIGURE = ROOT / "docs" / "assets" / "backprop-memory.png"
PAGE = ROOT / "docs" / "methods" / "reward-backprop.md"
PHASES = ("sample", "image", "backward")
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "graph": ("plain graph", {"color": "#d62728"}),
    "adjoint": ("adjoint", {"color": "#1f77b4", "lw": 3.5}),
    "checkpoint": ("each step checkpointed", {"color": "#ff7f0e", "ls": "--"}),
    "adjoint_cut": ("adjoint, one image a call", {"color": "#2ca02c"}),
}
"""Strategy -> label and style, in the order they are drawn: checkpoint lies on top of adjoint."""


def results(model: str) -> Path:
    """Result file of a model."""
    suffix = "" if model == "playground" else f"_{model.replace('-', '_')}"
    return ROOT / "benchmarks" / "results" / f"backprop_memory{suffix}.json"


def show(models: Iterable[str]) -> None:
    """Put the tables of all result files into the page, and draw the playground's figure."""
    parts = []
    for model in models:
        path = results(model)
        if path.is_file():
            parts += _section(model, json.loads(path.read_text()))
            continue
        command = f"python benchmarks/backprop_memory.py run --random {model}"
        parts.append(f"`{model}` at 512 px: not measured; on a GPU, `{command}` and `{command} --largest`.")
    place(PAGE, "\n\n".join(parts), "memory")


def _section(model: str, found: dict[str, Any]) -> list[str]:
    """Paragraphs of one result file."""
    updates = [r for r in found["rows"] if r["kind"] == "update"]
    largest = [r for r in found["rows"] if r["kind"] == "largest"]
    parts = []
    if updates:
        parts += [_caption(found, updates), growth_table(updates)]
        if model == "playground":
            draw(updates)
            parts.append("![peak memory against K](../assets/backprop-memory.png)")
        parts += [
            "Peaks of `adjoint` in its two halves, in bytes:",
            phase_table(updates),
            *closed_forms(updates),
            resident(updates),
        ]
    if largest:
        limit = f"{largest[0]['limit_gb']:g} GiB"
        parts += [
            f"Largest batch of one call each for network, decoder and reward within {limit}:",
            largest_table(largest),
        ]
    return [*parts, f"From `{results(model).relative_to(ROOT)}`, by `{found['command']}`."]


def closed_forms(rows: Rows) -> list[str]:
    """Sentences: what two measurements of the plain graph foretell of all the largest K, and what was measured there."""
    found = []
    for blocks in sorted({r["block_checkpointing"] for r in rows}):
        mine = {(r["method"], r["k"]): r for r in rows if r["block_checkpointing"] == blocks and r["mean"] is not None}
        counts = sorted(k for method, k in mine if method == "graph")
        if len(counts) < 3 or ("adjoint", counts[-1]) not in mine:
            continue
        first, last = counts[0], counts[-1]
        x = mine["graph", first]["latents_bytes"] / 2**20
        a = (mine["graph", counts[1]]["mean"] - mine["graph", first]["mean"]) / (counts[1] - first)
        image = mine["graph", first]["mean"] - first * a
        found.append(
            f"{'With' if blocks else 'Without'} checkpointed blocks the graph at K = {first} and {counts[1]} says that a call keeps "
            f"A = {a:.2f} MiB ({a / x:,.0f} times its latents X) and decoder and reward V + R = {image:.2f} MiB. At K = {last} that "
            f"makes K A + V + R = {last * a + image:.2f} MiB for the graph, measured {mine['graph', last]['mean']:.2f}, and "
            f"K X + max(A, V + R) = {last * x + max(a, image):.2f} MiB for the adjoint, measured {mine['adjoint', last]['mean']:.2f}."
        )
    return found


def growth_table(rows: Rows) -> str:
    """Markdown: peak of every strategy against K, and what a further step adds."""
    counts = sorted({r["k"] for r in rows})
    lines = [
        f"| strategy | blocks checkpointed | {' | '.join(f'K = {k}' for k in counts)} | bytes a further step | evaluations, K = "
        f"{counts[0]} to {counts[-1]} | seconds | gradient |",
        "|" + "---|" * (len(counts) + 6),
    ]
    for method, blocks in sorted({(r["method"], r["block_checkpointing"]) for r in rows}, key=lambda p: (p[1], p[0])):
        mine = {r["k"]: r for r in rows if (r["method"], r["block_checkpointing"]) == (method, blocks)}
        shown = [f"{mine[k]['mean']:.2f}" if mine[k]["mean"] is not None else "does not fit" for k in counts]
        known = [mine[k] for k in counts if mine[k]["mean"] is not None]
        growth = [f"{r['growth_per_step_bytes']:,.0f}" for r in known if "growth_per_step_bytes" in r]
        cost = " to ".join(f"{mine[k]['nfe']:,}" for k in (counts[0], counts[-1]))
        seconds = " to ".join(dict.fromkeys(f"{r['seconds']:.2f}" for r in (known[0], known[-1]))) if known else ""
        worst = max(r["gradient_difference"] for r in known) if known else None
        lines.append(
            f"| `{method}` | {'yes' if blocks else 'no'} | {' | '.join(shown)} | {', '.join(dict.fromkeys(growth))} "
            f"| {cost} | {seconds} | {'' if worst is None else f'{worst:.0e}' if worst else 'equal'} |"
        )
    return "\n".join(lines)


def phase_table(rows: Rows) -> str:
    """Markdown: where the adjoint's peak is, in bytes."""
    lines = [
        "| blocks checkpointed | K | decoder and reward | chain backward | whole update | a further step: chain backward "
        "| whole update | stored latents of a step |",
        "|" + "---|" * 8,
    ]
    for r in sorted((r for r in rows if r["method"] == "adjoint"), key=lambda r: (r["block_checkpointing"], r["k"])):
        if r["mean"] is not None:
            growth = [
                f"{r[f'{p}growth_per_step_bytes']:+,.0f}" if f"{p}growth_per_step_bytes" in r else ""
                for p in ("backward_", "")
            ]
            parts = " | ".join(f"{r[f'{p}_bytes']:,}" for p in ("image", "backward", "whole"))
            lines.append(
                f"| {'yes' if r['block_checkpointing'] else 'no'} | {r['k']} | {parts} | {growth[0]} | {growth[1]} "
                f"| {r['latents_bytes']:,} |"
            )
    return "\n".join(lines)


def largest_table(rows: Rows) -> str:
    """Markdown: largest batches within a limit."""
    lines = [
        "| strategy | K | blocks checkpointed | largest batch | its peak, weights included |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        blocks, peak = "yes" if r["block_checkpointing"] else "no", r["peak_mb"]
        lines.append(
            f"| `{r['method']}` | {r['k']} | {blocks} | {r['mean']} | {f'{peak / 1024:.1f} GiB' if peak else ''} |"
        )
    return "\n".join(lines)


def draw(rows: Rows) -> None:
    """Peak against K: a panel without and one with checkpointed blocks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({r["block_checkpointing"] for r in rows})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 4.2 * len(panels), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, blocks in zip(axes[0], panels, strict=True):
        mine = [r for r in rows if r["block_checkpointing"] == blocks and r["mean"] is not None]
        for method, (label, style) in LINES.items():
            points = sorted((r["k"], r["mean"]) for r in mine if r["method"] == method)
            look: dict[str, Any] = {"lw": 2, "marker": "o", "ms": 4, "label": label}
            axis.plot([k for k, _ in points], [peak for _, peak in points], **look | style)
        title = "blocks of the network checkpointed" if blocks else "blocks not checkpointed"
        axis.set(title=title, xlabel="differentiated steps K", xticks=sorted({r["k"] for r in mine}))
        axis.set_ylim(0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("peak of an update, MiB")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


def _caption(found: dict[str, Any], rows: Rows) -> str:
    config, machine = found["config"], found["machine"]
    where = ", ".join(machine["gpus"]) or "CPU, one thread"
    clock = "seconds" if machine["gpus"] else "CPU seconds"
    return (
        f"`{rows[0]['model']}`, {config['model']['precision']}, batch {rows[0]['batch']}, {config['sampler']['num_steps']} steps, "
        f"guidance {config['sampler']['guidance_scale']:g}, {where}. Peak in MiB of what an update allocates, weights not "
        f"included; bytes that a further step adds; network evaluations of an image; {clock} of an update; largest relative "
        "difference of an adapter tensor's gradient from the plain graph's."
    )


def resident(rows: Rows) -> str:
    """Sentence: what the system gave the processes."""
    known = [r for r in rows if r["mean"] is not None]
    added = [r["rss_mb"] - r["rss_before_mb"] for r in known]
    before = [r["rss_before_mb"] for r in known]
    return (
        "Peak resident memory of the processes (`ru_maxrss`), for comparison: "
        f"{min(before):,.0f} to {max(before):,.0f} MiB before the first update, "
        f"{min(added):,.0f} to {max(added):,.0f} MiB more after four."
    )
