"""What an iteration's samples are trained towards: rewards, credit, advantages and the choice of samples."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from align import credit
from align.advantages import group_advantages, group_moments
from align.combination import any_valid, base_units, combined_advantages, standardised
from align.confidence import doubts, ensemble_spread
from align.constraints import follow, penalty_share
from align.credit_stats import value_stats, zero_spread
from align.errors import UserError
from align.history import history_advantages, remember
from align.prompts import prompt_indices
from align.references import shaped
from align.run import Run
from align.scoring import Scores, extra_means
from align.selection import select
from align.uncertainty import Confidence
from rewards.combine import combine
from samplers.plans import Plan


@dataclass
class Targets:
    """Of all N samples of the iteration, equal on every process."""

    advantages: Tensor
    """(N, S) float32."""
    kept: Tensor
    """(N,) bool, the samples to train."""
    rewards: Tensor
    """(N,) float32 weighted sum of the rewards of the final image, NaN where one is missing."""
    pull: Tensor | None = None
    """(N,) float32 factors of the penalty towards the base (`uncertainty.mode: gate_kl`, `combine.constraints`); None: 1."""
    steps: Tensor | None = None
    """(N, S) float64 factors of the losses of the steps (`uncertainty.per_step`); None: 1."""


def prompt_ids(run: Run, iteration: int) -> list[int]:
    """Positions in the training prompts of an iteration's groups."""
    train = run.config.train
    return prompt_indices(len(run.train_prompts), train.prompts_per_iteration, iteration, train.seed)


def targets(run: Run, plan: Plan, scores: Scores, metrics: dict[str, float]) -> Targets | None:
    """Targets of all samples, or None if too many scores are missing to learn from this iteration.

    Adds the iteration's metrics of rewards, credit and advantages to `metrics`, and its rewards to the run's history.
    """
    config = run.config
    weights = {name: reward.weight for name, reward in config.rewards.items()}
    metrics |= extra_means(scores.extras, weights) | ensemble_spread(run, scores.extras)
    apart = config.combine.apart(weights)
    raw, scores = scores, _in_units(run, scores, apart, metrics)
    values, complete = combine(scores.values, scores.valid, weights)
    valid = any_valid(scores.valid, weights) if apart else complete
    if not enough_scores(run, valid, metrics):
        return None
    final, known = values[:, -1], valid[:, -1]
    groups = torch.arange(run.shape.samples) // config.train.group_size
    metrics |= _reward_stats(run, final, complete[:, -1], groups)
    found = doubts(run, raw, final, known, groups, metrics, plan.stochastic)
    steps, share = max(1, len(plan.stochastic)), 1.0
    step_rewards, credit_stats = credit.step_rewards(values, steps, config.credit, groups)
    if apart:
        parts = {
            name: credit.step_rewards(scores.values[name], steps, config.credit, groups)[0]
            for name, weight in weights.items()
            if weight != 0
        }
        finals = {name: raw.values[name][:, -1] for name in weights}
        factors = follow(run, raw, metrics)
        share = penalty_share(factors)
        settings = (groups, config.combine, config.advantage, factors)
        advantages, stats = combined_advantages(parts, weights, finals, *settings, found.confidence)
        metrics |= stats
        flat = stats["train/zero_spread_fraction"]
    else:
        advantages, flat = _advantages(run, step_rewards, known, groups, metrics, found.confidence)
    metrics["train/zero_spread_fraction"] = flat
    if config.credit.needs_values:
        metrics |= value_stats(values, plan.stochastic, groups) | zero_spread(step_rewards, plan.stochastic, groups)
        metrics |= credit_stats
    if flat > 0.8:
        run.warn_once(
            "spread",
            "over 80 % of the groups have equal rewards and teach nothing; use a finer reward or larger groups",
        )
    kept, advantages = select(advantages, known, groups, config.selection)
    if config.selection.rule != "all":
        metrics["select/kept_fraction"] = float(kept.double().mean())
        metrics["select/positive_fraction"] = float((kept & (advantages[:, -1] > 0)).sum() / kept.sum().clamp_min(1))
    return Targets(advantages, kept, final, _pull(found.gated, share, len(groups)), found.steps)


