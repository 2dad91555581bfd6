"""What one iteration learns from: sampled images, their trajectories and completions, and the scores of all of them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.judging import Judging
from align.models.base import Conditioning, ImageModel
from align.prompts import Prompt
from align.run import Run
from align.scoring import Scores
from samplers.completions import CompletionPlan
from samplers.noise import BRANCH_STREAM, INITIAL_STREAM, STEP_STREAM, keyed_normal
from samplers.plans import Plan
from samplers.rollout import Trajectory, Velocity, rollout, solve

Report = Callable[[str, int, int], None]
CPU_CHUNK = 128


@dataclass
class Batch:
    """One process's samples of an iteration, in the order of its updates. n samples, T steps, S stochastic ones."""

    iteration: int
    samples: list[int]
    """Global indices of the n samples."""
    groups: list[int]
    """Group of each sample: position of its prompt within the iteration."""
    cond: Conditioning
    """One row for each distinct prompt of these samples; see `condition`."""
    cond_rows: Tensor
    """(n,) row of `cond` of each sample."""
    final: Tensor
    """(n, C, h, w) float32 final latents."""
    states: dict[int, Tensor]
    """step -> (n, C, h, w) stored states around stochastic steps; empty where no trajectory is needed."""
    log_probs: Tensor
    """(n, S) of `Run.log_prob_dtype`."""
    plan: Plan
    completions: list[Tensor]
    """S tensors (n, C, h, w): clean latents from the state before each stochastic step; empty without values."""
    nfe: int
    """Network evaluations of these samples, guidance and completions included."""

    def condition(self, rows: Tensor) -> Conditioning:
        """Conditioning of the samples at local indices `rows`."""
        return self.cond.take(self.cond_rows[rows])

    def keep(self, rows: Tensor) -> Batch:
        """The samples at local indices `rows` alone; what the others held is freed with this batch."""
        picked = rows.tolist()
        used, cond_rows = torch.unique(self.cond_rows[rows], return_inverse=True)
        return replace(
            self,
            samples=[self.samples[i] for i in picked],
            groups=[self.groups[i] for i in picked],
            cond=self.cond.take(used),
            cond_rows=cond_rows,
            final=self.final[rows],
            # one step at a time, so that no more than one is held twice
            states={k: self.states.pop(k)[rows] for k in sorted(self.states)},
            log_probs=self.log_probs[rows],
        )


