"""What the condition-consistency loop counts and reports."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from align.credit_stats import mean_rank_correlation
from align.run import Run

Sums = dict[str, float]
PER_SAMPLE = ("consistency", "uncertainty", "weight")
"""Known of each sample whose one-step image was judged: its loss, its mean disagreement, its mean weight."""


def iteration_metrics(run: Run, tables: dict[str, Tensor], sums: Sums, norms: list[float]) -> dict[str, float]:
    """Metrics of the iteration under the fixed names, over all processes; moves the counters on.

    tables: PER_SAMPLE of all samples (N,), NaN where there is none.
    """
    keys = ["nfe", "samples", "loss", "diffusion", "saturated", "judged"]
    table = torch.tensor([sums[k] for k in keys], dtype=torch.float64, device=run.accelerator.device)
    totals = dict(zip(keys, run.accelerator.reduce(table, reduction="sum").tolist(), strict=True))
    run.counters.nfe += round(totals["nfe"])
    run.counters.seconds += sums["time/train"]
    finite = [n for n in norms if math.isfinite(n)]
    metrics = {
        "train/loss": totals["loss"] / totals["samples"],
        "train/diffusion_loss": totals["diffusion"] / totals["samples"],
        "train/grad_norm": sum(finite) / len(finite) if finite else float("nan"),
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/skipped_updates": run.counters.skipped_updates,
        "seconds": run.counters.seconds,
        "nfe": run.counters.nfe,
        "time/train": sums["time/train"],
    }
    if run.condition is None:
        return metrics
    judged = ~tables["consistency"].isnan()
    metrics["train/active_fraction"] = float(judged.double().mean())
    if not bool(judged.any()):
        return metrics
    losses = tables["consistency"][judged].double()
    metrics |= {
        "reward/mean": -float(losses.mean()),
        "reward/std": float(losses.std(correction=0)),
        "train/saturated_fraction": totals["saturated"] / totals["judged"],
    }
    known = ~tables["uncertainty"].isnan()
    if bool(known.any()):
        metrics["train/disagreement"] = float(tables["uncertainty"][known].double().mean())
        metrics["train/trust"] = float(tables["weight"][known].double().mean())
        doubt, error = (tables[name][known].double() for name in ("uncertainty", "consistency"))
        correlation = mean_rank_correlation(doubt, error, torch.zeros(len(doubt), dtype=torch.int64))
        if correlation is not None:
            metrics["train/disagreement_corr"] = correlation
    return metrics
