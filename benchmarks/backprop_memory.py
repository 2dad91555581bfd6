"""Peak memory of one reward-gradient update against K, the number of differentiated steps, each in a process of its own.

    python benchmarks/backprop_memory.py run --block-checkpointing    # the playground model, fp32; minutes on one core
    python benchmarks/backprop_memory.py run --random sd15            # its size with random weights, 512 px; needs a GPU
    python benchmarks/backprop_memory.py run --random sd15 --largest  # its largest batch within 24 GiB of a GPU
    python benchmarks/backprop_memory.py show                         # tables and figure from the result files

`adjoint` is the trainer's own engine: `run_chain`, `image_gradient`, `backward_chain`, the whole batch in each call;
`adjoint_cut` is the same with loss.image_batch and train.micro_batch 1. `checkpoint` puts the last K steps, the decoder and
the reward into one graph, with torch.utils.checkpoint around each step; `graph` is that graph without it. All run the first
T - K steps without gradient, and the run fails unless they give the same adapter gradient.

Memory is what torch has allocated since the update began, so weights are not in it: on a GPU the allocator's own peak, on a
CPU the total that the profiler records at every allocation, temporaries inside operators included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backprop_memory_page import PHASES, results, show
from curves import ROOT, Rows, load
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from align.backprop_loop import gradient_velocity
from align.bench import random_model
from align.collect import initial_states, passes
from align.config import load_config
from align.errors import UserError
from align.models.base import Conditioning
from align.prompts import prompt_indices
from align.reward_loss import image_gradient, reward_loss
from align.run import Run, environment, start
from align.step import now
from align.tracking import write_json
from rewards.base import RewardBatch, RewardError, checked_score
from samplers.differentiable import Steps, backward_chain, run_chain
from samplers.gradient_plan import draw_plan
from samplers.kernels import KERNELS

STRATEGIES = ("adjoint", "adjoint_cut", "checkpoint", "graph")
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05}
"""Largest relative difference of adapter gradients, by precision of the network."""

_ANY = ["train.iterations=1", "train.group_size=1", "eval.prompts=1", "trackers=[]", "sampler.num_steps=10"]
# the size of the network that HPSv2 and PickScore are
_VIT_H = (
    "{embed_dim: 1024, vision_cfg: {image_size: 224, layers: 32, width: 1280, head_width: 80, patch_size: 14}, "
    "text_cfg: {context_length: 77, vocab_size: 49408, width: 1024, heads: 16, layers: 24}}"
)
_RANDOM = [
    "prompts.train=playground:train", "prompts.eval=playground:heldout_test",
    "rewards.clip.type=clip", "rewards.clip.args.pretrained=random", f"rewards.clip.args.config={_VIT_H}",
]  # fmt: skip
MODELS: dict[str, tuple[str, list[str]]] = {
    "playground": ("configs/playground/draft_k.yaml", [*_ANY, "model.precision=fp32"]),
    "sd15": ("configs/methods/draft_k.yaml", [*_ANY, *_RANDOM, "preset=[sd15]"]),
    "sd35-medium": ("configs/methods/draft_k.yaml", [*_ANY, *_RANDOM, "preset=[sd35_medium]"]),
}
"""Configuration of each model, and what is changed in it."""

Gradient = dict[int, "np.ndarray[Any, Any]"]
"""Number of an adapter's tensor -> its gradient."""
Phase = Callable[[str], AbstractContextManager[Any]]


# -- one update ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one process measures."""

    strategy: str
    k: int
    batch: int
    block_checkpointing: bool


def begin(run: Run, batch: int) -> tuple[Tensor, Conditioning, list[Any]]:
    """Initial states (batch, C, h, w), embeddings and prompts; prompts repeat where the run has fewer."""
    order = prompt_indices(len(run.train_prompts), run.config.train.prompts_per_iteration, 0, run.config.train.seed)
    prompts = [run.train_prompts[order[i % len(order)]] for i in range(batch)]
    x = initial_states(run, list(range(batch)), 0, run.config.train.seed)
    return x, run.model.conditioning([p.text for p in prompts]), prompts


