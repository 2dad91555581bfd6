"""Over-optimisation on the playground: a learned proxy is trained far beyond its use while the exact verifier (gold) watches.

    python benchmarks/overoptimisation.py members               # first: how far members and their disagreement can be trusted
    python benchmarks/overoptimisation.py run --seeds 0 1 2     # skips finished runs; start it twice
    python benchmarks/overoptimisation.py add --methods uwo --seeds 0 --scratch DIR   # take over the finished run DIR/uwo-0
    python benchmarks/overoptimisation.py show                  # figure and tables from the result file

One proxy, a committee of five (mean, lowest member, mean less variance) and the mean weighted by uncertainty, each with and
without a pull to the base model, trained by forward-process matching and (`backprop_*`) by the reward's gradient. Every
run is the real command (`python -m align.train`) on one thread.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import curves
import torch
from accelerate import Accelerator
from curves import ROOT, Rows, place, spread
from torch import Tensor

from align.evaluate import evaluate
from align.inference import load_target, ready_reward
from align.prompts import load_prompts
from align.runfolder import metric_rows
from rewards.registry import RewardConfig
from rewards.uncertainty import aggregate
from rewards.uncertainty import spread as member_spread

RESULTS = ROOT / "benchmarks" / "results" / "overoptimisation.json"
PAGE = ROOT / "docs" / "methods" / "uncertainty.md"
ASSETS = ROOT / "docs" / "assets"
MEMBERS = (1, 2, 3, 4, 5)
COEFFICIENT = 0.5
"""Of the variance in uwo, with members in the base model's units."""


@dataclass(frozen=True)
class Optimiser:
    """What trains the policy, and where its results go."""

    prefix: str
    """Of its methods' names."""
    single: str
    """Configuration with one proxy."""
    committee: str
    """Configuration with the committee, its mode of uncertainty weight."""
    overrides: tuple[str, ...]
    """Of both."""
    pull: str
    """The setting that pulls to the base; at 1e-9 the distance is measured but not felt."""
    strength: tuple[str, str]
    """Of the pull, with one proxy and with the committee."""
    figure: Path
    mark: str
    """Of its place in the page."""
    parts: tuple[str, ...] = ()
    """Of PARTS, those that are also run, without a pull."""

    def methods(self) -> dict[str, tuple[str, list[str]]]:
        """Name -> configuration and overrides."""
        found = {}
        for suffix, strengths in (("", ("1e-9", "1e-9")), ("_kl", self.strength)):
            for arm, changes in ARMS.items():
                config, strength = (self.single, self.committee)[arm != "single"], strengths[arm != "single"]
                overrides = [*self.overrides, *changes, f"{self.pull}={strength}"]
                found[f"{self.prefix}{arm}{suffix}"] = (config, overrides)
        config, overrides = found[f"{self.prefix}weight"]
        return found | {f"{self.prefix}{part}": (config, [*overrides, *PARTS[part]]) for part in self.parts}


# what is trained -> overrides of the optimiser's configuration
ARMS: dict[str, list[str]] = {
    "single": [],
    "mean": ["uncertainty.mode=off"],
    "wco": ["uncertainty.mode=off", "rewards.committee.args.objective=wco"],
    "uwo": [
        "uncertainty.mode=off",
        "rewards.committee.args.objective=uwo",
        f"rewards.committee.args.coefficient={COEFFICIENT}",
    ],
    "weight": [],
}
PARTS: dict[str, list[str]] = {"weights_only": ["uncertainty.eta=0"], "penalty_only": ["uncertainty.kappa=0"]}
"""What of `weight` does it: its weights, or what it pays for doubt."""
MATCHING = Optimiser(
    prefix="",
    single="configs/playground/one_proxy.yaml",
    committee="configs/playground/ensemble.yaml",
    overrides=(),
    pull="objective.ref_coef",
    strength=("0.3", "0.3"),
    figure=ASSETS / "overoptimisation.png",
    mark="results",
)
BACKPROP = Optimiser(
    prefix="backprop_",
    single="configs/playground/flowbp_sparse.yaml",
    committee="configs/playground/ensemble_backprop.yaml",
    overrides=("optim.schedule=constant", "train.iterations=30", "eval.every=5", "eval.during=256"),
    pull="backprop.velocity_penalty",
    # the penalty is weighed against the score itself, and the committee's unit is about five times the proxy's
    strength=("0.4", "2"),
    figure=ASSETS / "overoptimisation-backprop.png",
    mark="backprop",
    parts=("weights_only", "penalty_only"),
)
OPTIMISERS = (MATCHING, BACKPROP)
METHODS = {name: settings for optimiser in OPTIMISERS for name, settings in optimiser.methods().items()}
COLOURS = {"single": "#57606a", "mean": "#1f6feb", "wco": "#d1611f", "uwo": "#1a7f37", "weight": "#8250df"}
GROUPS, SIZE = 64, 12
PROMPTS, STEPS, SEED = "playground:seen_test", 10, 5
"""Of the images that members are examined on."""
BASE = "base"
SPLITS = {
    BASE: None,
    "one proxy, iteration 10": "single-0/checkpoints/iteration-000010/adapter",
    "one proxy's gradient, 30": "backprop_single-0/checkpoints/iteration-000030/adapter",
    "committee's gradient, 30": "backprop_mean-0/checkpoints/iteration-000030/adapter",
}
"""Whose images the members are examined on: the base model's and those of policies that were led astray, in the scratch folder."""
STATISTICS = (
    "uncertainty/mean",
    "uncertainty/corr_reward",
    "weight/ess",
    "ensemble/std_mean",
)


