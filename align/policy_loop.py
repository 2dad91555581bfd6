"""The policy-gradient loop: rollout -> score -> credit -> advantages -> update."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from align import credit
from align.advantages import group_advantages
from align.errors import UserError
from align.geometry import local_order
from align.models.base import Conditioning
from align.prompts import Prompt, prompt_indices
from align.run import Run
from align.scoring import Scores, gather_scores, try_score
from align.updates import (
    Batch,
    Pairs,
    check_first_ratio,
    clipped_ratio_pairs,
    forward_process_pairs,
    micro_batches,
    training_times,
)
from rewards.combine import combine
from samplers.noise import INITIAL_STREAM, keyed_normal
from samplers.rollout import rollout, solve

Report = Callable[[str, int, int], None]


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
    batch = _collect(run, prompts, [i for update in order for i in update], report)
    sampled = _now(run)
    scores = _score(run, prompts, batch, report)
    scored = _now(run)
    if run.stop_requested():
        raise Interrupted
    run.counters.nfe += run.shape.samples * run.config.sampler.num_steps * _passes(run)
    metrics = {f"reward/{name}": scores.mean(name) for name in run.config.rewards}
    advantages = _advantages(run, scores, metrics)
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


def _collect(run: Run, prompts: list[Prompt], samples: list[int], report: Report) -> Batch:
    """Sample this process's images; keeps trajectories only if the objective needs them."""
    config, model, iteration = run.config.sampler, run.model, run.counters.iteration
    if run.config.model.encoders == "keep":
        model.forget_prompts()
    plan = config.make_plan(run.config.train.seed, iteration)
    groups = [i // run.config.train.group_size for i in samples]
    finals, log_probs, conds = [], [], []
    states: dict[int, list[Tensor]] = defaultdict(list)
    seed, size = run.config.train.seed, run.config.train.rollout_batch
    collector = run.old.applied() if run.old is not None else contextlib.nullcontext()
    with collector:
        for start in range(0, len(samples), size):
            ids = samples[start : start + size]
            owners = groups[start : start + size]
            cond = model.conditioning([prompts[g].text for g in owners])
            noise = keyed_normal(
                model.latent_shape,
                seed=seed,
                iteration=iteration,
                samples=owners if config.shared_noise else ids,
                step=0,
                stream=INITIAL_STREAM,
                device=model.device,
            )
            if config.kernel == "ode":
                finals.append(solve(model.velocity, noise, cond, run.grid, config.solver))
            else:
                trajectory = rollout(
                    model.velocity,
                    noise,
                    cond,
                    run.grid,
                    plan,
                    config.kernel,
                    config.noise_level,
                    lambda step, ids=ids: keyed_normal(  # type: ignore[misc]
                        model.latent_shape, seed=seed, iteration=iteration, samples=ids, step=step, device=model.device
                    ),
                )
                finals.append(trajectory.final)
                log_probs.append(trajectory.log_probs)
                for k, state in enumerate(trajectory.states):
                    if state is not None:
                        states[k].append(state)
            conds.append(cond)
            report("sampling", start + len(ids), len(samples))
    return Batch(
        iteration=iteration,
        samples=samples,
        groups=groups,
        cond=Conditioning.stack(conds),
        final=torch.cat(finals),
        states={k: torch.cat(v) for k, v in states.items()},
        log_probs=torch.cat(log_probs) if log_probs else torch.zeros(len(samples), 0),
        plan=plan,
    )


def _passes(run: Run) -> int:
    return 1 if run.config.sampler.guidance_scale == 1 else 2


def _score(run: Run, prompts: list[Prompt], batch: Batch, report: Report) -> Scores:
    report("scoring", 0, len(batch.samples))
    images = run.model.decode(batch.final, run.config.train.rollout_batch)
    rewards = {name: run.rewards[name] for name in run.config.rewards}
    local = try_score(rewards, images, [prompts[g] for g in batch.groups], batch.groups, batch.iteration)
    return gather_scores(run.accelerator, local, list(rewards), batch.samples, run.shape.samples)


def _advantages(run: Run, scores: Scores, metrics: dict[str, float]) -> Tensor | None:
    """Advantages (N, S) of all samples, or None if too many scores are missing to learn from this iteration."""
    weights = {name: reward.weight for name, reward in run.config.rewards.items()}
    total, valid = combine(scores.values, scores.valid, weights)
    missing = 1 - float(valid.double().mean())
    metrics["reward/invalid_fraction"] = missing
    if missing > run.config.train.max_invalid_fraction:
        run.counters.invalid_iterations += 1
        run.warn_once("invalid", f"{missing:.0%} of the scores are missing; such iterations are skipped")
        if run.counters.invalid_iterations >= 3:
            raise UserError(
                f"three iterations in a row lacked over {run.config.train.max_invalid_fraction:.0%} of their scores"
            )
        return None
    run.counters.invalid_iterations = 0
    groups = torch.arange(run.shape.samples) // run.config.train.group_size
    columns = max(1, len(run.config.sampler.make_plan(run.config.train.seed, run.counters.iteration).stochastic))
    step_rewards = credit.terminal(total, columns)
    advantages, stats = group_advantages(step_rewards, valid, groups, run.config.advantage)
    metrics |= {"reward/mean": stats["reward_mean"], "reward/std": stats["reward_std"]}
    metrics["train/zero_spread_fraction"] = stats["zero_spread_fraction"]
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
    first, norms = 0, []
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
            run.counters.nfe += len(pairs.rows) * cost * _passes(run) * run.shape.processes
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
