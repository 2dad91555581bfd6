"""From an iteration's samples to gradients: (sample, step) pairs and their losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.collect import Batch
from align.errors import UserError
from align.geometry import trained_steps
from align.models.base import Conditioning
from align.objectives import (
    clipped_ratio_loss,
    draw_times,
    forward_process_loss,
    guard_log_ratio,
    noised_state,
)
from align.run import Run
from samplers.kernels import Transition, log_prob, noise_interval, transition_kl, velocity_mse
from samplers.noise import keyed_generator, keyed_normal
from samplers.rollout import predict_transition

FORWARD_STREAM = 0x666F7277
STEP_ORDER_STREAM = 0x73746570
UPDATE_ORDER_STREAM = 0x757064
# rounding: in fp32 2e-6 at the last, least noisy steps of ddim; a real difference is a hundred times as large
FIRST_RATIO_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


@dataclass
class Pairs:
    """Rows of a micro-batch: local sample index and column (position in the plan, or of the drawn time) of each pair."""

    rows: Tensor
    columns: Tensor


def micro_batches(rows: Sequence[int], columns: Tensor | int, size: int) -> Iterator[Pairs]:
    """All (sample, column) pairs of an update, at most `size` at a time; steps of different times share a batch.

    columns: their number, or for each sample the ones to use, (n, m).
    """
    index = torch.tensor(list(rows), dtype=torch.long)
    if isinstance(columns, int):
        columns = torch.arange(columns).expand(int(index.max()) + 1 if len(index) else 0, columns)
    picked = columns[index]
    pairs = torch.stack([index[:, None].expand_as(picked), picked], dim=-1).reshape(-1, 2)
    for chunk in pairs.split(size) if len(pairs) else ():
        yield Pairs(chunk[:, 0], chunk[:, 1])


def update_order(run: Run, iteration: int, epoch: int) -> list[int]:
    """Order of an iteration's updates in an inner epoch: as they come, then a keyed permutation."""
    number = run.shape.updates
    if epoch == 0:
        return list(range(number))
    key = keyed_generator(seed=run.config.train.seed, iteration=iteration, step=epoch, stream=UPDATE_ORDER_STREAM)
    return [int(u) for u in key.permutation(number)]


def trained_columns(run: Run, batch: Batch, epoch: int) -> Tensor:
    """(n, m) columns of the stochastic steps that each sample trains in an inner epoch.

    With `train.step_fraction` below 1, the first floor(fraction S) of a random order that each sample draws for itself
    (arXiv 2305.13301). With all of them their order would change nothing: a step's gradient is a sum.
    """
    number = len(batch.plan.stochastic)
    kept = trained_steps(number, run.config.train.step_fraction)
    if kept == number:
        return torch.arange(number).expand(len(batch.samples), number)
    orders = [
        keyed_generator(
            seed=run.config.train.seed, iteration=batch.iteration, sample=i, step=epoch, stream=STEP_ORDER_STREAM
        ).permutation(number)[:kept]
        for i in batch.samples
    ]
    return torch.from_numpy(np.stack(orders)) if orders else torch.zeros(0, kept, dtype=torch.long)


def stored_steps(
    run: Run, batch: Batch, pairs: Pairs
) -> tuple[Tensor, Tensor, Conditioning, tuple[Tensor, Tensor, Tensor]]:
    """States x_k and x_{k+1} (M, ...), conditioning, and (t, t_next, noise level) (M,) of stored pairs."""
    steps = torch.tensor(batch.plan.stochastic)[pairs.columns]
    x = torch.stack([batch.states[int(k)][int(j)] for j, k in zip(pairs.rows, steps, strict=True)])
    x_next = torch.stack([batch.states[int(k) + 1][int(j)] for j, k in zip(pairs.rows, steps, strict=True)])
    return x, x_next, batch.condition(pairs.rows), (run.grid[steps], run.grid[steps + 1], run.noise_levels[steps])


@torch.no_grad()
def rescored(run: Run, batch: Batch, rows: Sequence[int], reference: bool = False) -> tuple[Tensor, int]:
    """Log-probs (len(rows), S) float64 of all stored steps under the present weights, or under the reference.

    Also the number of forwards.
    """
    number = len(batch.plan.stochastic)
    parts = []
    with run.model.reference() if reference else contextlib.nullcontext():
        size = max(run.shape.micro_batch, run.config.train.rollout_batch)  # without gradient, as in a rollout
        for pairs in micro_batches(rows, number, size):
            x, x_next, cond, (t, t_next, level) = stored_steps(run, batch, pairs)
            step, _ = predict_transition(run.model.velocity, x, cond, t, t_next, run.kernel, level)
            parts.append(log_prob(x_next, step.mean, step.std, run.log_prob_form, torch.float64).cpu())
    found = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    return found.view(len(rows), number), len(rows) * number


