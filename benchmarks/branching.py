"""DDPO, B2-DiffuRL and PRDP on the playground's UNet: gold and proxy reward and diversity on held-out prompts.

    python benchmarks/branching.py run --methods ddpo b2 --seeds 0 1 2   # skips finished runs; start it twice for two cores
    python benchmarks/branching.py add --methods ddpo --seeds 0 --scratch DIR   # take over the finished run DIR/ddpo-0
    python benchmarks/branching.py show                                        # figures and tables from the result file

Every run is the real command (`python -m align.train`) on one thread. All train on the proxy, a small open_clip network;
the exact verifier (gold) is only measured. Diversity is measured afterwards, on every checkpoint's adapter.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import curves
import torch
from curves import ROOT, Rows, change_at, finals_of, place, spread

from align.config import load_resolved
from align.evaluate import sample_images
from align.models.base import load_model
from align.playground.diversity import layout_diversity, read_layouts
from align.playground.proxy import embed_images, load_proxy
from align.prompts import load_prompts
from align.runfolder import metric_rows
from rewards.diversity import embedding_diversity

RESULTS = ROOT / "benchmarks" / "results" / "branching.json"
B2 = "configs/playground/b2_diffurl.yaml"
LARGE = ["prompts.train=playground:train:2048"]
# name -> configuration and overrides
METHODS: dict[str, tuple[str, list[str]]] = {
    "ddpo": ("configs/playground/ddpo.yaml", []),
    "b2": (B2, []),
    "b2_no_curriculum": (B2, ["sampler.branch.suffix_start=10"]),
    "b2_no_branching": (B2, ["sampler.branch.shared=false"]),
    "ddpo_large": ("configs/playground/ddpo.yaml", LARGE),
    "prdp_large": ("configs/playground/prdp.yaml", LARGE),
}
COLOURS = {
    "ddpo": "#d1611f",
    "b2": "#1f6feb",
    "b2_no_curriculum": "#1a7f37",
    "b2_no_branching": "#8250df",
    "ddpo_large": "#d1611f",
    "prdp_large": "#0b9aa2",
}
# page -> methods (the first is compared with), figure
PAGES = {
    "b2-diffurl": ["ddpo", "b2", "b2_no_curriculum", "b2_no_branching"],
    "prdp": ["ddpo_large", "prdp_large"],
}
METRICS = {
    "proxy": "proxy: CLIP cosine",
    "verifier": "gold: graded verifier",
    "clip_distance": "diversity: CLIP distance",
    "layout_distance": "diversity: layouts",
}
STATISTICS = (
    "select/kept_fraction",
    "train/history_fraction",
    "train/clip_fraction",
    "train/zero_spread_fraction",
    "train/pair_error",
    "train/pair_target",
)
PROMPTS, IMAGES = 48, 4


def empty() -> dict[str, Any]:
    """A result file without a run."""
    return curves.empty_result("branching.py", METHODS)


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    return curves.load(RESULTS, empty)


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file lacks and no other process works on, one after the other."""
    curves.run_missing({method: METHODS[method] for method in methods}, seeds, scratch, load, add)


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: curves and final scores by gold and proxy, and the diversity of its checkpoints."""
    rows = curves.run_rows(method, seed, folder) + curves.run_rows(method, seed, folder, "proxy")
    rows += curves.statistic_rows(method, seed, folder, STATISTICS)
    curves.append(RESULTS, rows + diversity(method, seed, folder), empty)


@torch.no_grad()
def diversity(method: str, seed: int, folder: Path) -> Rows:
    """Mean pairwise distances within a prompt's images, for the base and every checkpoint, as points of a curve."""
    config = load_resolved(folder / "config.yaml")
    prompts = [p.text for p in load_prompts(config.prompts.eval)[:PROMPTS] for _ in range(IMAGES)]
    groups = torch.arange(len(prompts)) // IMAGES
    cost = {r["iteration"]: r for r in metric_rows(folder / "metrics.jsonl")[0] if r["kind"] == "train"}
    proxy, rows = load_proxy(), []
    for checkpoint in [None, *sorted((folder / "checkpoints").glob("iteration-*"))]:
        model = load_model(config.model, "cpu")
        iteration, spent = 0, {"nfe": 0, "seconds": 0.0}
        if checkpoint is not None:
            iteration = int(checkpoint.name.removeprefix("iteration-"))
            spent = cost[iteration - 1]
            model.load_adapter(checkpoint / "adapter")
        guidance = config.eval.guidance_scale or config.sampler.guidance_scale
        parts = [
            sample_images(
                model, prompts[i : i + 64], range(i, min(i + 64, len(prompts))), config.eval.num_steps, guidance, 7
            )
            for i in range(0, len(prompts), 64)
        ]
        images = torch.cat(parts)
        found = {
            "clip_distance": embedding_diversity(embed_images(proxy, images), groups),
            "layout_distance": layout_diversity(read_layouts(images), groups),
        }
        for metric, values in found.items():
            row = {"method": method, "seed": seed, "kind": "curve", "metric": metric, "iteration": iteration}
            row |= {"nfe": spent["nfe"], "seconds": round(spent["seconds"], 1), "n": len(values)}
            half = 1.96 * float(values.std()) / len(values) ** 0.5
            rows.append(row | {"mean": float(values.mean()), "ci95": half})
    return rows


