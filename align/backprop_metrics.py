"""What the reward-gradient loop counts and reports."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align.collect import passes
from align.confidence import doubtful_metrics, ensemble_spread
from align.reward_loss import ImageGradient
from align.run import Run
from align.scoring import extra_means
from rewards.combine import combine
from samplers.differentiable import Backward, Chain
from samplers.gradient_plan import GradientPlan

Sums = dict[str, float]

_NAMES = {
    "loss": "train/loss",
    "saturated": "train/saturated_fraction",
    "adjoint": "train/adjoint_norm",
    "growth": "train/adjoint_growth",
    "penalty": "train/ref_mse",
    "pairs": "train/active_steps",
}


def add_up(
    run: Run, sums: Sums, chain: Chain, plan: GradientPlan, image: ImageGradient, back: Backward, samples: int
) -> None:
    """Take in `samples` images of this process, with their copies."""
    config, scale = run.config, run.config.sampler.guidance_scale
    differentiated = passes(scale) if config.backprop.guidance_gradient == "both" else 1
    cost = 3 + config.model.gradient_checkpointing + (config.backprop.velocity_penalty > 0)
    # the penalty's gradient must not run on to earlier steps, so that those that others precede go back twice
    again = back.links * (2 + config.model.gradient_checkpointing) if config.backprop.velocity_penalty > 0 else 0
    sums["rollout"] += chain.nfe * passes(scale)
    sums["nfe"] += chain.nfe * passes(scale) + (back.pairs * cost + again) * differentiated
    sums["samples"] += samples
    sums["images"] += len(plan)
    sums["loss"] += float(image.losses.double().sum())
    sums["saturated"] += float(image.saturated.double().sum())
    sums["adjoint"] += float(image.gradient.flatten(1).norm(dim=1).double().sum())
    sums["growth"] += float(back.growth.double().sum())
    sums["penalty"] += float(back.penalty.double().sum()) / value_scale(run) ** 2
    sums["pairs"] += back.pairs


def value_scale(run: Run) -> float:
    """Factor of the conditional prediction in what an active step differentiates; 1 where that is the velocity itself."""
    cut = run.config.backprop.guidance_gradient == "cond_only"
    return run.config.sampler.guidance_scale if cut else 1.0


def known_scores(run: Run, tables: dict[str, Tensor]) -> Tensor:
    """(N,) bool: samples that have a score of every trained reward."""
    return combine(tables, {k: ~v.isnan() for k, v in tables.items()}, _weights(run))[1]


def _weights(run: Run) -> dict[str, float]:
    return {name: reward.weight for name, reward in run.config.rewards.items()}


def iteration_metrics(
    run: Run, tables: dict[str, Tensor], extras: dict[str, Tensor], sums: Sums, norms: list[float]
) -> dict[str, float]:
    """Metrics of the iteration under the fixed names, over all processes; moves the counters on."""
    keys = ["nfe", "rollout", "samples", "images", *_NAMES]
    table = torch.tensor([sums[k] for k in keys], dtype=torch.float64, device=run.accelerator.device)
    totals = dict(zip(keys, run.accelerator.reduce(table, reduction="sum").tolist(), strict=True))
    run.counters.nfe += round(totals["nfe"])
    times = {stage: sums[stage] for stage in ("time/sample", "time/score", "time/train")}
    run.counters.seconds += sum(times.values())
    values, known = combine(tables, {k: ~v.isnan() for k, v in tables.items()}, _weights(run))
    present = values[known].double()
    metrics = {f"reward/{name}": float(v[~v.isnan()].double().mean()) for name, v in tables.items()}
    metrics |= {
        "reward/invalid_fraction": 1 - float(known.double().mean()),
        "sample/nfe_per_image": totals["rollout"] / totals["samples"],
        "seconds": run.counters.seconds,
        "nfe": run.counters.nfe,
    }
    metrics |= times | extra_means(extras, tables) | ensemble_spread(run, extras) | doubtful_metrics(run, extras)
    if not norms:
        return metrics
    finite = [n for n in norms if math.isfinite(n)]
    metrics |= {
        "reward/mean": float(present.mean()),
        "reward/std": float(present.std(correction=0)),
        "train/grad_norm": sum(finite) / len(finite) if finite else float("nan"),
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/skipped_updates": run.counters.skipped_updates,
    }
    metrics |= {name: totals[key] / totals["images"] for key, name in _NAMES.items()}
    if run.config.backprop.velocity_penalty == 0:
        del metrics["train/ref_mse"]
    if "drift" in sums:
        metrics["train/uncond_drift"] = sums["drift"]
    if run.counters.empty_updates:
        metrics["train/empty_updates"] = run.counters.empty_updates
    if metrics["train/saturated_fraction"] > 0.5:
        run.warn_once(
            "saturated",
            "over half of the pixel values are clamped and give no gradient: lower optim.lr or use early_stop",
        )
    return metrics