def weighted_pairs(run: Run, batch: Batch, pairs: Pairs, weights: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """weight x log-prob (M,) of stored steps, whose gradient is the whole objective's; diagnostics (M,), and forwards.

    weights: (n, S), see `align.reward_difference.step_weights`.
    """
    x, x_next, cond, (t, t_next, level) = stored_steps(run, batch, pairs)
    step, _ = predict_transition(run.model.velocity, x, cond, t, t_next, run.kernel, level)
    score = log_prob(x_next, step.mean, step.std, run.log_prob_form, torch.float64)
    old = batch.log_probs[pairs.rows, pairs.columns].to(x.device)
    loss = weights[pairs.rows, pairs.columns].to(x.device) * score
    return loss, {"ratio": (score.detach() - old).exp()}, 1


def clipped_ratio_pairs(
    run: Run,
    batch: Batch,
    pairs: Pairs,
    advantages: Tensor,
    lagging: bool,
    pull: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss (M,) of stored steps scored again, diagnostics (M,), and forwards per pair.

    advantages: (n, S); lagging: whether the weights that sampled differ from the live ones; pull: (n,) factors of
    the KL term, None: 1; factors: (n, S) of the loss but for that term, outside the clip, None: 1.
    """
    config = run.config.objective
    x, x_next, cond, (t, t_next, levels) = stored_steps(run, batch, pairs)

    def predict() -> tuple[Transition, Tensor]:
        return predict_transition(run.model.velocity, x, cond, t, t_next, run.kernel, levels)

    forwards, mean_old, reference = 1, None, None
    with torch.no_grad():
        if config.ratio_repair == "guard" and lagging and run.behaviour is not None:
            with run.behaviour.applied():
                mean_old = predict()[0].mean
            forwards += 1
        if config.kl_beta > 0:
            with run.model.reference():
                reference = predict()
            forwards += 1
    step, v = predict()
    old = batch.log_probs[pairs.rows, pairs.columns].to(x.device)
    score = log_prob(x_next, step.mean, step.std, run.log_prob_form)
    if config.ratio_repair == "guard":
        score = guard_log_ratio(x_next, step.mean, step.mean.detach() if mean_old is None else mean_old, step.std)
        old = torch.zeros_like(old)
    weight = advantages[pairs.rows, pairs.columns].to(x.device)
    loss, info = clipped_ratio_loss(score, old, weight, config.clip_range)
    if factors is not None:
        loss = loss * factors[pairs.rows, pairs.columns].to(x.device, loss.dtype)
    if reference is not None:
        if config.kl_form == "velocity_mse":
            penalty = velocity_mse(v, reference[1])
        else:
            interval = noise_interval(run.kernel, t, t_next)
            penalty = transition_kl(step.mean, reference[0].mean, step.std, config.kl_form, interval)
        loss = loss + config.kl_beta * (penalty if pull is None else pull[pairs.rows].to(x.device) * penalty)
        info["kl"] = penalty.detach()
    return loss, info, forwards


def forward_process_pairs(
    run: Run,
    batch: Batch,
    pairs: Pairs,
    advantages: Tensor,
    times: Tensor,
    lagging: bool,
    pull: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss (M,) of re-noised final images, diagnostics (M,), and forwards per pair.

    advantages: (n, 1); times: (n, m) grid indices; lagging: whether the old policy differs from the live weights; pull:
    (n,) factors of the term of the base, None: 1.
    """
    config, seed = run.config.objective, run.config.train.seed
    steps = times[pairs.rows, pairs.columns]
    owners = batch.groups if config.share_noise else batch.samples
    shape = batch.final.shape[1:]
    noise = torch.cat(
        [
            keyed_normal(
                shape,
                seed=seed,
                iteration=batch.iteration,
                samples=[owners[int(j)]],
                step=int(k),
                stream=FORWARD_STREAM,
            )
            for j, k in zip(pairs.rows, steps, strict=True)
        ]
    ).to(batch.final.device)
    x0, t, cond = run.model.clean(batch.final[pairs.rows]), run.grid[steps], batch.condition(pairs.rows)
    x = noised_state(x0, noise, t)
    forwards, v_old, v_ref = 1, None, None
    with torch.no_grad():
        if lagging and run.old is not None:
            with run.old.applied():
                v_old = run.model.velocity(x, t, cond)
            forwards += 1
        if config.ref_coef > 0:
            with run.model.reference():
                v_ref = run.model.velocity(x, t, cond)
            forwards += 1
    v = run.model.velocity(x, t, cond)
    # without lag the old policy is the live one: its prediction is the one just made
    v_old = v.detach() if v_old is None else v_old
    weight, held = advantages[pairs.rows, 0].to(x.device), None if pull is None else pull[pairs.rows].to(x.device)
    loss, info = forward_process_loss(v, v_old, x0, noise, t, weight, config, v_ref, held)
    return loss, info, forwards


def training_times(run: Run, batch: Batch) -> Tensor:
    """(n, m) grid indices trained per sample under forward_process; shared noise needs shared times to cancel."""
    config = run.config.objective
    return draw_times(
        run.grid,
        batch.groups if config.share_noise else batch.samples,
        run.config.train.seed,
        batch.iteration,
        config.times_per_sample,
        config.time_range,
        config.time_sampling,
    )


def check_first_ratio(run: Run, worst: float) -> None:
    """Stop if re-scoring the very first stored steps with unchanged weights does not give ratio 1."""
    tolerance = FIRST_RATIO_TOLERANCE[run.config.model.precision]
    if not worst <= tolerance:  # NaN too
        raise UserError(
            f"the first probability ratio is off 1 by {worst:.3g} (allowed {tolerance:g} in {run.config.model.precision}): "
            "rollout and training disagree; use model.precision=fp32, or switch off model.compile"
        )
    objective = run.config.objective
    width = "step_clip" if objective.type == "reward_difference" else "clip_range"
    if worst > getattr(objective, width):
        run.warn_once(
            "ratio",
            f"ratios are off 1 by up to {worst:.2g} before any update, more than {width}; use a higher precision",
        )