def adjoint(run: Run, k: int, batch: int, phase: Phase, together: int | None = None) -> None:
    """The trainer's engine. together: images in one differentiated call of network, decoder and reward, all if None."""
    size = together or batch
    config = run.config
    with phase("sample"):
        x, cond, prompts = begin(run, batch)
        last_k = dataclasses.replace(config.backprop, k=k)
        plan = draw_plan(last_k, run.grid, list(range(batch)), config.train.seed, 0)
        steps = Steps(run.grid, "ode", frozenset(), run.noise_levels)
        chain = run_chain(run.model.velocity, x, cond, steps, plan, torch.zeros)  # an ODE asks for no noise
    with phase("image"):
        rewards = {name: run.rewards[name] for name, entry in config.rewards.items() if entry.weight}
        loss = dataclasses.replace(config.loss, image_batch=size)
        ids = list(range(batch))
        image = image_gradient(run.model, rewards, config.rewards, chain.final, prompts, ids, 0, loss)
    with phase("backward"):
        velocity = gradient_velocity(run.model, config.backprop.guidance_gradient)
        lam, slope = image.gradient / batch, run.model.held_slope
        backward_chain(velocity, chain, cond, steps, plan, lam, jacobian=True, slope=slope, micro_batch=size)


def one_graph(run: Run, k: int, batch: int, phase: Phase, checkpointed: bool) -> None:
    """Plain autograd from the loss through the last k steps."""
    with phase("sample"):
        x, cond, prompts = begin(run, batch)

        def step(x: Tensor, i: int) -> Tensor:
            t, t_next = run.grid[i].expand(batch), run.grid[i + 1].expand(batch)
            return KERNELS["ode"](x, run.model.velocity(x, t, cond), t, t_next, 0.0).mean

        first = len(run.grid) - 1 - k
        with torch.no_grad():
            for i in range(first):
                x = step(x, i)
        for i in range(first, first + k):
            x = checkpoint(step, x, i, use_reentrant=False) if checkpointed else step(x, i)
    with phase("image"):
        loss = _loss(run, x, prompts)
    with phase("backward"):
        loss.backward()


UPDATES: dict[str, Callable[[Run, int, int, Phase], None]] = {
    "adjoint": adjoint,
    "adjoint_cut": functools.partial(adjoint, together=1),
    "checkpoint": functools.partial(one_graph, checkpointed=True),
    "graph": functools.partial(one_graph, checkpointed=False),
}


def _loss(run: Run, x: Tensor, prompts: list[Any]) -> Tensor:
    """Mean loss of final states (B, C, h, w), as `image_gradient` has it."""
    config = run.config.loss
    images, _ = run.model.decode_with_gradient(x, config.clamp)
    batch = RewardBatch(images, [p.text for p in prompts], [p.metadata for p in prompts], torch.arange(len(prompts)))
    losses = torch.zeros(len(prompts), device=images.device)
    for name, entry in run.config.rewards.items():
        if entry.weight:
            scores = checked_score(run.rewards[name], batch).scores
            losses = losses + config.scale * entry.weight * reward_loss(scores, config.kind, config.value_of(name))
    return losses.mean()


# -- what it allocates -----------------------------------------------------------------------------------------------


def peaks(device: torch.device, update: Callable[[Phase], None]) -> dict[str, int]:
    """Peak bytes above the beginning, of the update (`whole`) and in each of its phases."""
    found = _cuda_peaks(update) if device.type == "cuda" else _cpu_peaks(update)
    return {"whole": max(found.values()), **found}


