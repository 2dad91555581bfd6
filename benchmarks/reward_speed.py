"""How fast rewards judge, and what judging while sampling goes on saves.

    python benchmarks/reward_speed.py models                       # each at its published size with random weights, in turn
    python benchmarks/reward_speed.py models --device cuda --images 64
    python benchmarks/reward_speed.py overlap                      # train.async_scoring off and on in one playground run each
    python benchmarks/reward_speed.py show                         # tables from the result file

`models` measures each reward in a process of its own: images per second of `checked_score`, prompts embedded before where a
reward keeps them, the share of the preprocessing in it, and the peak of the memory while it scores. `overlap` runs two runs
of the same seed by turns, iteration by iteration, one of which judges in the background; their scores must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from curves import ROOT, Rows, load, place
from reward_weights import MODELS
from rich.console import Console
from torch import Tensor
from torch.nn.functional import interpolate

import rewards.aesthetic
import rewards.clip
import rewards.imagereward
from align.config import load_config
from align.policy_loop import run_iteration
from align.run import Run, environment, start
from align.tracking import write_json
from rewards import RewardBatch, build_reward, checked_score
from rewards.base import networks

RESULTS = ROOT / "benchmarks" / "results" / "rewards.json"
PAGE = ROOT / "docs" / "rewards.md"
CONFIG = "configs/bench/playground.yaml"
ROLLOUT = 16
WAYS = {"afterwards": False, "meanwhile": True}
# reward -> seconds an image of the service, None for the verifier in the run's own process
JUDGES: dict[str, float | None] = {"service, 10 ms an image": 0.01, "service, 20 ms an image": 0.02, "verifier": None}
NOT_MEASURED = "`ocr`, `judge` and `geneval` need a program, a service or a trained detector: not measured."


def empty() -> dict[str, Any]:
    """A result file without a row."""
    machine = environment()
    config = {"models": "reward_weights.py", "overlap": [CONFIG, f"train.rollout_batch={ROLLOUT}"]}
    command = "python benchmarks/reward_speed.py models; python benchmarks/reward_speed.py overlap"
    return {
        "command": command,
        "config": config,
        "seeds": [0],
        "machine": machine,
        "versions": machine["versions"],
        "rows": [],
    }


def middle(values: list[float]) -> dict[str, Any]:
    """Median and range."""
    return {"mean": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def measure(name: str, device: torch.device, count: int, rounds: int) -> Rows:
    """Rows of one reward in this process."""
    build, pixels = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        reward = build_reward(name, build(Path(folder)))
        reward.setup(device, torch.float32)
    batch = examples(count, pixels, device)
    checked_score(reward, batch)  # warm-up; embeds the prompts
    forget_peak(device)
    speeds = []
    for _ in range(rounds):
        started = now(device)
        checked_score(reward, batch)
        speeds.append(count / (now(device) - started))
    peak = peak_mb(device)
    with preprocessing(device) as spent:
        started = now(device)
        checked_score(reward, batch)
        share = sum(spent) / (now(device) - started)
    return [
        {
            "method": name,
            "metric": "images per second",
            **middle(speeds),
            "preprocessing": share,
            "images": count,
            "pixels": pixels,
            "parameters": sum(p.numel() for module in networks(reward) for p in module.parameters()),
            "peak_mb": peak,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
        }
    ]


def examples(count: int, pixels: int, device: torch.device) -> RewardBatch:
    """Smooth random images, a prompt for each that every reward here can judge."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = interpolate(noise, size=(pixels, pixels), mode="bilinear").to(device)
    prompts = [f"{number} red {shape}s" for number in ("two", "three") for shape in ("circle", "square")]
    texts = [prompts[i % len(prompts)] for i in range(count)]
    return RewardBatch(images, texts, [{} for _ in texts], torch.arange(count))


