"""The policy-gradient loop: rollout -> score -> credit -> advantages -> update."""

from __future__ import annotations

import math
import time
from collections import defaultdict

import torch
from torch import Tensor

from align import credit
from align.advantages import group_advantages
from align.collect import Batch, Report, collect, passes, score_values
from align.credit_stats import value_stats, zero_spread
from align.errors import UserError
from align.geometry import local_order
from align.prompts import Prompt, prompt_indices
from align.run import Run
from align.scoring import Scores
from align.updates import (
    Pairs,
    check_first_ratio,
    clipped_ratio_pairs,
    forward_process_pairs,
    micro_batches,
    training_times,
)
from rewards.combine import combine
from samplers.plans import Plan


class Interrupted(Exception):
    """Asked to stop (SIGTERM) before this iteration changed any weight."""


def run_iteration(run: Run, report: Report) -> dict[str, float]:
    """One round; returns its metrics. `report(stage, done, total)` is called as it goes.

    Raises: Interrupted before any weight changed; UserError for a broken reward or a diverged run.
    """
    started = _now(run)
    iteration = run.counters.iteration
    prompts = _prompts(run, iteration)
    order = local_order(run.shape, run.accelerator.process_index, run.config.train.seed, iteration)
    batch = collect(
        run,
        prompts,
        [i for update in order for i in update],
        iteration,
        run.config.train.seed,
        report,
        with_values=run.config.credit.needs_values,
    )
    sampled = _now(run)
    scores = score_values(run, prompts, batch, run.shape.samples, report)
    batch.completions.clear()  # they were there to be scored
    scored = _now(run)
    if run.stop_requested():
        raise Interrupted
    evaluations = run.total(batch.nfe)
    run.counters.nfe += evaluations
    metrics = {f"reward/{name}": scores.mean(name) for name in run.config.rewards}
    metrics["sample/nfe_per_image"] = evaluations / run.shape.samples
    advantages = _advantages(run, batch.plan, scores, metrics)
    if advantages is not None:
        metrics |= _update(run, batch, advantages[batch.samples], [len(u) for u in order], report)
    finished = _now(run)
    run.counters.iteration += 1
    run.counters.seconds += finished - started
    metrics |= {
        "seconds": run.counters.seconds,
        "nfe": run.counters.nfe,
        "time/sample": sampled - started,
        "time/score": scored - sampled,
        "time/train": finished - scored,
    }
    return metrics


def _now(run: Run) -> float:
    if run.model.device.type == "cuda":
        torch.cuda.synchronize()  # three times an iteration, so that each stage is charged with its own work
    return time.perf_counter()


def _prompts(run: Run, iteration: int) -> list[Prompt]:
    train = run.config.train
    picked = prompt_indices(len(run.train_prompts), train.prompts_per_iteration, iteration, train.seed)
    return [run.train_prompts[i] for i in picked]


def _advantages(run: Run, plan: Plan, scores: Scores, metrics: dict[str, float]) -> Tensor | None:
    """Advantages (N, S) of all samples, or None if too many scores are missing to learn from this iteration."""
    config = run.config
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    values, valid = combine(scores.values, scores.valid, weights)
    missing = 1 - float(valid.double().mean())
    metrics["reward/invalid_fraction"] = missing
    if missing > config.train.max_invalid_fraction:
        run.counters.invalid_iterations += 1
        run.warn_once("invalid", f"{missing:.0%} of the scores are missing; such iterations are skipped")
        if run.counters.invalid_iterations >= 3:
            raise UserError(f"three iterations in a row lacked over {config.train.max_invalid_fraction:.0%} of their scores")
        return None
    run.counters.invalid_iterations = 0
    final = values[:, -1][valid[:, -1]].double()
    metrics |= {"reward/mean": float(final.mean()), "reward/std": float(final.std(correction=0))}
    groups = torch.arange(run.shape.samples) // config.train.group_size
    step_rewards, credit_stats = credit.step_rewards(values, max(1, len(plan.stochastic)), config.credit, groups)
    everyone = torch.ones(run.shape.samples, dtype=torch.bool)  # a missing score is NaN in the step rewards that need it
    advantages, stats = group_advantages(step_rewards, everyone, groups, config.advantage)
    metrics["train/zero_spread_fraction"] = stats["zero_spread_fraction"]
    if config.credit.needs_values:
        metrics |= value_stats(values, plan.stochastic, groups) | zero_spread(step_rewards, plan.stochastic, groups)
        metrics |= credit_stats
    if stats["zero_spread_fraction"] > 0.8:
        run.warn_once(
            "spread",
            "over 80 % of the groups have equal rewards and teach nothing; use a finer reward or larger groups",
        )
    return advantages