def _cuda_peaks(update: Callable[[Phase], None]) -> dict[str, int]:
    before, found = torch.cuda.memory_allocated(), {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats()
        yield
        found[name] = torch.cuda.max_memory_allocated() - before

    update(phase)
    return found


def _cpu_peaks(update: Callable[[Phase], None]) -> dict[str, int]:
    """Call it once a process: the profiler's total goes on from what an earlier one left."""
    with tempfile.TemporaryDirectory() as scratch:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            update(record_function)
        trace = Path(scratch) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    phases = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
    totals = [(e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"]
    return {
        name: max(total for ts, total in totals if first <= ts <= last)
        for name, (first, last) in phases.items()
        if name in PHASES
    }


# -- one process -----------------------------------------------------------------------------------------------------


def build(model: str, setting: Setting, overrides: Sequence[str], scratch: Path) -> Run:
    """The run whose update is measured; its adapter is not zero, so that no gradient is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(ROOT / MODELS[model][0], _settings(model, setting, overrides, scratch))
    run = start(config, Console(quiet=True), None if model == "playground" else random_model(model, config, device))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return run


def _settings(model: str, setting: Setting, overrides: Sequence[str], scratch: Path) -> list[str]:
    fixed = [f"model.gradient_checkpointing={str(setting.block_checkpointing).lower()}", f"output_dir={scratch}"]
    return [*MODELS[model][1], f"train.prompts_per_iteration={setting.batch}", *fixed, *overrides]


def measure(model: str, setting: Setting, overrides: Sequence[str]) -> tuple[dict[str, Any], Gradient]:
    """The row of one setting, and the adapter's gradient; it is empty where memory did not suffice."""
    with tempfile.TemporaryDirectory() as scratch:
        run = build(model, setting, overrides, Path(scratch))
    x = begin(run, 1)[0]
    steps = len(run.grid) - 1
    cost = passes(run.config.sampler.guidance_scale)
    backward = 2 + (setting.strategy != "graph") + setting.block_checkpointing  # a forward is 1, a backward 2
    row: dict[str, Any] = {
        "kind": "update",
        "method": setting.strategy,
        "model": model,
        "k": setting.k,
        "batch": setting.batch,
        "block_checkpointing": setting.block_checkpointing,
        "metric": "peak_mb",
        "mean": None,
        "n": 1,
        "latents_bytes": x.numel() * 4 * setting.batch,
        "nfe": cost * (steps + setting.k * backward),
        "machine": environment(run.accelerator),
        "config": dataclasses.asdict(run.config) | {"output_dir": "outputs"},
    }
    del x
    rss = _rss()

    def update(phase: Phase) -> None:
        run.optimizer.zero_grad(set_to_none=True)
        UPDATES[setting.strategy](run, setting.k, setting.batch, phase)

    try:
        update(contextlib.nullcontext)  # warm-up: caches of prompts, kernels of the GPU
        seconds = [_timed(run, update) for _ in range(3)]
        row |= {"rss_mb": _rss(), "rss_before_mb": rss, "seconds": statistics.median(seconds)}
        run.optimizer.zero_grad(set_to_none=True)
        found = peaks(run.model.device, update)
    except (torch.OutOfMemoryError, RewardError) as problem:
        _only_memory(problem)
        return row | {"out_of_memory": True}, {}
    row |= {"mean": found["whole"] / 2**20} | {f"{name}_bytes": value for name, value in found.items()}
    return row, {i: p.grad.cpu().numpy() for i, p in enumerate(run.parameters) if p.grad is not None}


def _only_memory(problem: Exception) -> None:
    """Raise it again unless memory ran out; in a reward that is the cause of a RewardError."""
    if not isinstance(problem.__cause__ or problem, torch.OutOfMemoryError):
        raise problem


def _timed(run: Run, update: Callable[[Phase], None]) -> float:
    """Seconds of an update; on a CPU those that this process was given, as others may share the machine."""
    clock = functools.partial(now, run) if run.model.device.type == "cuda" else time.process_time
    started = clock()
    update(contextlib.nullcontext)
    return clock() - started


def _rss() -> float:
    """Largest resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, by doubling and bisection; 0 if 1 does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_largest(model: str, setting: Setting, overrides: Sequence[str], limit: float) -> dict[str, Any]:
    """The row of the largest batch, of one call each for network, decoder and reward, within `limit` GiB, weights included."""
    if not torch.cuda.is_available():
        raise UserError("--largest: needs a GPU, whose allocator can be given a limit; there is none")
    total = torch.cuda.get_device_properties(0).total_memory
    if limit * 2**30 > total:
        raise UserError(f"--limit-gb: this GPU has {total / 2**30:.1f} GiB, less than {limit:g}")
    torch.cuda.set_per_process_memory_fraction(limit * 2**30 / total)
    with tempfile.TemporaryDirectory() as scratch:
        run = build(model, setting, overrides, Path(scratch))
    peak: dict[int, float] = {}

    def fits(batch: int) -> bool:
        run.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            UPDATES[setting.strategy](run, setting.k, batch, contextlib.nullcontext)
        except (torch.OutOfMemoryError, RewardError) as problem:
            _only_memory(problem)
            return False
        peak[batch] = torch.cuda.max_memory_allocated() / 2**20
        return True

    batch = largest_batch(fits)
    return {
        "kind": "largest",
        "method": setting.strategy,
        "model": model,
        "k": setting.k,
        "block_checkpointing": setting.block_checkpointing,
        "limit_gb": limit,
        "metric": "batch",
        "mean": batch,
        "n": 1,
        "peak_mb": peak.get(batch),
        "machine": environment(run.accelerator),
        "config": dataclasses.asdict(run.config) | {"output_dir": "outputs"},
    }


# -- all of them -----------------------------------------------------------------------------------------------------


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a fresh process, of which there is one at a time."""
    # a fork has done its imports, but cannot use a GPU
    context = get_context("spawn" if torch.cuda.is_available() else "fork")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def run_updates(arguments: argparse.Namespace) -> Rows:
    """Peak against K for every strategy; gradients of a K are compared with the plain graph's, or the first there is."""
    rows: Rows = []
    for blocks in [False, True] if arguments.block_checkpointing else [False]:
        for k in arguments.k:
            expected: Gradient = {}
            for strategy in sorted(arguments.strategies, reverse=True):  # the graph comes first
                setting = Setting(strategy, k, arguments.batch, blocks)
                row, gradient = in_process(measure, arguments.model, setting, arguments.overrides)
                expected = expected or gradient
                if gradient:
                    row["gradient_difference"] = difference(gradient, expected)
                    if row["gradient_difference"] > TOLERANCE[row["config"]["model"]["precision"]]:
                        raise UserError(f"{strategy}, K = {k}: another gradient, by {row['gradient_difference']:.1e}")
                rows.append(row)
                print(_progress(row), flush=True)
    return with_growth(rows)


def difference(gradient: Gradient, expected: Gradient) -> float:
    """Largest over the adapter's tensors of |g - expected| / |expected|, norms; tensors without gradient have none in both."""
    if gradient.keys() != expected.keys():
        raise UserError("two strategies have gradients of different parameters")
    norms = {i: float(np.linalg.norm(e)) for i, e in expected.items()}
    return max(float(np.linalg.norm(gradient[i] - e)) / (norms[i] or 1e-30) for i, e in expected.items())


def with_growth(rows: Rows) -> Rows:
    """Rows with their growth per step since the next smaller K: of the whole update, and of its last phase alone."""
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("method", "block_checkpointing"))]
        smaller = [r for r in same if r["k"] < row["k"] and r["mean"] is not None]
        if smaller and row["mean"] is not None:
            before = max(smaller, key=lambda r: int(r["k"]))
            for prefix, value in (("", "whole_bytes"), ("backward_", "backward_bytes")):
                row[f"{prefix}growth_per_step_bytes"] = (row[value] - before[value]) / (row["k"] - before["k"])
    return rows


def run_largest(arguments: argparse.Namespace) -> Rows:
    """Largest batches: the adjoint through the most steps, the plain graph through the last one."""
    rows: Rows = []
    for strategy, k in (("adjoint", max(arguments.k)), ("graph", 1)):
        for blocks in (False, True):
            setting = Setting(strategy, k, 1, blocks)
            row = in_process(measure_largest, arguments.model, setting, arguments.overrides, arguments.limit_gb)
            rows.append(row)
            print(f"{strategy}, K {k}, blocks {blocks}: batch {row['mean']}", flush=True)
    return rows


def _progress(row: dict[str, Any]) -> str:
    name = f"{row['method']}, K {row['k']}, blocks {row['block_checkpointing']}"
    if row["mean"] is None:
        return f"{name}: out of memory"
    split = ", ".join(f"{p} {row[f'{p}_bytes'] / 2**20:.2f}" for p in PHASES)
    return f"{name}: {row['mean']:.2f} MiB ({split}), {row['seconds']:.2f} s, gradient {row['gradient_difference']:.1e}"


def save(path: Path, rows: Rows) -> None:
    """Put rows in place of those of their kind; machine and configuration are the first row's."""
    machine = {k: v for k, v in rows[0]["machine"].items() if k != "command"}
    config = rows[0]["config"]
    old = load(path, lambda: {"command": "", "rows": []})
    kind = rows[0]["kind"]
    command = " ".join(["python benchmarks/backprop_memory.py", *sys.argv[1:]])
    others = [c for c in old["command"].split("; ") if c and ("--largest" in c) != (kind == "largest")]
    result = {"command": "; ".join([*others, command]), "config": config, "seeds": [config["train"]["seed"]]}
    bare = [{k: v for k, v in row.items() if k not in ("machine", "config")} for row in rows]
    kept = [r for r in old["rows"] if r["kind"] != kind]
    write_json(path, result | {"machine": machine, "versions": machine["versions"], "rows": kept + bare})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "show"])
    parser.add_argument("--random", choices=[m for m in MODELS if m != "playground"], dest="model")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--k", nargs="+", type=int, help="default: 1 2 4 8 10 of the playground model, else 1 2 4")
    parser.add_argument("--batch", type=int, help="default: 8 of the playground model, else 1")
    parser.add_argument("--block-checkpointing", action="store_true", help="measure with it too")
    parser.add_argument("--largest", action="store_true", help="the largest batch within --limit-gb instead")
    parser.add_argument("--limit-gb", type=float, default=24.0)
    parser.add_argument("--out", type=Path, help="result file, if not the model's own")
    parser.add_argument("overrides", nargs="*", help="settings that win over the configuration")
    arguments = parser.parse_intermixed_args()
    if arguments.action == "show":
        show(MODELS)
        return
    arguments.batch = arguments.batch or (1 if arguments.model else 8)
    arguments.k = arguments.k or ([1, 2, 4] if arguments.model else [1, 2, 4, 8, 10])
    arguments.model = arguments.model or "playground"
    torch.set_num_threads(1)
    try:
        rows = (run_largest if arguments.largest else run_updates)(arguments)
        save(arguments.out or results(arguments.model), rows)
    except UserError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