@contextlib.contextmanager
def preprocessing(device: torch.device) -> Iterator[list[float]]:
    """Inside, seconds of every call of the common preprocessing are noted. On a GPU this waits, so it is a pass of its own."""
    spent: list[float] = []
    places: list[Any] = [rewards.clip, rewards.aesthetic, rewards.imagereward]
    original: Callable[..., Tensor] = rewards.clip.preprocess

    def timed(*arguments: Any, **options: Any) -> Tensor:
        started = now(device)
        found = original(*arguments, **options)
        spent.append(now(device) - started)
        return found

    for module in places:
        module.preprocess = timed
    try:
        yield spent
    finally:
        for module in places:
            module.preprocess = original


def now(device: torch.device) -> float:
    """Seconds, after the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """Let the peak of the memory begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float | None:
    """MiB: of the allocator on a GPU, of the process on Linux, elsewhere unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform != "linux":
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else None


def overlap(judge: str, rounds: int, overrides: list[str]) -> Rows:
    """Rows of one reward: seconds of sampling and scoring, and of whole iterations, with both ways by turns."""
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        reward: dict[str, Any] = {"type": "verifier"}
        if JUDGES[judge] is not None:
            reward = {"type": "remote", "args": {"url": stack.enter_context(served(float(JUDGES[judge] or 0)))}}
        runs = {way: begin(way, scratch, reward, overrides) for way in WAYS}
        for i in range(rounds + 1):
            found = {}
            for way in list(WAYS)[:: 1 if i % 2 else -1]:
                found[way] = run_iteration(runs[way], lambda *_: None)
                if i:  # the first is a warm-up
                    seconds[way].append({k: v for k, v in found[way].items() if k.startswith("time/")})
            scores = [{k: v for k, v in row.items() if k.startswith("reward/")} for row in found.values()]
            assert scores[0] == scores[1], scores
        weights = [[p.detach() for p in run.parameters] for run in runs.values()]
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return overlap_rows(judge, seconds, runs["meanwhile"])


def begin(way: str, scratch: str, reward: dict[str, Any], overrides: list[str]) -> Run:
    """A run of the benchmark's configuration before its first iteration."""
    settings = [f"output_dir={scratch}", f"name={way}", "trackers=[]", f"train.rollout_batch={ROLLOUT}"]
    settings += [f"train.async_scoring={str(WAYS[way]).lower()}", "rewards={verifier: " + json.dumps(reward) + "}"]
    return start(load_config(ROOT / CONFIG, [*settings, *overrides]), Console(quiet=True))


