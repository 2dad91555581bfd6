"""Why a rule of credit learns or does not: spread of values and gains by step, and agreement of the gradients they give.

    python benchmarks/credit_variance.py run          # appends one window at a time, skips those that are there
    python benchmarks/credit_variance.py show         # tables in docs/methods/dense-grpo.md

For each window of stochastic steps, some iterations are collected with values at the base weights. From the same rollouts
every rule gives its own gradient; the mean cosine between gradients of different iterations is the share of signal in one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
from curves import ROOT, place
from rich.console import Console
from torch import Tensor

from align import credit
from align.advantages import group_advantages
from align.collect import Batch, collect, score_values
from align.config import load_config
from align.geometry import local_order
from align.prompts import prompt_indices
from align.run import Run, environment, start
from align.tracking import write_json
from align.updates import clipped_ratio_pairs, micro_batches
from rewards.combine import combine

RESULTS = ROOT / "benchmarks" / "results" / "credit_variance.json"
CONFIG = "configs/playground/dense_grpo.yaml"
PAGE = ROOT / "docs" / "methods" / "dense-grpo.md"
WINDOWS = {"0-4": (0, 5, 6), "2-5": (2, 6, 6), "4-7": (4, 8, 5)}
"""Steps -> first, one past last, iterations."""


def step_rewards(values: Tensor, run: Run) -> dict[str, Tensor]:
    """Step rewards (N, S) of every rule from values (N, S+1)."""
    groups = torch.arange(len(values)) // run.config.train.group_size
    turning = credit.turning_point(values, run.config.credit.turning_point, groups)[0]
    terminal = credit.terminal(values[:, -1], values.shape[1] - 1)
    return {
        "terminal": terminal,
        "value": credit.value(values),
        "gain": credit.gain(values),
        "turning_point": turning,
    }


def gradient(run: Run, batch: Batch, advantages: Tensor) -> Tensor:
    """Flat gradient of the clipped-ratio loss of one update, at the weights that sampled. advantages: (n, S)."""
    columns = advantages.shape[1]
    for parameter in run.parameters:
        parameter.grad = None
    for pairs in micro_batches(range(len(advantages)), columns, run.shape.micro_batch):
        loss, _, _ = clipped_ratio_pairs(run, batch, pairs, advantages, lagging=False)
        (loss.sum() / advantages.numel()).backward()
    return torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])


def spreads(values: Tensor, group_size: int) -> dict[str, Tensor]:
    """Within groups, per step: std of the value after it, std of its gain, and the regression of the first on the value before."""
    centred = values.view(-1, group_size, values.shape[1]).double()
    centred = centred - centred.mean(1, keepdim=True)
    before, after = centred[..., :-1], centred[..., 1:]
    coefficient = (after * before).sum((0, 1)) / before.square().sum((0, 1)).clamp_min(1e-9)
    gains = (after - before).square().mean((0, 1)).sqrt()
    return {"value_std": after.square().mean((0, 1)).sqrt(), "gain_std": gains, "coefficient": coefficient}


def measure(name: str, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one window."""
    first, last, iterations = WINDOWS[name]
    window = [f"sampler.window_size={last - first}", f"sampler.window_range=[{first},{last}]"]
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"output_dir={scratch}", "eval.prompts=2", "trackers=[]", f"train.seed={seed}", *window]
        run = start(load_config(ROOT / CONFIG, settings), Console(quiet=True))
        gradients: dict[str, list[Tensor]] = {}
        found: dict[str, list[Tensor]] = {}
        for iteration in range(iterations):
            run.counters.iteration = iteration
            picked = prompt_indices(len(run.train_prompts), run.shape.groups, iteration, seed)
            prompts = [run.train_prompts[i] for i in picked]
            samples = [i for update in local_order(run.shape, 0, seed, iteration) for i in update]
            batch = collect(run, prompts, samples, iteration, seed, lambda *_: None, with_values=True)
            scores = score_values(run, prompts, batch, run.shape.samples, lambda *_: None)
            values, _ = combine(scores.values, scores.valid, {r: c.weight for r, c in run.config.rewards.items()})
            for key, value in spreads(values, run.config.train.group_size).items():
                found.setdefault(key, []).append(value)
            groups = torch.arange(len(values)) // run.config.train.group_size
            everyone = torch.ones(len(values), dtype=torch.bool)
            for rule, rewards in step_rewards(values, run).items():
                advantages, _ = group_advantages(rewards, everyone, groups, run.config.advantage)
                gradients.setdefault(rule, []).append(gradient(run, batch, advantages[samples]))
    rows = []
    for rule, vectors in gradients.items():
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for i, a in enumerate(vectors) for b in vectors[:i]]
        mean = sum(cosines) / len(cosines)
        rows.append({"window": name, "method": rule, "metric": "cosine", "mean": mean, "n": len(cosines)})
    for key, per_iteration in found.items():
        for column, value in enumerate(torch.stack(per_iteration).mean(0).tolist()):
            rows.append({"window": name, "step": first + column, "metric": key, "mean": value, "n": iterations})
    return rows


def run() -> None:
    """Measure the windows that the result file lacks."""
    result: dict[str, Any] = {"command": "python benchmarks/credit_variance.py run", "seeds": [0], "rows": []}
    if RESULTS.is_file():
        result = json.loads(RESULTS.read_text())
    result |= {"config": CONFIG, "machine": environment(), "versions": environment()["versions"]}
    for name in WINDOWS:
        if not any(row["window"] == name for row in result["rows"]):
            result["rows"] += measure(name)
            write_json(RESULTS, result)


def show() -> None:
    """Two tables: spreads by step, and agreement by rule."""
    rows = json.loads(RESULTS.read_text())["rows"]
    lines = ["| window | step | std of the value after it | std of the gain | coefficient |", "|---|---|---|---|---|"]
    for name, step in dict.fromkeys((r["window"], r["step"]) for r in rows if "step" in r):
        cell = {r["metric"]: r["mean"] for r in rows if r["window"] == name and r.get("step") == step}
        lines.append(
            f"| {name} | {step} | {cell['value_std']:.3f} | {cell['gain_std']:.3f} | {cell['coefficient']:.2f} |"
        )
    rules = list(dict.fromkeys(r["method"] for r in rows if r["metric"] == "cosine"))
    lines += ["", f"| window | pairs | {' | '.join(f'`{r}`' for r in rules)} |", "|---|---|" + "---|" * len(rules)]
    for name in dict.fromkeys(r["window"] for r in rows):
        cosines = {r["method"]: r for r in rows if r["window"] == name and r["metric"] == "cosine"}
        cells = " | ".join(f"{cosines[rule]['mean']:+.3f}" for rule in rules)
        lines.append(f"| {name} | {cosines[rules[0]]['n']} | {cells} |")
    place(PAGE, "\n".join(lines), "variance")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "show"])
    if parser.parse_args().action == "run":
        run()
    show()
