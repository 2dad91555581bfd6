"""The reward-gradient loop: chains -> images -> rewards -> their gradient, back through the chains."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from align.backprop_metrics import Sums, add_up, iteration_metrics, known_scores, value_scale
from align.collect import Report, guided, initial_states, step_noise
from align.confidence import doubtful_losses
from align.errors import UserError
from align.geometry import local_order
from align.models.base import Conditioning, ImageModel
from align.prompts import Prompt
from align.real_images import real_latents
from align.reward_loss import ImageGradient, image_gradient
from align.run import Run
from align.scoring import gather_scores
from align.step import Interrupted, optimizer_step, timed
from align.targets import prompt_ids
from rewards.base import RewardError
from samplers.differentiable import Backward, Chain, Steps, backward_chain, joined, run_chain
from samplers.gradient_plan import GradientPlan, draw_plan, last_step_plan
from samplers.noise import keyed_normal
from samplers.rollout import Velocity

COPY_STREAM = 0x6C76
ENOUGH = 64


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
    extras: dict[str, Tensor] = {}
    norms: list[float] = []
    for number, mine in enumerate(shares[run.accelerator.process_index]):
        run.optimizer.zero_grad(set_to_none=True)
        found = _gradients(run, mine, prompts, sums, report)
        # one message, in which all processes also learn of a reward that failed on one of them; an update may be of so few
        # images that a reward has a score for none
        scores = gather_scores(run.accelerator, found, list(tables), mine, run.shape.samples, required=False)
        everyone = [i for share in shares for i in share[number]]
        for name, values in scores.values.items():
            tables[name][everyone] = values[everyone]
        for key, values in scores.extras.items():
            extras.setdefault(key, torch.full((run.shape.samples,), float("nan")))[everyone] = values[everyone]
        if number == 0 and run.stop_requested():
            raise Interrupted
        with timed(run, sums, "time/train"):
            if _learnable(run, known_scores(run, tables)[everyone]):
                norms.append(optimizer_step(run))
            else:
                run.counters.updates += 1
                run.counters.empty_updates += 1
    run.counters.iteration += 1
    return iteration_metrics(run, tables, extras, sums, norms)


def _learnable(run: Run, known: Tensor) -> bool:
    """Whether an update with the scores `known` (n,) changes the weights: a missing score is a gradient of 0.

    Raises: UserError after three updates in a row, of ENOUGH images in all, that lacked too many.
    """
    limit, counters = run.config.train.max_invalid_fraction, run.counters
    counters.invalid_iterations = counters.invalid_iterations + 1 if known.double().mean() < 1 - limit else 0
    in_a_row = max(3, -(-ENOUGH // len(known)))
    if counters.invalid_iterations >= in_a_row:
        raise UserError(f"{in_a_row} updates in a row lacked over {limit:.0%} of their scores: repair the reward")
    if counters.invalid_iterations:
        run.warn_once("invalid", f"over {limit:.0%} of the scores of an update are missing; those images teach nothing")
    return bool(known.any())


def _gradients(
    run: Run, samples: list[int], prompts: list[Prompt], sums: Sums, report: Report
) -> dict[str, Tensor] | RewardError:
    """Add the gradients of this process's samples of an update; their raw scores (n,), or the failure of a reward."""
    scores = {name: torch.full((len(samples),), float("nan")) for name in run.config.rewards}
    size = run.config.train.rollout_batch
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        owners = [i // run.config.train.group_size for i in some]
        texts = [prompts[g] for g in owners]
        cond = run.model.conditioning([p.text for p in texts])
        with timed(run, sums, "time/sample"):
            try:
                chain, plan = _chains(run, some, owners, texts, cond)
            except (
                UserError
            ) as problem:  # a real image cannot be read; as with rewards, all processes must stop together
                return RewardError(str(problem))
        copies = len(plan) // len(some)  # each image, and what DRaFT-LV draws of it
        with timed(run, sums, "time/score"):
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
                    watched=len(some),
                    doubtful=doubtful_losses(run),
                )
            except RewardError as problem:
                return problem
        with timed(run, sums, "time/train"):
            back = _through_the_chains(run, chain, plan, cond.take(list(range(len(some))) * copies), image)
        held = run.config.sampler.guidance_scale != 1 and run.config.backprop.guidance_gradient != "both"
        if held and run.main and sums["samples"] == 0:
            _unconditional_drift(run, chain, plan, sums)
        for name, values in (image.scores | image.extras).items():
            # what a reward said beside its score may be of some images only
            column = scores.setdefault(name, torch.full((len(samples),), float("nan")))
            column[start : start + len(some)] = values[: len(some)]
        add_up(run, sums, chain, plan, image, back, len(some))
        report("differentiating", int(sums["samples"]), run.shape.local_samples)
    _rescale(run)
    return scores


def _rescale(run: Run) -> None:
    """Bring the gradients to those of the loss: its scale, and the mean over images and copies.

    Only now, in float32: both may be so small that half precision would round a gradient to 0 on its way. Gradients are
    summed over a process's samples and averaged over the processes.
    """
    images = run.shape.samples // run.shape.updates * (1 + run.config.backprop.lv_draws)
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(run.config.loss.scale * run.shape.processes / images)


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
    """What an active step differentiates; its value may lack what has no gradient, as derivatives are taken of it.

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
) -> Backward:
    """The second half of the adjoint: gradients of the adapter, up to what `_rescale` multiplies them by."""
    config, model = run.config.backprop, run.model
    velocity = gradient_velocity(model, config.guidance_gradient)
    reference = penalty = None
    if config.velocity_penalty > 0:
        reference = _without_adapter(model, velocity)
        weight = config.velocity_penalty / run.config.loss.scale / value_scale(run) ** 2
        penalty = torch.full((len(plan),), weight, device=model.device)
    scaler = run.accelerator.scaler
    return backward_chain(
        velocity,
        chain,
        cond,
        _steps(run),
        plan,
        image.gradient / run.config.loss.scale,
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
def _unconditional_drift(run: Run, chain: Chain, plan: GradientPlan, sums: Sums) -> None:
    """Note mean((u - u_ref)^2) / mean(u_ref^2) of the prediction for the empty prompt, which moves though it is not trained.

    At the last active step of the iteration's first sample, which is the same on any number of processes. No evaluation of
    the gradient shows it: it is not in the graph.
    """
    model = run.model
    active = plan.active[0].nonzero().flatten().tolist()
    if not active:
        return
    k = active[-1]
    x = chain.states[k][1][:1]
    velocity = guided(model, 1.0, model.guidance_scale) or model.velocity
    inputs = (x, run.grid[k].expand(len(x)), model.conditioning([""]).take([0] * len(x)))
    tuned, base = velocity(*inputs), _without_adapter(model, velocity)(*inputs)
    sums["nfe"] += 2 * len(x)
    sums["drift"] = float((tuned - base).square().mean() / base.square().mean())