@contextlib.contextmanager
def served(seconds: float) -> Iterator[str]:
    """Address of a service in a process of its own that takes `seconds` an image."""
    judge = ROOT / "benchmarks" / "slow_judge.py"
    command = [sys.executable, "-m", "align.cli", "serve-reward", f"{judge}:judge", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--arg", f"seconds={seconds}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        address = re.search(r"on (http://\S+)", line)
        assert address, line
        yield address[1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def overlap_rows(judge: str, seconds: dict[str, list[dict[str, float]]], run: Run) -> Rows:
    """Medians of both ways, and of their ratios round by round."""
    about = {"reward": judge, "images": run.shape.samples, "threads": torch.get_num_threads()}
    about |= {"device": torch.cuda.get_device_name() if run.model.device.type == "cuda" else "CPU"}
    rows: Rows = []
    for metric, stages in (
        ("sample and score", ("time/sample", "time/score")),
        ("iteration", ("time/sample", "time/score", "time/train")),
    ):
        totals = {way: [sum(row[s] for s in stages) for row in rounds] for way, rounds in seconds.items()}
        rows += [{"method": way, "metric": metric, **middle(values), **about} for way, values in totals.items()]
        ratios = [a / b for a, b in zip(totals["afterwards"], totals["meanwhile"], strict=True)]
        rows.append({"method": "afterwards / meanwhile", "metric": metric, **middle(ratios), **about})
    return rows


def model_table(rows: Rows) -> str:
    """Markdown of the rewards."""
    lines = [
        "| reward | parameters | images a call | pixels | images per second | preprocessing | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        size = f"{r['parameters'] / 1e6:,.0f} M" if r["parameters"] > 5e5 else f"{r['parameters'] / 1e6:.1f} M"
        size = size if r["parameters"] else "none"
        share = f"{r['preprocessing']:.0%}" if r["preprocessing"] else "none"
        memory = "" if r["peak_mb"] is None else f"{r['peak_mb'] / 1024:.1f} GiB"
        lines.append(
            f"| `{r['method'].replace(' ', '` ')}{'' if ' ' in r['method'] else '`'} | {size} | {r['images']} | {r['pixels']} "
            f"| {figure(r['mean'])} [{figure(r['low'])}, {figure(r['high'])}] | {share} | {memory} |"
        )
    return "\n".join(lines)


def figure(value: float) -> str:
    """Three digits, all of them where there are more before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def overlap_table(rows: Rows) -> str:
    """Markdown of judging meanwhile against afterwards."""
    lines = [
        "| reward | | afterwards, s | meanwhile, s | afterwards / meanwhile |",
        "|---|---|---|---|---|",
    ]
    for reward in dict.fromkeys(r["reward"] for r in rows):
        for metric in dict.fromkeys(r["metric"] for r in rows):
            found = {r["method"]: r for r in rows if (r["reward"], r["metric"]) == (reward, metric)}
            cells = [f"{r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in found.values()]
            lines.append(f"| {reward} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show() -> None:
    """Put the tables into the page."""
    rows = load(RESULTS, empty)["rows"]
    for mark, make, metrics in (
        ("speed", model_table, ("images per second",)),
        ("overlap", overlap_table, ("sample and score", "iteration")),
    ):
        parts = []
        chosen = [r for r in rows if r["metric"] in metrics]
        for where in dict.fromkeys((r["device"], r["threads"]) for r in chosen):
            mine = [r for r in chosen if (r["device"], r["threads"]) == where]
            text = f"{where[0]}, threads: {where[1]}; median [range] of {mine[0]['n']} rounds."
            if mark == "overlap":
                text += f" {mine[0]['images']} images an iteration, sampled {ROLLOUT} at a time; `{CONFIG}`."
            parts.append(f"{text}\n\n{make(mine)}")
        command = f"`python benchmarks/reward_speed.py {'models' if mark == 'speed' else 'overlap'}`"
        source = f"From `{RESULTS.relative_to(ROOT)}`, by {command}." if chosen else f"Not measured; {command}."
        parts.append(f"{NOT_MEASURED} {source}" if mark == "speed" and chosen else source)
        place(PAGE, "\n\n".join(parts), mark)


def models(names: list[str], device: str, images: int, rounds: int, threads: int) -> None:
    """Measure rewards, each in a process of its own; their rows take the place of older ones."""
    if len(names) > 1:
        options = ["--device", device, "--images", str(images), "--rounds", str(rounds), "--threads", str(threads)]
        for name in names:
            subprocess.run([sys.executable, __file__, "models", *options, "--only", name], cwd=ROOT, check=True)
        return
    add(measure(names[0], torch.device(device), images, rounds), ("method", "device", "threads"))


def add(rows: Rows, keys: tuple[str, ...]) -> None:
    """Put rows into the result file, in the place of those that agree with one of them in `keys`."""
    print(json.dumps(rows, indent=1), flush=True)
    result = load(RESULTS, empty)
    new = {tuple(row.get(key) for key in keys) for row in rows}
    result["rows"] = [row for row in result["rows"] if tuple(row.get(key) for key in keys) not in new] + rows
    write_json(RESULTS, result)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["models", "overlap", "show"])
    parser.add_argument("--only", nargs="+", help="default: all rewards of the action")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of models")
    parser.add_argument("--images", type=int, default=4, help="images a call of models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for each network call")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings of overlap that win over the configuration"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.action == "show":
        show()
    elif arguments.action == "models":
        options = (arguments.device, arguments.images, arguments.rounds, arguments.threads)
        models(arguments.only or list(MODELS), *options)
    else:
        for judge in arguments.only or list(JUDGES):
            add(
                overlap(judge, arguments.rounds, arguments.overrides),
                ("reward", "metric", "method", "device", "threads"),
            )


if __name__ == "__main__":
    main()
