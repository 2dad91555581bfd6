"""The policy-gradient loop: rollout -> score -> credit -> advantages -> update."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from align.collect import Batch, Report, collect, passes
from align.geometry import local_order
from align.judging import Judging
from align.paired import PairedTrajectories
from align.prompts import Prompt
from align.run import Run
from align.step import Interrupted, now, optimizer_step
from align.targets import Targets, prompt_ids, targets
from align.trainable import policy_learns, update_rewards
from align.updates import (
    Pairs,
    check_first_ratio,
    clipped_ratio_pairs,
    forward_process_pairs,
    micro_batches,
    trained_columns,
    training_times,
    update_order,
    weighted_pairs,
)


def run_iteration(run: Run, report: Report) -> dict[str, float]:
    """One round; returns its metrics. `report(stage, done, total)` is called as it goes.

    Raises: Interrupted before any weight changed; UserError for a broken reward or a diverged run.
    """
    started = now(run)
    iteration = run.counters.iteration
    prompts = _prompts(run, iteration)
    order = local_order(run.shape, run.accelerator.process_index, run.config.train.seed, iteration)
    samples, background = [i for update in order for i in update], run.config.train.async_scoring
    with Judging(run, prompts, samples, iteration, run.shape.samples, report, background) as judging:
        batch = collect(
            run,
            prompts,
            samples,
            iteration,
            run.config.train.seed,
            report,
            with_values=run.config.credit.needs_values,
            offer=judging.offer if background else None,
        )
        sampled = now(run)
        if not background:
            judging.offer([*batch.completions, batch.final])
        scores = judging.scores()
    batch.completions.clear()  # they were there to be scored
    scored = now(run)
    if run.stop_requested():
        raise Interrupted
    evaluations = run.total(batch.nfe)
    run.counters.nfe += evaluations
    metrics = {f"reward/{name}": scores.mean(name) for name in run.config.rewards}
    metrics["sample/nfe_per_image"] = evaluations / run.shape.samples
    found = targets(run, batch.plan, scores, metrics)
    if found is not None:
        final, groups = batch.final, batch.groups
        if policy_learns(run):
            batch, sizes = _kept(run, batch, found, order)
            metrics |= _update(run, batch, found, sizes, report)
        metrics |= update_rewards(run, prompts, final, samples, groups, iteration)
    finished = now(run)
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


def _prompts(run: Run, iteration: int) -> list[Prompt]:
    return [run.train_prompts[i] for i in prompt_ids(run, iteration)]


def _kept(run: Run, batch: Batch, found: Targets, order: list[list[int]]) -> tuple[Batch, list[int]]:
    """The samples to train on this process, and how many of them belong to each update; the others are freed."""
    rows = [j for j, i in enumerate(batch.samples) if found.kept[i]]
    sizes = [sum(bool(found.kept[i]) for i in update) for update in order]
    return (batch if len(rows) == len(batch.samples) else batch.keep(torch.tensor(rows, dtype=torch.long))), sizes


def _update(run: Run, batch: Batch, found: Targets, sizes: list[int], report: Report) -> dict[str, float]:
    """All optimiser steps of the iteration on this process's share, whose updates have `sizes` samples here."""
    config = run.config
    forward_process = config.objective.type == "forward_process"
    times = training_times(run, batch) if forward_process else torch.zeros(0)
    advantages, everywhere = found.advantages[batch.samples], run.totals(sizes)
    pull, factors = (None if x is None else x[batch.samples] for x in (found.pull, found.steps))
    trajectories = (
        PairedTrajectories(run, batch, found.rewards) if config.objective.type == "reward_difference" else None
    )
    if run.behaviour is not None:
        run.behaviour.update()
    sums: dict[str, float] = defaultdict(float)
    norms, guided = [], passes(config.sampler.guidance_scale)
    first = [sum(sizes[:n]) for n in range(len(sizes))]
    for epoch in range(config.train.inner_epochs):
        columns = None if forward_process else trained_columns(run, batch, epoch)
        for number in update_order(run, batch.iteration, epoch):
            rows = range(first[number], first[number] + sizes[number])
            weights = trajectories.weights(rows, sums) if trajectories is not None and everywhere[number] else None
            if not everywhere[number] or (trajectories is not None and weights is None):
                run.counters.updates += 1
                run.counters.empty_updates += 1
                continue
            lagging = (run.old or run.behaviour).lags() if (run.old or run.behaviour) else False  # type: ignore[union-attr]
            run.optimizer.zero_grad(set_to_none=True)
            width = times.shape[1] if columns is None else columns.shape[1]
            # gradients are averaged over the processes, whose shares of an update need not be equal
            total = 1 if weights is not None else everywhere[number] * width
            picked = width if columns is None else columns
            for pairs in micro_batches(rows, picked, run.shape.micro_batch):
                if forward_process:
                    loss, info, forwards = forward_process_pairs(run, batch, pairs, advantages, times, lagging, pull)
                elif weights is not None:
                    loss, info, forwards = weighted_pairs(run, batch, pairs, weights)
                else:
                    loss, info, forwards = clipped_ratio_pairs(run, batch, pairs, advantages, lagging, pull, factors)
                run.accelerator.backward(loss.sum() * run.shape.processes / total)
                _add_up(sums, loss, info, pairs)
                sums["nfe"] += len(pairs.rows) * (forwards + 2 + config.model.gradient_checkpointing) * guided
                report("training", int(sums["pairs"]), sum(sizes) * width * config.train.inner_epochs)
            if run.counters.updates == run.counters.empty_updates and not forward_process:
                check_first_ratio(run, sums["worst_ratio"])
            norms.append(optimizer_step(run))
    if trajectories is not None:
        sums["nfe"] += trajectories.forwards * guided
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
# Of the reward-difference objective, per update and not per (sample, step); these replace those above.
_PAIR_NAMES = {
    "pair_loss": "train/loss",
    "clipped_steps": "train/clip_fraction",
    "abs_error": "train/pair_error",
    "abs_target": "train/pair_target",
}


