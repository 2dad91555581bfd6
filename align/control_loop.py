"""The reward-gradient loop on real data: noised images -> one-step images -> the condition read from them -> its gradient.

ControlNet++ (arXiv 2404.07987) and Ctrl-U (arXiv 2410.11236): nothing is sampled. A real image with a known condition is
noised, one denoising step of it is decoded, a network reads the condition from that, and the error of the reading trains
the ControlNet beside the usual diffusion loss.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from align.collect import Report
from align.control_data import Examples, check_labels, load_examples
from align.control_loss import (
    Consistency,
    active,
    clean_estimate,
    consistency,
    diffusion_errors,
    masked_mean,
    ramp,
    second_timestep,
)
from align.control_metrics import PER_SAMPLE, Sums, iteration_metrics
from align.errors import UserError
from align.geometry import local_order
from align.models.base import Conditioning
from align.models.controlnet import CONTROL, ControlNetSDModel
from align.prompts import Prompt
from align.run import Run
from align.scoring import gather_scores
from align.step import Interrupted, optimizer_step, timed
from align.targets import prompt_ids
from rewards.base import RewardError
from samplers.noise import keyed_generator, keyed_normal

TIME_STREAM, NOISE_STREAM = 0x6354, 0x634E


def run_iteration(run: Run, report: Report) -> dict[str, float]:
    """One round of `train.updates_per_iteration` updates; its metrics.

    Raises: Interrupted before any weight changed; UserError for data that cannot be read or a diverged run.
    """
    iteration, seed = run.counters.iteration, run.config.train.seed
    prompts = [run.train_prompts[i] for i in prompt_ids(run, iteration)]
    if run.config.model.encoders == "keep":
        run.model.forget_prompts()
    shares = [local_order(run.shape, rank, seed, iteration) for rank in range(run.shape.processes)]
    sums: Sums = defaultdict(float)
    tables = {name: torch.full((run.shape.samples,), float("nan")) for name in PER_SAMPLE}
    norms: list[float] = []
    for number, mine in enumerate(shares[run.accelerator.process_index]):
        everyone = [i for share in shares for i in share[number]]
        run.optimizer.zero_grad(set_to_none=True)
        with timed(run, sums, "time/train"):
            found = _gradients(run, mine, everyone, prompts, sums, report)
        # one message, in which all processes also learn of an image that one of them could not read
        scores = gather_scores(run.accelerator, found, list(PER_SAMPLE), mine, run.shape.samples, required=False)
        for name in PER_SAMPLE:
            tables[name][everyone] = scores.values[name][everyone]
        if number == 0 and run.stop_requested():
            raise Interrupted
        with timed(run, sums, "time/train"):
            norms.append(optimizer_step(run))
    run.counters.iteration += 1
    return iteration_metrics(run, tables, sums, norms)


@dataclass
class Draws:
    """What is drawn for B samples, by their own numbers: the same on any number of processes."""

    timesteps: Tensor
    """(P, B) int64, of the P = 1 or 2 predictions."""
    noise: Tensor
    """(P, B, C, h, w) float32."""


def draw(run: Run, samples: list[int]) -> Draws:
    """Timesteps and noise of `samples` in the present iteration."""
    settings, ctrlu, model = run.config.consistency, run.config.consistency.ctrlu, run.model
    first = draw_timesteps(run, samples)
    keys = {"seed": run.config.train.seed, "iteration": run.counters.iteration, "samples": samples}
    noise = keyed_normal(model.latent_shape, **keys, step=0, stream=NOISE_STREAM, device=model.device)  # type: ignore[arg-type]
    if settings.passes == 1:
        return Draws(first[None], noise[None])
    second = second_timestep(first, ctrlu.add_timestep, len(levels(run)) - 1)
    other = noise
    if not ctrlu.share_noise:
        other = keyed_normal(model.latent_shape, **keys, step=1, stream=NOISE_STREAM, device=model.device)  # type: ignore[arg-type]
    return Draws(torch.stack([first, second]), torch.stack([noise, other]))


def draw_timesteps(run: Run, samples: list[int]) -> Tensor:
    """Primary timesteps (B,) int64, uniform over the model's own."""
    seed, iteration, count = run.config.train.seed, run.counters.iteration, len(levels(run))
    drawn = [
        keyed_generator(seed=seed, iteration=iteration, sample=i, stream=TIME_STREAM).integers(count) for i in samples
    ]
    return torch.tensor(drawn, dtype=torch.int64, device=run.model.device)


def levels(run: Run) -> Tensor:
    """(K,) flow time of the model's training timesteps, rising."""
    assert isinstance(run.model, ControlNetSDModel)
    return run.model.levels


