"""What values cost: one rollout with them, wavefront against one completion at a time, and one without.

    python benchmarks/completions.py run                            # the playground model; a few minutes, alone on the machine
    python benchmarks/completions.py run --random sd35-medium       # its size with random weights, 512 px; needs a GPU
    python benchmarks/completions.py show                           # tables from the result files

`plain` samples, decodes and scores images. `wavefront` does so with values, as training does. `naive` computes the same
values as published code does: every state is completed on its own from its first step, without the velocity that the
rollout has computed there, and decoded and scored on its own. The three take turns in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from curves import ROOT, place
from rich.console import Console
from torch import Tensor

from align.bench import random_model
from align.collect import Batch, collect, passes, score_values
from align.config import load_config
from align.errors import UserError
from align.prompts import Prompt, prompt_indices
from align.run import Run, environment, start
from align.tracking import write_json
from samplers.rollout import solve

CONFIGS = {"playground": "configs/bench/playground.yaml", "sd35-medium": "configs/bench/sd35_medium.yaml"}
PAGE = ROOT / "docs" / "methods" / "dense-grpo.md"
# ways whose times are divided by each other, round by round
PAIRS = (("naive", "wavefront"), ("wavefront", "plain"), ("naive", "plain"))


def results(model: str) -> Path:
    """Result file of a model."""
    return ROOT / "benchmarks" / "results" / f"completions_{model.replace('-', '_')}.json"


def plain(run: Run, images: int) -> list[Tensor]:
    """No values: the final latents, decoded and scored."""
    batch = _collected(run, images, with_values=False)
    _score(run, batch)
    return [batch.final]


def wavefront(run: Run, images: int) -> list[Tensor]:
    """With values, as in training: the completed latents of every stochastic step, then the final ones."""
    batch = _collected(run, images, with_values=True)
    _score(run, batch)
    return [*batch.completions, batch.final]


@torch.no_grad()
def naive(run: Run, images: int) -> list[Tensor]:
    """The same latents one state at a time: all remaining Euler steps, each with its own velocity call."""
    batch = _collected(run, images, with_values=False)
    _score(run, batch)
    found, everyone = [], torch.arange(images)
    for k in batch.plan.stochastic:
        found.append(solve(run.model.velocity, batch.states[k], batch.condition(everyone), run.grid[k:]))
        _score(run, dataclasses.replace(batch, final=found[-1]))
    return [*found, batch.final]


WAYS: dict[str, Callable[[Run, int], list[Tensor]]] = {"plain": plain, "wavefront": wavefront, "naive": naive}


def _collected(run: Run, images: int, with_values: bool) -> Batch:
    return collect(run, _prompts(run), list(range(images)), 0, run.config.train.seed, _silent, with_values=with_values)


def _score(run: Run, batch: Batch) -> None:
    score_values(run, _prompts(run), batch, len(batch.samples), _silent)


def _prompts(run: Run) -> list[Prompt]:
    return [run.train_prompts[i] for i in prompt_indices(len(run.train_prompts), 1, 0, run.config.train.seed)]


def _silent(*_: Any) -> None:
    """A report that nobody reads."""


def now(run: Run) -> float:
    """Seconds, after the device has done what it was asked."""
    if run.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def watched(run: Run) -> Iterator[dict[str, float]]:
    """Inside, velocity calls, decoding and rewards are timed and counted. On a GPU this waits at each, so it is a pass of its own."""
    found: dict[str, float] = dict.fromkeys(("velocity", "decode", "reward", "calls", "nfe"), 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = now(run)
            result = function(*arguments, **options)
            found[name] += now(run) - started
            if name == "velocity":
                found["calls"] += 1
                found["nfe"] += len(arguments[0]) * passes(run.model.guidance_scale)
            return result

        return call

    parts: list[tuple[str, Any, str]] = [("velocity", run.model, "velocity"), ("decode", run.model, "decode")]
    parts += [("reward", reward, "score") for reward in run.rewards.values()]
    for name, owner, method in parts:
        setattr(owner, method, timed(name, getattr(owner, method)))
    try:
        yield found
    finally:
        for _, owner, method in parts:
            delattr(owner, method)


def measure(run: Run, model: str, images: int, rounds: int) -> list[dict[str, Any]]:
    """Rows for one number of images: each way, and the ratios of their times round by round."""
    run.config.train.group_size = run.config.train.rollout_batch = images
    latents = {name: way(run, images) for name, way in WAYS.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for i in range(rounds):
        order = list(WAYS)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            started = now(run)
            WAYS[name](run, images)
            seconds[name].append(now(run) - started)
    rows = [
        {"method": name, "model": model, "images": images, "metric": "seconds", **middle(seconds[name])}
        | profile(run, name, images)
        for name in WAYS
    ]
    for slow, fast in PAIRS:
        ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        row = {"method": f"{slow} / {fast}", "model": model, "images": images, "metric": "ratio"}
        rows.append(row | middle(ratios))
    together, apart = (torch.cat(latents[name]) for name in ("wavefront", "naive"))
    difference = float((together - apart).square().mean().sqrt() / apart.square().mean().sqrt())
    row = {"method": "wavefront - naive", "model": model, "images": images, "metric": "relative difference"}
    return [*rows, row | {"mean": difference, "n": len(together)}]


def middle(values: list[float]) -> dict[str, Any]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def profile(run: Run, name: str, images: int) -> dict[str, Any]:
    """Where the time of one more pass goes, its velocity calls and network evaluations, and its peak GPU memory."""
    cuda = run.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with watched(run) as found:
        started = now(run)
        WAYS[name](run, images)
        total = now(run) - started
    row = {f"seconds_{part}": found[part] for part in ("velocity", "decode", "reward")}
    row |= {"seconds_rest": total - sum(row.values()), "calls": int(found["calls"]), "nfe": int(found["nfe"])}
    return row | ({"peak_mb": torch.cuda.max_memory_allocated() / 2**20} if cuda else {})


def run_benchmark(random: str | None, sizes: list[int], rounds: int, overrides: list[str]) -> None:
    """Measure a model and write its result file."""
    model = random or "playground"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if random and device.type != "cuda":
        raise UserError(f"--random {random}: needs a GPU, there is none; leave it out to measure the playground model")
    with tempfile.TemporaryDirectory() as scratch:
        fixed = [f"output_dir={scratch}", "trackers=[]", "eval.prompts=1", "train.prompts_per_iteration=1"]
        config = load_config(ROOT / CONFIGS[model], [*fixed, *overrides])
        run = start(config, Console(quiet=True), random_model(random, config, device) if random else None)
        rows = []
        for images in sizes:
            rows += measure(run, model, images, rounds)
            print(table(rows[-len(WAYS) - len(PAIRS) - 1 :]), flush=True)
    machine = environment(run.accelerator)
    result = {
        "command": f"python benchmarks/completions.py run{f' --random {random}' if random else ''}",
        "config": dataclasses.asdict(config) | {"output_dir": "outputs"},
        "seeds": [config.train.seed],
        "machine": machine,
        "versions": machine["versions"],
        "rows": rows,
    }
    write_json(results(model), result)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each way and number of images, where its time goes, and how it compares."""
    lines = [
        "| images | rollout | seconds | velocity / decode / reward / rest | velocity calls | evaluations an image | times plain |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = {(r["images"], r["method"]): r for r in rows if r["metric"] == "ratio"}
    for r in (r for r in rows if r["metric"] == "seconds"):
        split = " / ".join(f"{r[f'seconds_{part}']:.2f}" for part in ("velocity", "decode", "reward", "rest"))
        times = ratios.get((r["images"], f"{r['method']} / plain"))
        memory = f", {r['peak_mb'] / 1024:.1f} GiB" if "peak_mb" in r else ""
        lines.append(
            f"| {r['images']} | {r['method']}{memory} | {r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}] | {split} "
            f"| {r['calls']} | {r['nfe'] / r['images']:g} | {_ratio(times)} |"
        )
    faster = [f"{n}: {_ratio(r)}" for (n, name), r in ratios.items() if name == "naive / wavefront"]
    lines.append(f"\nNaive takes so many times as long as the wavefront, by number of images: {'; '.join(faster)}.")
    worst = max(r["mean"] for r in rows if r["metric"] == "relative difference")
    lines.append(f"Both compute the same latents: relative difference at most {worst:.1e} (root mean square).")
    return "\n".join(lines)


def _ratio(row: dict[str, Any] | None) -> str:
    return f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row else ""


def show() -> None:
    """Put the tables of all result files into the page."""
    parts = []
    for model, config in CONFIGS.items():
        path = results(model)
        if path.is_file():
            found = json.loads(path.read_text())
            machine = found["machine"]
            where = ", ".join(machine["gpus"]) or f"CPU, threads: {machine['threads']}"
            rounds = next(r["n"] for r in found["rows"] if r["metric"] == "seconds")
            text = f"`{config}`, {found['config']['model']['precision']}, {where}; median [range] of {rounds} rounds, "
            text += "in which the three ways take turns; the split is of one more pass."
            parts.append(
                f"{text}\n\n{table(found['rows'])}\n\nFrom `{path.relative_to(ROOT)}`, by `{found['command']}`."
            )
        else:
            option = "" if model == "playground" else f" --random {model}"
            parts.append(f"`{config}`: not measured; `python benchmarks/completions.py run{option}`.")
    place(PAGE, "\n\n".join(parts), "completions")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument("--random", choices=[m for m in CONFIGS if m != "playground"])
    parser.add_argument("--images", nargs="+", type=int, help="default: 4 8 16 of the playground model, else 8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", help="settings that win over the configuration")
    arguments = parser.parse_args()
    if arguments.action == "show":
        show()
        return
    sizes = arguments.images or ([8] if arguments.random else [4, 8, 16])
    try:
        run_benchmark(arguments.random, sizes, arguments.rounds, arguments.overrides)
    except UserError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