def _metrics(run: Run, sums: dict[str, float], norms: list[float]) -> dict[str, float]:
    """Means over all processes' pairs under the fixed metric names, and warnings for unhealthy values."""
    keys = ["pairs", "loss", "nfe", *_NAMES, *_PAIR_NAMES]
    table = torch.tensor([[sums.get(k, 0.0) for k in keys], [k in sums for k in keys]], dtype=torch.float64)
    both = run.accelerator.reduce(table.to(run.accelerator.device), reduction="sum").tolist()
    totals = {k: value for k, value, present in zip(keys, *both, strict=True) if present or k == "nfe"}
    run.counters.nfe += round(totals["nfe"])
    if not norms:
        return {
            "train/skipped_updates": run.counters.skipped_updates,
            "train/empty_updates": run.counters.empty_updates,
        }
    metrics = {name: totals[key] / totals["pairs"] for key, name in _NAMES.items() if key in totals}
    finite = [n for n in norms if math.isfinite(n)]
    metrics |= {
        "train/loss": totals["loss"] / totals["pairs"],
        "train/grad_norm": sum(finite) / len(finite) if finite else float("nan"),
        "train/lr": run.optimizer.param_groups[0]["lr"],
        "train/skipped_updates": run.counters.skipped_updates,
    }
    metrics |= {name: totals[key] / len(norms) for key, name in _PAIR_NAMES.items() if key in totals}
    if run.counters.empty_updates:
        metrics["train/empty_updates"] = run.counters.empty_updates
    if metrics.get("train/clip_fraction", 0.0) > 0.6:
        run.warn_once("clip", "over 60 % of the pairs are clipped: lower optim.lr or raise objective.clip_range")
    if sums.get("old_square", 0.0) > 0 and sums["displacement"] / sums["old_square"] > 0.02:
        run.warn_once(
            "displacement", "the policy ran over 2 % ahead of the old policy: lower optim.lr or old_decay_max"
        )
    if run.old is not None:
        metrics["train/old_decay"] = float(run.old.cur_decay_value or 0.0)
    return metrics
