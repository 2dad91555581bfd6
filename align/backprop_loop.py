"""The reward-gradient loop: chains -> images -> rewards -> their gradient, back through the chains."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from align.collect import Report, guided, initial_states, passes, step_noise
from align.geometry import local_order
from align.models.base import Conditioning, ImageModel
from align.prompts import Prompt
from align.real_images import real_latents
from align.reward_loss import ImageGradient, image_gradient
from align.run import Run
from align.scoring import gather_scores
from align.step import Interrupted, now, optimizer_step
from align.targets import enough_scores, prompt_ids
from rewards.base import RewardError
from rewards.combine import combine
from samplers.differentiable import Backward, Chain, Steps, backward_chain, joined, run_chain
from samplers.gradient_plan import GradientPlan, draw_plan, last_step_plan
from samplers.noise import keyed_normal
from samplers.rollout import Velocity

COPY_STREAM = 0x6C76
Sums = dict[str, float]


def run_iteration(run: Run, report: Report) -> dict[str, float]:
    """One round of `train.updates_per_iteration` updates, each on images of the weights as they then are; its metrics.

    Raises: Interrupted before any weight changed; UserError for a broken reward or a diverged run.
    """
    iteration, seed = run.counters.iteration, run.config.train.seed
    prompts = [run.train_prompts[i] for i in prompt_ids(run, iteration)]
    if run.config.model.encoders == "keep":
        run.model.forget_prompts()
    shares = [local_order(run.shape, rank, seed, iteration) for rank in range(run.shape.processes)]
    sums: Sums = defaultdict(float)
    tables = {name: torch.full((run.shape.samples,), float("nan")) for name in run.config.rewards}
    norms: list[float] = []
    for number, mine in enumerate(shares[run.accelerator.process_index]):
        run.optimizer.zero_grad(set_to_none=True)
        found = _gradients(run, mine, prompts, sums, report)
        # one message, in which all processes also learn of a reward that failed on one of them
        # an update may be of so few images that a reward has a score for none of them; see enough_scores
        scores = gather_scores(run.accelerator, found, list(tables), mine, run.shape.samples, required=False)
        everyone = [i for share in shares for i in share[number]]
        for name, values in scores.values.items():
            tables[name][everyone] = values[everyone]
        if number == 0 and run.stop_requested():
            raise Interrupted
        with _timed(run, sums, "time/train"):
            if enough_scores(run, _known(run, tables)[everyone], {}):
                norms.append(optimizer_step(run))
            else:
                run.counters.updates += 1
                run.counters.empty_updates += 1
    run.counters.iteration += 1
    return _metrics(run, tables, sums, norms)


def _gradients(
    run: Run, samples: list[int], prompts: list[Prompt], sums: Sums, report: Report
) -> dict[str, Tensor] | RewardError:
    """Add the gradients of this process's samples of an update; their raw scores (n,), or the failure of a reward."""
    scores: dict[str, list[Tensor]] = {name: [] for name in run.config.rewards}
    size = run.config.train.rollout_batch
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        owners = [i // run.config.train.group_size for i in some]
        texts = [prompts[g] for g in owners]
        cond = run.model.conditioning([p.text for p in texts])
        with _timed(run, sums, "time/sample"):
            chain, plan = _chains(run, some, owners, texts, cond)
        copies = len(plan) // len(some)  # each image, and what DRaFT-LV draws of it
        with _timed(run, sums, "time/score"):
            try:
                image = image_gradient(
                    run.model,
                    {name: run.rewards[name] for name in run.config.rewards},
                    run.config.rewards,
                    chain.final,
                    texts * copies,
                    owners * copies,
                    run.counters.iteration,
                    run.config.loss,
                )
            except RewardError as problem:
                return problem
        with _timed(run, sums, "time/train"):
            back = _through_the_chains(
                run, chain, plan, cond.take(list(range(len(some))) * copies), image, copies, sums
            )
        held = run.config.sampler.guidance_scale != 1 and run.config.backprop.guidance_gradient != "both"
        if held and run.main and sums["samples"] == 0:
            sums["drift"] = _unconditional_drift(run, chain, plan, sums)
        for name, values in image.scores.items():
            scores[name].append(values[: len(some)])
        _add_up(run, sums, chain, plan, image, back, len(some))
        report("differentiating", int(sums["samples"]), run.shape.local_samples)
    return {name: torch.cat(parts) for name, parts in scores.items()}


def _chains(
    run: Run, samples: list[int], owners: list[int], prompts: list[Prompt], cond: Conditioning
) -> tuple[Chain, GradientPlan]:
    """Sample the chains of `samples`, then the copies of DRaFT-LV: all final states, and those before active steps."""
    config, iteration = run.config, run.counters.iteration
    seed = config.train.seed
    steps = _steps(run)
    plan = draw_plan(config.backprop, run.grid, samples, seed, iteration)
    start = initial_states(run, owners if config.sampler.shared_start else samples, iteration, seed)
    if config.backprop.partial_tau is not None:
        noise = start / run.model.noise_scale(float(run.grid[0]))
        start = _noised(real_latents(run.model, prompts), noise, run.grid[plan.first])
    draws = step_noise(run, samples, iteration, seed)
    chain = run_chain(run.model.velocity, start, cond, steps, plan, draws)
    parts = [(chain, plan)]
    clean = run.model.clean(chain.final)
    for draw in range(config.backprop.lv_draws):
        noise = keyed_normal(
            run.model.latent_shape,
            seed=seed,
            iteration=iteration,
            samples=samples,
            step=draw,
            stream=COPY_STREAM,
            device=run.model.device,
        )
        again = last_step_plan(len(samples), config.sampler.num_steps)
        noised = _noised(clean, noise, run.grid[-2])
        parts.append((run_chain(run.model.velocity, noised, cond, steps, again, draws), again))
    return joined(parts)


def _noised(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (1 - t) * clean + t * noise


def _steps(run: Run) -> Steps:
    plan = run.config.sampler.make_plan(run.config.train.seed, run.counters.iteration)
    return Steps(run.grid, run.kernel, frozenset(plan.stochastic), run.noise_levels)


def gradient_velocity(model: ImageModel, mode: str) -> Velocity:
    """What an active step differentiates; its value may lack what has no gradient, as only derivatives are taken.

    With guidance g the velocity is u + g (c - u). "both": that. "cond_only": u counts as a constant but for what of x it
    contains, g c + (1 - g) slope x. "off": c.
    """
    scale = model.guidance_scale
    conditional = guided(model, 1.0, scale)
    if mode == "both" or conditional is None:
        return model.velocity
    if mode == "off":
        return conditional

    def velocity(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        held = (1 - scale) * model.held_slope(t).view(-1, 1, 1, 1)
        return scale * conditional(x, t, cond) + held * x

    return velocity


def _through_the_chains(
    run: Run,
    chain: Chain,
    plan: GradientPlan,
    cond: Conditioning,
    image: ImageGradient,
    copies: int,
    sums: Sums,
) -> Backward:
    """The second half of the adjoint: gradients of the adapter."""
    config, model = run.config.backprop, run.model
    velocity = gradient_velocity(model, config.guidance_gradient)
    # gradients are averaged over the processes and summed over their samples
    share = run.shape.processes / (run.shape.samples // run.shape.updates) / copies
    reference = penalty = None
    if config.velocity_penalty > 0:
        reference = _without_adapter(model, velocity)
        penalty = torch.full((len(plan),), config.velocity_penalty * share, device=model.device)
    scaler = run.accelerator.scaler
    return backward_chain(
        velocity,
        chain,
        cond,
        _steps(run),
        plan,
        image.gradient * share,
        jacobian=config.jacobian,
        slope=model.held_slope,
        micro_batch=run.config.train.micro_batch,
        reference=reference,
        penalty=penalty,
        clip=config.adjoint_clip,
        scale=float(scaler.get_scale()) if scaler is not None else 1.0,
    )


def _without_adapter(model: ImageModel, velocity: Velocity) -> Velocity:
    def reference(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        with model.reference():
            return velocity(x, t, cond)

    return reference


@torch.no_grad()
def _unconditional_drift(run: Run, chain: Chain, plan: GradientPlan, sums: Sums) -> float:
    """mean((u - u_ref)^2) / mean(u_ref^2) of the prediction for the empty prompt, which moves though it is not trained.

    At the last active step of the iteration's first sample, which is the same on any number of processes. No evaluation of
    the gradient shows it: it is not in the graph.
    """
    model = run.model
    active = plan.active[0].nonzero().flatten().tolist()
    if not active:
        return 0.0
    k = active[-1]
    x = chain.states[k][1][:1]
    velocity = guided(model, 1.0, model.guidance_scale) or model.velocity
    inputs = (x, run.grid[k].expand(len(x)), model.conditioning([""]).take([0] * len(x)))
    tuned, base = velocity(*inputs), _without_adapter(model, velocity)(*inputs)
    sums["nfe"] += 2 * len(x)
    return float((tuned - base).square().mean() / base.square().mean())


@contextlib.contextmanager
def _timed(run: Run, sums: Sums, stage: str) -> Iterator[None]:
    started = now(run)
    yield
    sums[stage] += now(run) - started


def _add_up(
    run: Run, sums: Sums, chain: Chain, plan: GradientPlan, image: ImageGradient, back: Backward, samples: int
) -> None:
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
    sums["penalty"] += float(back.penalty.double().sum())
    sums["pairs"] += back.pairs


def _known(run: Run, tables: dict[str, Tensor]) -> Tensor:
    return combine(tables, {k: ~v.isnan() for k, v in tables.items()}, _weights(run))[1]


def _weights(run: Run) -> dict[str, float]:
    return {name: reward.weight for name, reward in run.config.rewards.items()}


_NAMES = {
    "loss": "train/loss",
    "saturated": "train/saturated_fraction",
    "adjoint": "train/adjoint_norm",
    "growth": "train/adjoint_growth",
    "penalty": "train/ref_mse",
    "pairs": "train/active_steps",
}


def _metrics(run: Run, tables: dict[str, Tensor], sums: Sums, norms: list[float]) -> dict[str, float]:
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
    metrics |= times
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