def empty() -> dict[str, Any]:
    """A result file without a run."""
    return curves.empty_result("overoptimisation.py", METHODS)


def load() -> dict[str, Any]:
    """The result file, or an empty one."""
    return curves.load(RESULTS, empty)


def trained_reward(method: str) -> str:
    """The name of what a method trains."""
    return "proxy" if "single" in method else "committee"


def run(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """Every (seed, method) that the result file lacks and no other process works on, one after the other."""
    for seed in seeds:
        # one proxy is another member for each seed, so that no lucky one stands for all
        single = [f"rewards.proxy.args.seed={MEMBERS[seed % len(MEMBERS)]}"]
        arms = {m: (METHODS[m][0], METHODS[m][1] + single * ("single" in m)) for m in methods}
        curves.run_missing(arms, [seed], scratch, load, add)


def add(method: str, seed: int, folder: Path) -> None:
    """Append one finished run: gold and what was trained, with the distance from the base at each evaluation."""
    name = trained_reward(method)
    gold, trained = curves.run_rows(method, seed, folder), curves.run_rows(method, seed, folder, name)
    base = [x for x in json.loads((folder / "eval" / "base.json").read_text())["scores"][name] if x is not None]
    for row in trained:
        row["metric"], row["unit"] = "trained", statistics.pstdev(base)
    steps = [r for r in metric_rows(folder / "metrics.jsonl")[0] if r["kind"] == "train"]
    distance = {r["iteration"] + 1: r["train/ref_mse"] for r in steps if r.get("train/ref_mse") is not None}
    rows = [*gold, *trained]
    for row in rows:
        if row["kind"] == "curve":
            row["distance"] = distance.get(row["iteration"], 0.0)
    curves.append(RESULTS, rows + curves.statistic_rows(method, seed, folder, STATISTICS), empty)


def members(methods: list[str], seeds: list[int], scratch: Path) -> None:
    """What the members are worth, on images of the base and of the policies that there are; rows of others are kept."""
    base: dict[str, Tensor] = {}
    rows: Rows = []
    for split, adapter in SPLITS.items():
        folder = None if adapter is None else scratch / adapter
        if folder is not None and not folder.is_dir():
            continue
        scores = scores_of(folder, GROUPS, SIZE)
        base = base or dict(scores)
        gold = scores.pop("gold").view(-1, SIZE)
        standard = standardised(scores, base).view(len(scores), -1, SIZE)
        judges = dict(zip(scores, standard, strict=True))
        flat = standard.flatten(1)
        for rule in ("mean", "wco", "uwo"):
            judges[rule] = aggregate(flat, rule, COEFFICIENT, "population").view(-1, SIZE)
        for name, values in judges.items():
            rows.append(_row(name, split, "concordance", concordance(values, gold)))
        worth = standardised({"gold": gold}, base)[0]
        error = _centred(judges["mean"]) - _centred(worth)
        doubt = member_spread(flat).view(-1, SIZE)
        pairs = [correlation(a, b) for i, a in enumerate(standard) for b in standard[i + 1 :]]
        rows += [
            _row("mean", split, "doubt and size of the error", correlation(_ranks(doubt), _ranks(error.abs()))),
            _row("mean", split, "doubt and error", correlation(_ranks(doubt), _ranks(error))),
            _row("mean", split, "doubt and score", correlation(_ranks(doubt), _ranks(judges["mean"]))),
            _row("mean", split, "between members", torch.stack(pairs).nanmean(dim=0)),
            _row("mean", split, "doubt", doubt.mean(dim=1)),
            _row("mean", split, "gold", gold.mean(dim=1)),
        ]
    again = {r["split"] for r in rows}
    curves.append(RESULTS, rows, empty, lambda row: row.get("split") in again)


def standardised(scores: dict[str, Tensor], base: dict[str, Tensor]) -> Tensor:
    """(k, ...) the k judges' `scores` in units of what they give the base model's images."""
    return torch.stack([(x - base[n].mean()) / base[n].std(correction=0) for n, x in scores.items()])


def scores_of(folder: Path | None, groups: int, size: int) -> dict[str, Tensor]:
    """Scores (groups x size,) of every member and of gold, images of a prompt in a row, of the base or with an adapter."""
    setup = load_target(
        "playground", None if folder is None else str(folder), num_steps=STEPS, guidance_scale=1.0, seed=SEED
    )
    prompts = [p for p in load_prompts(PROMPTS)[:groups] for _ in range(size)]
    rewards = {
        **{f"member {m}": RewardConfig(type="proxy", args={"seed": m}) for m in MEMBERS},
        "gold": RewardConfig(type="verifier"),
    }
    ready = {name: ready_reward(name, settings, setup.model.device) for name, settings in rewards.items()}
    found = evaluate(
        setup.model, ready, prompts, Accelerator(), num_steps=STEPS, guidance_scale=1.0, seed=SEED, batch_size=96
    )
    return {name: found.scores.values[name].double() for name in rewards}


def concordance(values: Tensor, gold: Tensor) -> Tensor:
    """(g,) share of a group's pairs of unequal gold that `values` (g, n) order alike; NaN for a group without such a pair."""
    above = gold[:, :, None] > gold[:, None, :] + 1e-9
    right = values[:, :, None] > values[:, None, :]
    return (above & right).sum(dim=(1, 2)) / above.sum(dim=(1, 2))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """(g,) Pearson correlation within groups of (g, n); NaN where one does not vary."""
    a, b = _centred(a), _centred(b)
    return (a * b).sum(dim=1) / (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=1, keepdim=True)


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(dim=1).argsort(dim=1).double()


def _row(method: str, split: str, metric: str, values: Tensor) -> dict[str, Any]:
    """Mean over groups of `values` (g,) with its 95 % interval."""
    known = values[~values.isnan()]
    row = {"method": method, "kind": "member", "split": split, "metric": metric, "n": len(known)}
    return row | {"mean": float(known.mean()), "ci95": float(1.96 * known.std() / len(known) ** 0.5)}


def show() -> None:
    """Figures in docs/assets, tables in the page."""
    rows = load()["rows"]
    if any(r["kind"] == "member" for r in rows):
        place(PAGE, worth(rows), "members")
    for optimiser in OPTIMISERS:
        present = [m for m in optimiser.methods() if any(r["kind"] == "final" and r["method"] == m for r in rows)]
        if present:
            draw(rows, present, optimiser)
            parts = [
                f"![gold and trained reward against iterations and distance](../assets/{optimiser.figure.name})",
                table(rows, present, optimiser),
                f"From `benchmarks/results/{RESULTS.name}`.",
            ]
            place(PAGE, "\n\n".join(parts), optimiser.mark)


def curve(rows: Rows, method: str, metric: str) -> list[Rows]:
    """The curve of each seed, by iteration; `mean` is the change since the base, of what is trained in its std there."""
    mine = [r for r in rows if r["kind"] == "curve" and r["method"] == method and r["metric"] == metric]
    found = []
    for seed in sorted({r["seed"] for r in mine}):
        points = sorted((r for r in mine if r["seed"] == seed), key=lambda r: r["iteration"])
        first = points[0]["mean"]
        found.append([p | {"mean": (p["mean"] - first) / p.get("unit", 1.0)} for p in points])
    return found


def draw(rows: Rows, present: list[str], optimiser: Optimiser) -> None:
    """Gold above and what is trained below, mean and (thin) each seed; against iterations, and against the distance from the base."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), sharex="col", sharey="row", layout="constrained")
    panels = (("iteration", ""), ("iteration", "_kl"), ("distance", ""))
    for row, (metric, label) in enumerate((("verifier", "gold: change"), ("trained", "trained: change, std of base"))):
        for axis, (key, suffix) in zip(axes[row], panels, strict=True):
            for arm, colour in COLOURS.items():
                name = optimiser.prefix + arm
                for method, style in ((name + suffix, "-"), (name + "_kl", ":")):
                    if method not in present or (key == "iteration" and style == ":"):
                        continue
                    runs = curve(rows, method, metric)
                    for one in runs if key == "iteration" else []:
                        axis.plot([p[key] for p in one], [p["mean"] for p in one], color=colour, lw=0.8, alpha=0.35)
                    points = list(zip(*runs, strict=False))
                    xs, ys = ([statistics.mean(p[k] for p in point) for point in points] for k in (key, "mean"))
                    shown = arm if (row, key) == (0, "iteration") and not suffix else None
                    axis.plot(xs, ys, style, color=colour, lw=2, label=shown)
            axis.axhline(0, color="#8c959f", lw=0.8)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if key == "distance":
                axis.set_xscale("symlog", linthresh=1e-3)
        axes[row, 0].set_ylabel(label)
    titles = ("without a pull to the base", "with it", "both (dotted: with it)")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis, text in zip(
        axes[1], ("iterations", "iterations", "distance from the base, mean (v - v_ref)²"), strict=True
    ):
        axis.set_xlabel(text)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(COLOURS))
    optimiser.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(optimiser.figure, dpi=110)
    plt.close(figure)


def table(rows: Rows, present: list[str], optimiser: Optimiser) -> str:
    """Markdown table, one row a method: means over the seeds with their interval."""
    lines = [
        "| method | seeds | highest gold, at iteration | gold at the end | kept of the highest | minus `single` at the end | "
        "minus `mean` at the end | trained at the end | distance | reward passes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ends = {m: {c[-1]["seed"]: c[-1]["mean"] for c in curve(rows, m, "verifier")} for m in present}
    for method in present:
        gold = curve(rows, method, "verifier")
        points = list(zip(*gold, strict=False))
        means = [statistics.mean(p["mean"] for p in point) for point in points]
        peak = max(range(len(means)), key=lambda i: means[i])
        trained = [c[-1]["mean"] for c in curve(rows, method, "trained")]
        suffix = "_kl" if method.endswith("_kl") else ""
        less = {}
        for arm in ("single", "mean"):
            other = ends.get(optimiser.prefix + arm + suffix, {})
            less[arm] = [value - other[s] for s, value in ends[method].items() if s in other]
        alone = "single" in method
        cells = [
            f"`{method}`",
            str(len(gold)),
            f"{means[peak]:+.3f}, {points[peak][0]['iteration']}",
            spread([c[-1]["mean"] for c in gold]),
            "" if means[peak] <= 0 else f"{means[-1] / means[peak]:.0%}" if means[-1] > 0 else "nothing",
            "" if alone else spread(less["single"]),
            "" if alone or method == f"{optimiser.prefix}mean{suffix}" else spread(less["mean"]),
            spread(trained),
            f"{statistics.mean(c[-1]['distance'] for c in gold):.3f}",
            "1" if alone else str(len(MEMBERS)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    first = curve(rows, present[0], "verifier")[0][0]
    lines.append(
        f"\nChanges against the base on the curve's {first['n']} held-out prompts, same noise; what is trained in standard "
        "deviations of the base model's scores, so those of different methods are different rewards. Means over seeds, with 95 % "
        "intervals (Student's t); `minus` pairs runs of equal seed. The highest point of a mean curve is picked after the fact and "
        "flattered by its noise. Distance: mean (v - v_ref)² at the end, where the method trains."
    )
    return "\n".join(lines)


def worth(rows: Rows) -> str:
    """Markdown tables of what `members` found."""
    found = {(r["split"], r["method"], r["metric"]): r for r in rows if r["kind"] == "member"}
    splits = [s for s in SPLITS if any(key[0] == s for key in found)]
    judges = [*[f"member {m}" for m in MEMBERS], "mean", "wco", "uwo"]

    def cell(split: str, method: str, metric: str) -> str:
        row = found[split, method, metric]
        return f"{row['mean']:.3f} ± {row['ci95']:.3f}"

    lines = [f"| images of | {' | '.join(judges)} |", f"|---|{'---|' * len(judges)}"]
    lines += [f"| {split} | {' | '.join(cell(split, j, 'concordance') for j in judges)} |" for split in splits]
    metrics = ("between members", "doubt and size of the error", "doubt and error", "doubt and score", "doubt", "gold")
    lines += ["", "| | " + " | ".join(splits) + " |", f"|---|{'---|' * len(splits)}"]
    lines += [f"| {metric} | {' | '.join(cell(s, 'mean', metric) for s in splits)} |" for metric in metrics]
    count = found[BASE, "mean", "gold"]["n"]
    return (
        f"Share of the pairs of a group with unequal gold that a judge orders as gold does ({count} prompts, {SIZE} images each, 95 %; "
        "chance is .5):\n\n"
        + "\n".join(lines[: 2 + len(splits)])
        + "\n\nInside groups: the correlation of the members' scores; the rank correlation of doubt (std over the members) with the "
        "error of their mean against gold, its size and its sign (above 0: overrated), and with the mean itself; and the mean doubt "
        "and gold:\n\n" + "\n".join(lines[3 + len(splits) :])
    )


if __name__ == "__main__":
    curves.command_line(__doc__, METHODS, ROOT / "outputs" / "overoptimisation", run, add, show, {"members": members})
