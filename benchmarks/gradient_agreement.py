"""How much of a method's gradient is signal: the cosine between the gradients of two independent iterations at the base.

    python benchmarks/gradient_agreement.py      # about 20 s a variant on one core; appends to the result file

Nothing is trained. Zero means that 192 images say nothing in common about where to go; it explains which variants of
Flow-GRPO learn on the playground before any long run.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from align import policy_loop
from align.collect import collect, score_values
from align.config import load_config
from align.geometry import local_order
from align.run import Run, environment, start
from align.tracking import write_json
from align.updates import clipped_ratio_pairs, forward_process_pairs, micro_batches, training_times

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gradient_agreement.json"
ITERATIONS = 3
FULL = ["sampler.plan=full", "sampler.shared_noise=false"]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "nft": ("configs/demo.yaml", []),
    "flow_grpo, all 9 steps": ("configs/playground/flow_grpo.yaml", FULL),
    "flow_grpo, all 9 steps, shared noise": ("configs/playground/flow_grpo.yaml", FULL[:1]),
    "flow_grpo, first 5 steps": ("configs/playground/flow_grpo.yaml", FULL[1:]),
    "flow_grpo, first 5 steps, shared noise": ("configs/playground/flow_grpo.yaml", []),
}


def gradient(run: Run, iteration: int) -> torch.Tensor:
    """Flat gradient of one iteration's first update, at the present weights."""
    run.counters.iteration = iteration
    prompts = policy_loop._prompts(run, iteration)
    samples = [i for update in local_order(run.shape, 0, run.config.train.seed, iteration) for i in update]
    batch = collect(run, prompts, samples, iteration, run.config.train.seed, lambda *_: None)
    scores = score_values(run, prompts, batch, run.shape.samples, lambda *_: None)
    advantages = policy_loop._advantages(run, batch.plan, scores, {})
    assert advantages is not None
    forward_process = run.config.objective.type == "forward_process"
    times = training_times(run, batch) if forward_process else torch.zeros(len(samples), 0)
    columns = times.shape[1] if forward_process else len(batch.plan.stochastic)
    for parameter in run.parameters:
        parameter.grad = None
    for pairs in micro_batches(range(len(samples)), columns, run.shape.micro_batch):
        if forward_process:
            loss, _, _ = forward_process_pairs(run, batch, pairs, advantages[samples], times, lagging=False)
        else:
            loss, _, _ = clipped_ratio_pairs(run, batch, pairs, advantages[samples], lagging=False)
        (loss.sum() / (len(samples) * columns)).backward()
    return torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])


def main() -> None:
    """Measure the variants that the result file lacks."""
    result: dict[str, Any] = {
        "command": "python benchmarks/gradient_agreement.py",
        "config": {},
        "seeds": [0],
        "rows": [],
    }
    if RESULTS.is_file():
        result = json.loads(RESULTS.read_text())
    result["machine"] = environment()
    result["config"] = {name: [path, *overrides] for name, (path, overrides) in VARIANTS.items()}
    for name, (path, overrides) in VARIANTS.items():
        if any(row["method"] == name for row in result["rows"]):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            settings = [f"output_dir={scratch}", "eval.prompts=2", "trackers=[]", *overrides]
            run = start(load_config(ROOT / path, settings), Console(quiet=True))
            gradients = [gradient(run, i) for i in range(ITERATIONS)]
        cosines = [
            float(torch.cosine_similarity(gradients[i], gradients[j], dim=0))
            for i in range(ITERATIONS)
            for j in range(i)
        ]
        row = {"method": name, "metric": "cosine", "mean": sum(cosines) / len(cosines), "n": len(cosines)}
        result["rows"].append(row | {"values": cosines})
        write_json(RESULTS, result)
        print(name, f"{row['mean']:.3f}")


if __name__ == "__main__":
    main()