def _pull(gated: Tensor | None, share: float, samples: int) -> Tensor | None:
    """(N,) float32 factors of the penalty: `share` of it, of the gated samples alone; None if all have all of it."""
    if gated is None:
        return None if share == 1 else torch.full((samples,), share)
    return share * gated.float()


def _in_units(run: Run, scores: Scores, apart: bool, metrics: dict[str, float]) -> Scores:
    """The weighted rewards as `combine.par` or `combine.standardise` want them, or as they are."""
    config = run.config
    names = [name for name, reward in config.rewards.items() if reward.weight != 0]
    if config.combine.par.enabled:
        prompts = [run.train_prompts[i] for i in prompt_ids(run, run.counters.iteration)]
        scores = shaped(run, scores, prompts, base_units(config.run_dir, names))
        metrics |= {f"reward/{name}_par": scores.mean(name) for name in names}
    elif config.combine.standardise == "reference" and not apart:
        scores = standardised(scores, base_units(config.run_dir, names))
    return scores


def _reward_stats(run: Run, final: Tensor, complete: Tensor, groups: Tensor) -> dict[str, float]:
    """Mean, std and std inside groups of the weighted sum (N,) over the images with all its scores, if there is one."""
    if not complete.any():
        return {}
    present = final[complete].double()
    stats = {"reward/mean": float(present.mean()), "reward/std": float(present.std(correction=0))}
    counts, _, spreads = group_moments(
        final.double().nan_to_num(0.0).unsqueeze(1), complete.unsqueeze(1), groups, run.shape.groups
    )
    if (counts > 1).any():
        stats["reward/group_std"] = float(spreads[counts > 1].mean())
    return stats


def enough_scores(run: Run, valid: Tensor, metrics: dict[str, float]) -> bool:
    """Whether an iteration with scores `valid` can be learnt from; counts those that cannot, and stops after three."""
    config = run.config
    missing = 1 - float(valid.double().mean())
    metrics["reward/invalid_fraction"] = missing
    if missing <= config.train.max_invalid_fraction:
        run.counters.invalid_iterations = 0
        return True
    run.counters.invalid_iterations += 1
    run.warn_once("invalid", f"{missing:.0%} of the scores are missing; such iterations are skipped")
    if run.counters.invalid_iterations >= 3:
        raise UserError(
            f"three iterations in a row lacked over {config.train.max_invalid_fraction:.0%} of their scores"
        )
    return False


def _advantages(
    run: Run,
    step_rewards: Tensor,
    known: Tensor,
    groups: Tensor,
    metrics: dict[str, float],
    confidence: Confidence | None,
) -> tuple[Tensor, float]:
    """Advantages (N, S), and the share of samples or groups whose rewards have no spread."""
    config, iteration = run.config.advantage, run.counters.iteration
    if config.baseline == "group":
        everyone = torch.ones(len(groups), dtype=torch.bool)  # a missing score is NaN in the step rewards that need it
        if confidence is None:
            advantages, stats = group_advantages(step_rewards, everyone, groups, config)
            return advantages, stats["zero_spread_fraction"]
        unclipped = dataclasses.replace(config, clip=math.inf)  # what is clipped is weighted
        advantages, stats = group_advantages(step_rewards, everyone, groups, unclipped, *confidence.statistics())
        weighted = confidence.applied(advantages.double()).clamp(-config.clip, config.clip)
        return weighted.float(), stats["zero_spread_fraction"]
    ids = prompt_ids(run, iteration)
    prompts = [ids[int(g)] for g in groups]
    rewards = step_rewards[:, -1]
    run.history = remember(run.history, rewards, known, prompts, iteration, config.history)
    column, stats = history_advantages(rewards, known, prompts, run.history, config.history, config.eps, config.clip)
    metrics["train/history_fraction"] = stats["history_fraction"]
    return column.unsqueeze(1).expand(-1, step_rewards.shape[1]), stats["zero_spread_fraction"]