def _update(run: Run, batch: Batch, advantages: Tensor, sizes: list[int], report: Report) -> dict[str, float]:
    """All optimiser steps of the iteration on this process's share. advantages: (n, S)."""
    forward_process = run.config.objective.type == "forward_process"
    times = training_times(run, batch) if forward_process else torch.zeros(len(batch.samples), 0)
    columns = times.shape[1] if forward_process else len(batch.plan.stochastic)
    if run.behaviour is not None:
        run.behaviour.update()
    sums: dict[str, float] = defaultdict(float)
    first, norms, guided = 0, [], passes(run.config.sampler.guidance_scale)
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        first += size
        lagging = (run.old or run.behaviour).lags() if (run.old or run.behaviour) else False  # type: ignore[union-attr]
        run.optimizer.zero_grad(set_to_none=True)
        done, total = 0, size * columns
        for pairs in micro_batches(rows, columns, run.shape.micro_batch):
            if forward_process:
                loss, info, forwards = forward_process_pairs(run, batch, pairs, advantages, times, lagging)
            else:
                loss, info, forwards = clipped_ratio_pairs(run, batch, pairs, advantages, lagging)
            run.accelerator.backward(loss.sum() / total)
            _add_up(sums, loss, info, pairs)
            done += len(pairs.rows)
            cost = forwards + 2 + run.config.model.gradient_checkpointing
            run.counters.nfe += len(pairs.rows) * cost * guided * run.shape.processes
            report("training", number * total + done, total * len(sizes))
        if run.counters.updates == 0 and not forward_process:
            check_first_ratio(run, sums["worst_ratio"])
        norms.append(_step(run))
    if run.old is not None:
        run.old.update()
    return _metrics(run, sums, norms)


def _add_up(sums: dict[str, float], loss: Tensor, info: dict[str, Tensor], pairs: Pairs) -> None:
    sums["pairs"] += len(pairs.rows)
    sums["loss"] += float(loss.detach().double().sum())
    for key, value in info.items():
        sums[key] += float(value.double().sum())
    if "ratio" in info:
        worst = float((info["ratio"] - 1).abs().max())
        sums["worst_ratio"] = worst if not worst <= sums["worst_ratio"] else sums["worst_ratio"]  # a NaN stays


def _step(run: Run) -> float:
    """Average gradients over processes, clip, step and advance the averages; a non-finite gradient is skipped and counted."""
    accelerator, counters = run.accelerator, run.counters
    present = [p for p in run.parameters if p.grad is not None]
    if accelerator.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in present])  # type: ignore[union-attr]
        flat = accelerator.reduce(flat, reduction="mean")
        for parameter, piece in zip(present, flat.split([p.numel() for p in present]), strict=True):
            parameter.grad = piece.view_as(parameter)
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate()
    norm = float(accelerator.clip_grad_norm_(present, run.config.optim.max_grad_norm))
    if math.isfinite(norm) or accelerator.scaler is not None:  # a scaler skips the step itself and lowers its scale
        run.optimizer.step()
    counters.updates += 1
    if not math.isfinite(norm):
        counters.skipped_updates += 1
        counters.consecutive_bad += 1
        run.warn_once("nonfinite", "a non-finite gradient was skipped; see train/skipped_updates")
        if counters.consecutive_bad >= 5:
            raise UserError(
                "five updates in a row had a non-finite gradient: lower optim.lr, or use model.precision=fp32"
            )
        return float("nan")
    counters.consecutive_bad = 0
    if run.average is not None and counters.updates % run.config.optim.ema_every == 0:
        run.average.update()
    return norm


_NAMES = {
    "ratio": "train/ratio_mean",
    "clipped": "train/clip_fraction",
    "kl": "train/kl",
    "displacement": "train/displacement",
    "ref_mse": "train/ref_mse",
    "norm_ratio": "train/norm_ratio",
    "loss_plus": "train/loss_plus",
    "loss_minus": "train/loss_minus",
}


def _metrics(run: Run, sums: dict[str, float], norms: list[float]) -> dict[str, float]:
    """Means over all processes' pairs under the fixed metric names, and warnings for unhealthy values."""
    keys = ["pairs", "loss", *_NAMES]
    table = torch.tensor([sums.get(k, 0.0) for k in keys], dtype=torch.float64, device=run.accelerator.device)
    totals = dict(zip(keys, run.accelerator.reduce(table, reduction="sum").tolist(), strict=True))
    metrics = {name: totals[key] / totals["pairs"] for key, name in _NAMES.items() if key in sums}
    finite = [n for n in norms if math.isfinite(n)]
    metrics |= {
        "train/loss": totals["loss"] / totals["pairs"],
        "train/grad_norm": sum(finite) / len(finite) if finite else float("nan"),
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/skipped_updates": run.counters.skipped_updates,
    }
    if metrics.get("train/clip_fraction", 0.0) > 0.6:
        run.warn_once("clip", "over 60 % of the pairs are clipped: lower optim.lr or raise objective.clip_range")
    if sums.get("old_square", 0.0) > 0 and sums["displacement"] / sums["old_square"] > 0.02:
        run.warn_once(
            "displacement", "the policy ran over 2 % ahead of the old policy: lower optim.lr or old_decay_max"
        )
    if run.old is not None:
        metrics["train/old_decay"] = float(run.old.cur_decay_value or 0.0)
    return metrics
