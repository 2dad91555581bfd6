"""`align bench`: seconds per stage, peak memory and FLOP utilisation of full iterations, on any device."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from align.backprop_loop import gradient_velocity
from align.config import Config
from align.geometry import trained_steps
from align.loops import iteration_of
from align.models import random_weights
from align.models.base import ImageModel
from align.prompts import load_prompts
from align.run import Run, environment, start, used_prompts
from align.tracking import write_json


def random_model(size: str, config: Config, device: torch.device) -> ImageModel:
    """The model of `align.models.random_weights.SIZES` with random embeddings of every prompt that `config` uses."""
    texts = used_prompts(config, load_prompts(config.prompts.train))
    evals = load_prompts(config.prompts.eval)[: config.eval.prompts]
    return random_weights.random_model(size, config.model, device, [*texts, *(p.text for p in evals)])


def run_bench(config: Config, iterations: int, size: str | None, out: Path, console: Console) -> dict[str, Any]:
    """Time `iterations` after one warm-up that counts FLOPs; writes the result file and returns its row."""
    with tempfile.TemporaryDirectory() as scratch:
        sampler = dataclasses.replace(config.sampler, psi=None)  # the noise levels do not change the time of a step
        config = dataclasses.replace(config, output_dir=scratch, trackers=[], sampler=sampler)
        config.train.iterations = iterations + 1
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = start(config, console, random_model(size, config, device) if size else None)
        if run.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        counter = FlopCounterMode(display=False)
        with console.status("warm-up, counting FLOPs"), counter:
            iteration_of(config)(run, lambda *_: None)
        flops = float(counter.get_total_flops())
        rows = []
        for i in range(iterations):
            with console.status(f"timed iteration {i + 1}/{iterations}"):
                rows.append(iteration_of(config)(run, lambda *_: None))
        peak = _peak_megabytes(run.model.device)
        row = _row(run, rows, flops, _recomputed(run, rows), peak, size)
    result = {
        "command": f"align bench {' '.join(sys.argv[2:])}",
        "config": dataclasses.asdict(config),
        "seeds": [config.train.seed],
        "machine": environment(run.accelerator),
        "versions": environment(run.accelerator)["versions"],
        "rows": [row],
    }
    write_json(out, result)
    table = Table(title=f"median of {iterations} iterations", title_justify="left", show_header=False)
    for key, value in row.items():
        table.add_row(key, f"{value:,.3f}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print(f"written to {out}", highlight=False)
    return row


def _recomputed(run: Run, rows: list[dict[str, float]]) -> float:
    """FLOPs of an iteration that only repeat a forward pass of the network; not counted as the model's.

    With gradient checkpointing, and in reward_gradient, whose adjoint runs every active step again.
    """
    config, times = run.config, int(run.config.model.gradient_checkpointing)
    backwards = config.objective.type == "reward_gradient"
    if not times + backwards:
        return 0.0
    velocity = gradient_velocity(run.model, config.backprop.guidance_gradient) if backwards else run.model.velocity
    x = torch.zeros(1, *run.model.latent_shape, device=run.model.device)
    cond = run.model.conditioning(used_prompts(run.config, run.train_prompts)[:1])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        velocity(x, torch.ones(1, device=x.device), cond)
    if backwards:
        active = statistics.median(r.get("train/active_steps", 0.0) for r in rows) * (1 + config.backprop.lv_draws)
        return float(counter.get_total_flops()) * run.shape.local_samples * active * (times + 1)
    trained = run.shape.local_samples * statistics.median(r.get("select/kept_fraction", 1.0) for r in rows)
    columns = trained_steps(len(config.sampler.make_plan(0, 0).stochastic), config.train.step_fraction)
    columns = run.shape.pairs_per_sample if config.objective.type == "forward_process" else columns
    return float(counter.get_total_flops()) * trained * columns * config.train.inner_epochs


def _row(
    run: Run, rows: list[dict[str, float]], flops: float, recomputed: float, peak: float, size: str | None
) -> dict[str, Any]:
    stages = {k: statistics.median(r[k] for r in rows) for k in ("time/sample", "time/score", "time/train")}
    seconds = sum(stages.values())
    rate = matmul_rate(run.model.device, run.model.dtype)
    before = rows[0]["nfe"] / (run.counters.iteration - len(rows) + 1)
    return {
        "method": run.config.objective.type,
        "model": size or run.config.model.path,
        "resolution": run.config.model.resolution or run.model.native_resolution,
        "precision": run.config.model.precision,
        "attention": run.model.attention_backend,
        "gradient_checkpointing": run.config.model.gradient_checkpointing,
        "images": run.shape.samples,
        "micro_batch": run.shape.micro_batch,
        "rollout_batch": run.config.train.rollout_batch,
        **{k.replace("time/", "seconds_"): v for k, v in stages.items()},
        "seconds": seconds,
        "nfe": int(before),
        "tflop": flops / 1e12,
        "matmul_tflops": rate / 1e12,
        "model_flop_utilisation": (flops - recomputed) / seconds / rate,
        "hardware_flop_utilisation": flops / seconds / rate,
        "peak_mb": peak,
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on this device: the rate that utilisation is measured against."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(times[3:])


def _peak_megabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
