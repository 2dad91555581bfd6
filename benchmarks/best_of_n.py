"""Over-optimisation without training: of n images of a prompt, the one that a judge likes best, as arXiv 2310.02743 does.

    python benchmarks/best_of_n.py run      # 64 prompts, 256 images each: about 10 minutes on one core
    python benchmarks/best_of_n.py show     # figure and table from the result file

The best of n is log n - (n - 1) / n nats from the base model, whatever the judge, so that judges are compared at equal
distance, on the same images. Judges are the shipped proxies, and the committee of them by mean, lowest member and mean
less variance; the exact verifier (gold) is only measured.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import curves
import torch
from curves import ROOT, Rows, place
from overoptimisation import COEFFICIENT, MEMBERS, PAGE, PROMPTS, SEED, STEPS, scores_of, standardised
from torch import Tensor

from align.tracking import write_json
from rewards.uncertainty import aggregate

RESULTS = ROOT / "benchmarks" / "results" / "best_of_n.json"
FIGURE = ROOT / "docs" / "assets" / "best-of-n.png"
GROUPS, SIZE = 64, 256
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RULES = ("mean", "wco", "uwo")
COLOURS = {"one member": "#57606a", "mean": "#1f6feb", "wco": "#d1611f", "uwo": "#1a7f37", "gold": "#8c959f"}


def empty() -> dict[str, Any]:
    """A result file without rows."""
    settings = {
        "model": "playground",
        "prompts": PROMPTS,
        "groups": GROUPS,
        "images": SIZE,
        "num_steps": STEPS,
        "uwo": COEFFICIENT,
    }
    return curves.empty_result("best_of_n.py", {}) | {"config": settings, "seeds": [SEED]}


def best_of(values: Tensor, of: Tensor, count: int) -> Tensor:
    """(g,) expected `of` of the one with the highest value among `count` drawn from a group without replacement.

    values, of: (g, N). Exact over all subsets: the i-th lowest is the best of C(i - 1, count - 1) of the C(N, count).
    """
    total = values.shape[1]
    ranks = torch.arange(1, total + 1, dtype=torch.float64)

    def log_choose(n: Tensor, k: int) -> Tensor:
        return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)

    share = torch.where(
        ranks >= count,
        (log_choose((ranks - 1).clamp_min(count - 1), count - 1) - log_choose(torch.tensor(float(total)), count)).exp(),
        0.0,
    )
    return of.gather(1, values.argsort(dim=1)).double() @ share


def run() -> None:
    """Draw the images, judge them, and write the result file."""
    found = scores_of(None, GROUPS, SIZE)
    gold = found.pop("gold").view(GROUPS, SIZE)
    members = standardised(found, found).view(len(found), GROUPS, SIZE)
    judges = {rule: aggregate(members.flatten(1), rule, COEFFICIENT, "population").view(GROUPS, SIZE) for rule in RULES}
    judges |= dict(zip(found, members, strict=True))
    judges["gold"] = gold
    rows: Rows = []
    for count in COUNTS:
        golds = {name: best_of(values, gold, count) for name, values in judges.items()}
        golds["one member"] = torch.stack([golds[name] for name in found]).mean(dim=0)
        own = {name: best_of(values, values, count) for name, values in judges.items()}
        own["one member"] = torch.stack([own[name] for name in found]).mean(dim=0)
        for name, values in golds.items():
            rows.append(_row(name, count, "gold", values))
            rows.append(_row(name, count, "own", own[name]))
            if name in RULES:
                rows.append(_row(name, count, "gold minus mean", values - golds["mean"]))
                rows.append(_row(name, count, "gold minus one member", values - golds["one member"]))
    write_json(RESULTS, empty() | {"rows": rows})


def _row(method: str, count: int, metric: str, values: Tensor) -> dict[str, Any]:
    """Mean over prompts of `values` (g,) with its 95 % interval."""
    row = {"method": method, "kind": "best_of", "count": count, "kl": math.log(count) - (count - 1) / count}
    half = float(1.96 * values.std() / len(values) ** 0.5)
    return row | {"metric": metric, "n": len(values), "mean": float(values.mean()), "ci95": half}


def show() -> None:
    """Figure in docs/assets, table in the page."""
    rows = curves.load(RESULTS, empty)["rows"]
    found = {(r["method"], r["count"], r["metric"]): r for r in rows}
    draw(found)
    names = ["one member", *[f"member {m}" for m in MEMBERS], *RULES, "gold"]
    lines = [f"| n | nats | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for count in COUNTS[::2]:
        cells = [f"{found[name, count, 'gold']['mean']:.3f}" for name in names]
        lines.append(f"| {count} | {found['mean', count, 'gold']['kl']:.2f} | {' | '.join(cells)} |")
    last = COUNTS[-1]
    kept = [f"| judge | highest gold, at n | at n = {last} | kept of the gain |", "|---|---|---|---|"]
    for name in names:
        line = [found[name, count, "gold"]["mean"] for count in COUNTS]
        peak = max(range(len(COUNTS)), key=lambda i: line[i])
        share = (line[-1] - line[0]) / (line[peak] - line[0])
        kept.append(f"| {name} | {line[peak]:.3f}, {COUNTS[peak]} | {line[-1]:.3f} | {share:.0%} |")

    def gap(rule: str, metric: str) -> str:
        row = found[rule, last, metric]
        return f"{row['mean']:+.3f} ± {row['ci95']:.3f}"

    against = ", ".join(f"{rule} {gap(rule, 'gold minus mean')}" for rule in RULES[1:])
    single = ", ".join(f"{rule} {gap(rule, 'gold minus one member')}" for rule in RULES)
    row = found["one member", 1, "gold"]
    text = [
        f"![gold and the judge's own score of the best of n](../assets/{FIGURE.name})",
        f"Gold of the best of n images, {row['n']} prompts with {SIZE} images each; `one member` is the mean over the five:",
        "\n".join(lines),
        "\n".join(kept),
        f"At n = {last}, minus `mean`: {against}; minus `one member`: {single} (95 % over prompts, which is also the uncertainty "
        f"of the levels: ± {row['ci95']:.3f} at n = 1). From `benchmarks/results/{RESULTS.name}`.",
    ]
    place(PAGE, "\n\n".join(text), "best of n")


def draw(found: dict[tuple[str, int, str], dict[str, Any]]) -> None:
    """Gold, and what the judge itself makes of its choice, against the distance from the base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharex=True, layout="constrained")
    for axis, metric in zip(axes, ("gold", "own"), strict=True):
        for member in MEMBERS:
            line = [found[f"member {member}", count, metric] for count in COUNTS]
            axis.plot([r["kl"] for r in line], [r["mean"] for r in line], color="#c9ced6", lw=1)
        for name, colour in COLOURS.items():
            if (name, metric) == ("gold", "own"):
                continue
            line = [found[name, count, metric] for count in COUNTS]
            style = ":" if name == "gold" else "-"
            axis.plot([r["kl"] for r in line], [r["mean"] for r in line], style, color=colour, lw=2, label=name)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("nats from the base model: log n - (n - 1) / n")
    axes[0].set_ylabel("gold")
    axes[1].set_ylabel("the judge's own score, std of the base")
    axes[0].legend(frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "show"])
    {"run": run, "show": show}[parser.parse_args().action]()