def show() -> None:
    """Figures in docs/assets, tables in the methods' pages."""
    rows = load()["rows"]
    present = {r["method"] for r in rows if r["kind"] == "final"}
    for page, methods in PAGES.items():
        colours = {m: COLOURS[m] for m in methods if m in present}
        if not colours:
            continue
        figure = ROOT / "docs" / "assets" / f"{page}.png"
        costs = {"nfe": "network evaluations", "seconds": "seconds on one thread"}
        curves.draw(rows, colours, figure, metrics=METRICS, costs=costs)
        text = [comparison(rows, list(colours)), f"![gold and proxy reward and diversity](../assets/{figure.name})"]
        if "b2" in colours:
            text.append(parts(rows, "b2", [m for m in colours if m != "b2"]))
        text += ["Each run:\n\n" + single_runs(rows, list(colours))]
        text += ["From `benchmarks/results/branching.json`; seconds were taken while other work shared the machine."]
        place(ROOT / "docs" / "methods" / f"{page}.md", "\n\n".join(text))


def curve_of(rows: Rows, method: str, metric: str, seed: int) -> Rows:
    """One curve in order."""
    keys = {"kind": "curve", "method": method, "metric": metric, "seed": seed}
    return sorted((r for r in rows if all(r.get(k) == v for k, v in keys.items())), key=lambda r: r["iteration"])


def comparison(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a method: means over the seeds."""
    first = methods[0]
    ends = {m: {k: finals_of(rows, m, k) for k in ("verifier", "proxy")} for m in methods}
    budget = min(r["nfe"] for found in ends.values() for r in found["verifier"])
    lines = [
        f"| method | seeds | proxy | minus `{first}` | gold | minus `{first}` | proxy, gold at equal evaluations | CLIP diversity "
        "| layout diversity | evaluations | seconds (one thread) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, found in ends.items():
        seeds = [r["seed"] for r in found["verifier"]]
        cells = [f"`{method}`", str(len(seeds))]
        for metric in ("proxy", "verifier"):
            beside = {r["seed"]: r["gain"] for r in ends[first][metric]}
            cells.append(spread([r["gain"] for r in found[metric]]))
            pairs = [r["gain"] - beside[r["seed"]] for r in found[metric] if r["seed"] in beside]
            cells.append("" if method == first else spread(pairs))
        equal = [[change_at(curve_of(rows, method, m, s), budget) for s in seeds] for m in ("proxy", "verifier")]
        cells.append(", ".join(spread([e for e in values if e is not None]) for values in equal))
        for metric in ("clip_distance", "layout_distance"):
            cells.append(
                spread([c[-1]["mean"] - c[0]["mean"] for s in seeds if (c := curve_of(rows, method, metric, s))])
            )
        cells += [f"{statistics.mean(r[k] for r in found['verifier']):,.0f}" for k in ("nfe", "seconds")]
        lines.append(f"| {' | '.join(cells)} |")
    base = {m: next(r["mean"] for r in rows if r["kind"] == "curve" and r["metric"] == m) for m in METRICS}
    count = next(r["n"] for r in rows if r["kind"] == "final")
    lines.append(
        "\nChanges against the base, means over seeds with their 95 % interval (Student's t); `minus` pairs runs of equal seed. "
        f"Proxy (trained on) and gold: {count} held-out prompts, same noise, sampled without noise in the steps. Diversity: mean "
        f"pairwise distance within the {IMAGES} images of each of {PROMPTS} held-out prompts, 1 - cosine of the proxy's embeddings "
        f"and distance of the verifier's layouts; of the base {base['clip_distance']:.3f} and {base['layout_distance']:.3f}. Equal "
        f"evaluations: where the shortest run ends ({budget:,}), between the points of the curve, on the curve's 128 prompts."
    )
    return "\n".join(lines)


def parts(rows: Rows, whole: str, others: list[str]) -> str:
    """Markdown table of a method minus each of the others, paired by seed: what each part of it does."""
    lines = [f"| `{whole}` minus | proxy | gold |", "|---|---|---|"]
    for other in others:
        cells = []
        for metric in ("proxy", "verifier"):
            beside = {r["seed"]: r["gain"] for r in finals_of(rows, other, metric)}
            cells.append(
                spread([r["gain"] - beside[r["seed"]] for r in finals_of(rows, whole, metric) if r["seed"] in beside])
            )
        lines.append(f"| `{other}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def single_runs(rows: Rows, methods: list[str]) -> str:
    """Markdown table, one row a run, with the interval over its prompts."""
    lines = [
        "| method | seed | iterations | gold [95 % over prompts] | proxy [95 %] | full match |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        proxies = {r["seed"]: r for r in finals_of(rows, method, "proxy")}
        for r in finals_of(rows, method, "verifier"):
            cells = [
                f"{x['gain']:+.3f} [{x['gain_ci95'][0]:+.3f}, {x['gain_ci95'][1]:+.3f}]"
                for x in (r, proxies[r["seed"]])
            ]
            match = f"{r['full_base']:.3f} -> {r['full']:.3f}"
            lines.append(f"| `{method}` | {r['seed']} | {r['iteration']} | {' | '.join(cells)} | {match} |")
    return "\n".join(lines)


if __name__ == "__main__":
    curves.command_line(__doc__, METHODS, ROOT / "outputs" / "branching", run, add, show)