def collect(
    run: Run,
    prompts: Sequence[Prompt],
    samples: list[int],
    iteration: int,
    seed: int,
    report: Report,
    with_values: bool = False,
    plan: Plan | None = None,
    offer: Callable[[Sequence[Tensor]], None] | None = None,
) -> Batch:
    """Sample this process's images; keeps trajectories and completions only if they are needed.

    samples: global indices; sample i belongs to group i // group_size, whose prompt is prompts[group]. Noise is named by
    (seed, iteration, sample, step). plan: the configured one of this iteration if None. offer: told the latents of each
    rollout batch when it is done, see `Judging.offer`.
    """
    config, model = run.config, run.model
    if config.model.encoders == "keep":
        model.forget_prompts()
    plan = plan or config.sampler.make_plan(config.train.seed, iteration)
    groups = [i // config.train.group_size for i in samples]
    size = config.train.rollout_batch
    position = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    cond_rows = torch.tensor([position[g] for g in groups])
    conds = model.conditioning([prompts[g].text for g in position])
    finals: list[Tensor] = []
    log_probs: list[Tensor] = []
    states: dict[int, list[Tensor]] = defaultdict(list)
    completions: dict[int, list[Tensor]] = defaultdict(list)
    with run.old.applied() if run.old is not None else contextlib.nullcontext():
        starts, nfe = _starts(run, conds, cond_rows, list(position) if plan.shared else samples, plan, iteration, seed)
        for start in range(0, len(samples), size):
            ids, owners = samples[start : start + size], groups[start : start + size]
            cond = conds.take(cond_rows[start : start + size])
            if plan.split:
                noise = starts[cond_rows[start : start + size]] if plan.shared else starts[start : start + size]
            else:
                noise = initial_states(run, owners if config.sampler.shared_start else ids, iteration, seed)
            if config.sampler.kernel == "ode":
                finals.append(solve(model.velocity, noise, cond, run.grid, config.sampler.solver))
                done = finals[-1:]
                nfe += len(ids) * config.sampler.num_steps * passes(config.sampler.guidance_scale)
            else:
                part = _trajectory(run, noise, cond, plan, ids, owners, iteration, seed, with_values)
                finals.append(part.final)
                log_probs.append(part.log_probs)
                for k, state in enumerate(part.states, start=plan.split):
                    if state is not None:
                        states[k].append(state)
                for column, clean in enumerate(part.completions):
                    completions[column].append(clean)
                done = [*part.completions, part.final]
                nfe += _evaluations(run, part, len(ids))
            report("sampling", start + len(ids), len(samples))
            if offer is not None:
                offer(done)
    return Batch(
        iteration=iteration,
        samples=samples,
        groups=groups,
        cond=conds,
        cond_rows=cond_rows,
        final=torch.cat(finals),
        # one step at a time, so that no more than one is held twice
        states={k: torch.cat(states.pop(k)) for k in sorted(states)},
        log_probs=torch.cat(log_probs) if log_probs else torch.zeros(len(samples), 0),
        plan=plan,
        completions=[torch.cat(completions.pop(column)) for column in sorted(completions)],
        nfe=nfe,
    )


def initial_states(run: Run, keys: Sequence[int], iteration: int, seed: int) -> Tensor:
    """Initial states (len(keys), C, h, w), one for each sample or group named in `keys`."""
    model = run.model
    noise = keyed_normal(
        model.latent_shape,
        seed=seed,
        iteration=iteration,
        samples=keys,
        step=0,
        stream=INITIAL_STREAM,
        device=model.device,
    )
    return noise * model.noise_scale(float(run.grid[0]))


def _starts(
    run: Run, conds: Conditioning, cond_rows: Tensor, keys: list[int], plan: Plan, iteration: int, seed: int
) -> tuple[Tensor, int]:
    """States at the plan's split, one for each of `keys`, (len(keys), C, h, w), and the network evaluations it took.

    keys: groups, in the order of `conds`, if the plan is shared; else samples, whose rows of it are `cond_rows`.
    """
    if not plan.split:
        return torch.zeros(0), 0
    size = run.config.train.rollout_batch
    states, nfe = [], 0
    for start in range(0, len(keys), size):
        some = keys[start : start + size]
        rows = torch.arange(start, start + len(some)) if plan.shared else cond_rows[start : start + size]
        part = rollout(
            run.model.velocity,
            initial_states(run, some, iteration, seed),
            conds.take(rows),
            run.grid[: plan.split + 1],
            plan.prefix(),
            run.kernel,
            run.noise_levels[: plan.split],
            step_noise(run, some, iteration, seed, stream=BRANCH_STREAM if plan.shared else STEP_STREAM),
        )
        states.append(part.final)
        nfe += part.nfe * passes(run.config.sampler.guidance_scale)
    return torch.cat(states), nfe


def step_noise(
    run: Run, keys: Sequence[int], iteration: int, seed: int, first: int = 0, stream: int = STEP_STREAM
) -> Callable[[int], Tensor]:
    """Noise of the steps from `first` on, a row for each of `keys`."""
    return lambda step: keyed_normal(
        run.model.latent_shape,
        seed=seed,
        iteration=iteration,
        samples=keys,
        step=first + step,
        stream=stream,
        device=run.model.device,
    )


def _trajectory(
    run: Run,
    noise: Tensor,
    cond: Conditioning,
    plan: Plan,
    ids: list[int],
    owners: list[int],
    iteration: int,
    seed: int,
    with_values: bool,
) -> Trajectory:
    settings, completions = run.config.completions, None
    if with_values:
        completions = CompletionPlan(
            ode_steps=settings.ode_steps,
            velocity=guided(run.model, settings.guidance_scale, run.config.sampler.guidance_scale),
            same_start=owners if run.config.sampler.shared_start else None,
        )
        if settings.chunk == "auto" and run.rows_that_fit is None:
            run.rows_that_fit = _rows_that_fit(run, noise, cond, completions.velocity or run.model.velocity)
    return rollout(
        run.model.velocity,
        noise,
        cond,
        run.grid[plan.split :],
        plan.suffix(),
        run.kernel,
        run.noise_levels[plan.split :],
        step_noise(run, ids, iteration, seed, plan.split),
        log_prob_form=run.log_prob_form,
        log_prob_dtype=run.log_prob_dtype,
        completions=completions,
        chunk=(run.rows_that_fit if settings.chunk == "auto" else settings.chunk) if with_values else None,
    )


def passes(guidance_scale: float) -> int:
    """Network evaluations of one velocity: guidance runs the network twice."""
    return 1 if guidance_scale == 1 else 2


def _evaluations(run: Run, part: Trajectory, images: int) -> int:
    own = run.config.sampler.guidance_scale
    other = own if run.config.completions.guidance_scale is None else run.config.completions.guidance_scale
    live = images * part.plan.num_steps
    return live * passes(own) + (part.nfe - live) * passes(other)


def guided(model: ImageModel, scale: float | None, own: float) -> Velocity | None:
    """The model's velocity with another guidance, or None if it is the sampler's own and can be reused."""
    if scale is None or scale == own:
        return None

    def velocity(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        before, model.guidance_scale = model.guidance_scale, scale
        try:
            return model.velocity(x, t, cond)
        finally:
            model.guidance_scale = before

    return velocity


@torch.no_grad()
def _rows_that_fit(run: Run, x: Tensor, cond: Conditioning, velocity: Velocity) -> int:
    """Rows of one velocity call: what 70 % of the free GPU memory holds, measured on a small call; CPU_CHUNK on a CPU."""
    if x.device.type != "cuda":
        return CPU_CHUNK
    few = min(4, len(x))
    rows, per_row = torch.arange(few), 1
    for call in {velocity, run.model.velocity}:  # completions with another guidance may need twice the memory
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(x[:few], run.grid[0].expand(few), cond.take(rows))
        torch.cuda.synchronize()
        per_row = max(per_row, (torch.cuda.max_memory_allocated() - before) // few)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, int(0.7 * free / per_row))


def score_values(run: Run, prompts: Sequence[Prompt], batch: Batch, total: int, report: Report) -> Scores:
    """Scores (total, C) of every process's samples: the S completions, if there are any, then the final image."""
    with Judging(run, prompts, batch.samples, batch.iteration, total, report) as judging:
        judging.offer([*batch.completions, batch.final])
        return judging.scores()