def _gradients(
    run: Run, samples: list[int], everyone: list[int], prompts: list[Prompt], sums: Sums, report: Report
) -> dict[str, Tensor] | RewardError:
    """Add the gradients of this process's samples of an update; what is logged of each (n,), or what could not be read."""
    config, model = run.config, run.model
    settings = config.consistency
    count = float(active(draw_timesteps(run, everyone), settings.t_min, settings.t_max).sum())
    weight = ramp(run.counters.updates, settings.ramp_updates, settings.grad_scale)
    rows: dict[str, list[Tensor]] = {name: [] for name in PER_SAMPLE}
    side = config.model.resolution or model.native_resolution
    size = max(1, config.train.micro_batch // settings.passes)
    for start in range(0, len(samples), size):
        some = samples[start : start + size]
        texts = [prompts[i // config.train.group_size] for i in some]
        try:
            examples = load_examples(texts, side, run.condition is not None and run.condition.kind == "probabilistic")
            if run.condition is not None and examples.labels is not None:
                for labels, prompt in zip(examples.labels, texts, strict=True):
                    check_labels(labels, run.condition.classes, prompt)
        except UserError as problem:
            return RewardError(str(problem))
        loss, row = _loss(run, texts, examples, draw(run, some), weight, len(everyone), count, sums)
        # summed over this process's samples, averaged over the processes
        loss = loss * run.shape.processes
        scaler = run.accelerator.scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()
        for name, values in row.items():
            rows[name].append(values)
        sums["samples"] += len(some)
        report("differentiating", int(sums["samples"]), run.shape.local_samples)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _loss(
    run: Run,
    prompts: list[Prompt],
    examples: Examples,
    draws: Draws,
    weight: float,
    total: int,
    count: float,
    sums: Sums,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the loss of an update of `total` samples, `count` of them active; and what is logged."""
    model, settings = run.model, run.config.consistency
    assert isinstance(model, ControlNetSDModel)
    passes, batch = draws.timesteps.shape
    clean = model.encode_images(examples.images.to(model.device)).repeat(passes, 1, 1, 1)
    t, noise = levels(run)[draws.timesteps.flatten()], draws.noise.flatten(0, 1)
    s = t.view(-1, 1, 1, 1)
    x = (1 - s) * clean + s * noise
    cond = model.conditioning([p.text for p in prompts])
    cond = Conditioning({**cond.tensors, CONTROL: examples.conditions.to(model.device)})
    # primary predictions, then auxiliary ones, through one call: what differs is the input alone
    velocity = model.conditional_velocity(x, t, cond.take(list(range(batch)) * passes))
    errors = diffusion_errors(x, velocity, t, clean, noise, model.prediction)
    loss = errors.sum() / (total * passes)
    mask = active(draws.timesteps[0], settings.t_min, settings.t_max)
    row = {name: torch.full((batch,), float("nan")) for name in PER_SAMPLE}
    sums["nfe"] += batch * passes * (3 + run.config.model.gradient_checkpointing)
    sums["diffusion"] += float(errors.detach().double().sum()) / passes
    if run.condition is None or not bool(mask.any()):
        sums["loss"] += float(loss.detach()) * total
        return loss, row
    chosen = mask.nonzero().flatten()  # others would be masked anyway
    both = torch.cat([chosen + p * batch for p in range(passes)])
    found = _judged(run, clean_estimate(x[both], velocity[both], t[both]), examples, chosen, sums)
    on = torch.ones_like(chosen, dtype=torch.bool)
    penalty = settings.ctrlu.penalty_weight(run.condition.kind)
    loss = loss + weight * masked_mean(found.loss, on, count) + penalty * masked_mean(found.penalty, on, count)
    sums["loss"] += float(loss.detach()) * total
    where = chosen.cpu()
    row["consistency"][where] = found.plain.cpu()
    if settings.ctrlu.mode == "uncertainty":
        row["uncertainty"][where] = found.penalty.detach().cpu()
        row["weight"][where] = found.weight.cpu()
    return loss, row


def _judged(run: Run, latents: Tensor, examples: Examples, chosen: Tensor, sums: Sums) -> Consistency:
    """Decode the one-step latents of the `chosen` samples and compare what D reads with the condition."""
    model, settings, network = run.model, run.config.consistency, run.condition
    assert network is not None
    images, saturated = model.decode_with_gradient(latents * model.noise_scale(model.end_time), settings.clamp)
    sums["saturated"] += float(saturated.double().sum())
    sums["judged"] += len(latents)
    if examples.labels is not None:
        target = examples.labels.to(model.device)[chosen]
    else:
        with torch.no_grad():
            target = network.outputs(examples.images.to(model.device)[chosen])
    return consistency(network.outputs(images), target, network.kind, settings.ctrlu)
