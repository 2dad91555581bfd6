"""The trust of a run: what its rewards are told of the base model, and the confidence in each iteration's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.credit_stats import mean_rank_correlation
from align.errors import UserError
from align.scoring import Scores, component_key, gather_scores, reward_batch, uncertainty_key
from align.tracking import write_json
from align.uncertainty import PAST, WARM_UP, Confidence, DoubtfulLoss, confidence, effective_size
from rewards.base import Reward, RewardError, onloaded
from rewards.ensemble import EnsembleReward
from rewards.uncertainty import (
    most_suspicious,
    next_fraction,
    normalised,
    quantiles,
    rank_disagreement,
    reference_statistics,
    step_trust,
    trust,
)
from samplers.noise import keyed_generator

if TYPE_CHECKING:
    from align.evaluate import Evaluation
    from align.run import Run

FILE = "uncertainty.json"
_SHUFFLE_STREAM = 0x73687566
_OF_THE_BASE = ("rewards", "quantiles", "units", "levels")


def fit_rewards(run: Run, images: Tensor, mine: Sequence[int]) -> None:
    """Tell rewards that wait for it how the base model's images score.

    images: (n, 3, H, W) of this process, of the held-out prompts `mine`. Raises: RewardFailure or RewardError, on all
    processes, if a reward cannot judge them.
    """
    waiting = {name: reward for name, reward in run.rewards.items() if reward.needs_reference}
    if not waiting:
        return
    local: dict[str, Tensor] | RewardError = {}
    try:
        if mine:
            batch = reward_batch(images, [run.eval_prompts[i] for i in mine], list(mine), -1)
            with onloaded(waiting.values()):
                local = {
                    component_key(name, key): scores.float().cpu()
                    for name, reward in waiting.items()
                    for key, scores in reward.reference_scores(batch).items()
                }
    except RewardError as problem:
        local = problem
    found = gather_scores(run.accelerator, local, [], list(mine), len(run.eval_prompts), required=False).extras
    for name in waiting:
        start = component_key(name, "")
        parts = {key.removeprefix(start): values for key, values in found.items() if key.startswith(start)}
        run.trust.rewards[name] = reference_statistics(parts)
    tell_rewards(run)


def tell_rewards(run: Run) -> None:
    """Give rewards the statistics that the run has of them."""
    for name, statistics in run.trust.rewards.items():
        if name in run.rewards:
            run.rewards[name].use_reference(statistics)


def settle(run: Run, base: Evaluation) -> None:
    """Fix quantiles of the uncertainties that rewards gave of the base model's images, and write the run's file.

    Raises: UserError if none of the rewards that should has an uncertainty.
    """
    state, config = run.trust, run.config.uncertainty
    for name in run.rewards:
        found = quantiles(base.scores.extras.get(uncertainty_key(name), torch.zeros(0)))
        if found is not None and _native(name) not in state.quantiles:
            state.quantiles[_native(name)] = list(found)
            state.levels[name] = float(base.scores.extras[uncertainty_key(name)].double().nanmean())
            state.units[name] = float(base.scores.values[name].double()[base.scores.valid[name]].std(correction=0))
    if config.mode != "off" and "native" in config.sources:
        names = config.native_of or [n for n, reward in run.config.rewards.items() if reward.weight != 0]
        blind = [name for name in names if _native(name) not in state.quantiles]
        if len(blind) == len(names) or (config.native_of and blind):
            raise UserError(
                f"uncertainty.sources: native, and {', '.join(blind)} says nothing of how sure it is; use an ensemble, or "
                "rank_disagreement"
            )
    path = run.config.run_dir / FILE
    if run.main and (state.rewards or state.quantiles) and (run.counters.iteration == 0 or not path.is_file()):
        write_json(path, {key: getattr(state, key) for key in _OF_THE_BASE})


def use_stored(rewards: dict[str, Reward], folder: Path) -> None:
    """Give rewards outside of training the statistics in the run's `folder`, if it has some."""
    import json

    path = folder / FILE
    stored = json.loads(path.read_text(encoding="utf-8"))["rewards"] if path.is_file() else {}
    for name, reward in rewards.items():
        if reward.needs_reference and name in stored:
            reward.use_reference(stored[name])


@dataclass
class Doubts:
    """What the uncertainty of N samples leads to."""

    confidence: Confidence | None = None
    """Mode weight."""
    gated: Tensor | None = None
    """Mode gate_kl: (N,) bool, the samples with a penalty towards the base."""
    steps: Tensor | None = None
    """Mode weight with `per_step`: (N, S) float64, factors of the losses of the steps."""


def doubts(
    run: Run,
    scores: Scores,
    final: Tensor,
    known: Tensor,
    groups: Tensor,
    metrics: dict[str, float],
    steps: Sequence[int] = (),
) -> Doubts:
    """Confidence in the samples of this iteration; moves the run's trust on and adds metrics.

    Args:
        scores: raw, of all N samples.
        final: (N,) what is optimised, the weighted sum of the rewards of the final image, NaN where one is missing.
        known: (N,) bool, the samples that are trained: with rewards apart, also those that lack some of them.
        groups: (N,) integers.
        steps: the S stochastic steps, if `scores` has a column for the state before each.
    """
    config = run.config.uncertainty
    if config.mode == "off":
        return Doubts()
    gate = config.mode == "gate_kl"
    levels = []
    for source, values in _sources(run, scores, final, groups).items():
        present = values[~values.isnan()]
        if len(present):
            metrics[f"uncertainty/{source}"] = float(present.mean())
        # ranks have a scale of their own, on which 0 is agreement
        low, high = (0.0, 1.0) if gate and source == "rank_disagreement" else _scale(run, source, values)
        levels.append(normalised(values, low, high, float("inf") if gate else config.u_max))
    uncertainty = torch.stack(levels).amax(dim=0)
    if known.any():
        some = uncertainty[known]
        metrics["uncertainty/mean"] = float(some.mean())
        metrics["uncertainty/q90"] = float(torch.quantile(some, 0.9))
    correlation = mean_rank_correlation(uncertainty, final.double(), groups)
    if correlation is not None:
        metrics["uncertainty/corr_reward"] = correlation
    if gate:
        return Doubts(gated=_gate(run, torch.where(known, uncertainty, 0.0), metrics))
    order = torch.arange(len(uncertainty))
    if config.shuffled:
        key = keyed_generator(
            seed=run.config.train.seed, iteration=run.counters.iteration, step=0, stream=_SHUFFLE_STREAM
        )
        order = torch.from_numpy(key.permutation(len(uncertainty)))
    uncertainty = uncertainty[order]
    found = confidence(uncertainty, known, groups, config)
    if known.any():
        some = found.weights[known]
        metrics["uncertainty/frac_floor"] = float((some <= config.w_min).double().mean())
        metrics["weight/ess"] = effective_size(some)
    factors = _by_step(run, scores, steps, metrics) if config.per_step else None
    return Doubts(found, steps=None if factors is None else factors[order])


def doubtful_losses(run: Run) -> dict[str, DoubtfulLoss]:
    """Mode weight with reward_gradient: by reward, how its loss follows its uncertainty; empty in other modes."""
    config, state = run.config.uncertainty, run.trust
    if config.mode != "weight":
        return {}
    names = config.native_of or [name for name, reward in run.config.rewards.items() if reward.weight != 0]
    found = {}
    for name in names:
        if _native(name) in state.quantiles:
            low, high = state.quantiles[_native(name)]
            found[name] = DoubtfulLoss(config, low, high, state.units[name])
    return found


def doubtful_metrics(run: Run, extras: Mapping[str, Tensor]) -> dict[str, float]:
    """Level of the uncertainties (N,) that weighted the losses of an iteration of reward_gradient, and their weights."""
    levels, weights, config = [], [], run.config.uncertainty
    for name, loss in doubtful_losses(run).items():
        values = extras.get(uncertainty_key(name), torch.zeros(0))
        level = loss.level(values[~values.isnan()].double())
        levels.append(level)
        weights.append(trust(level, config.kappa, config.w_min))
    if not sum(len(level) for level in levels):
        return {}
    return {
        "uncertainty/mean": float(torch.cat(levels).mean()),
        "uncertainty/q90": float(torch.quantile(torch.cat(levels), 0.9)),
        "uncertainty/frac_floor": float((torch.cat(weights) <= config.w_min).double().mean()),
        "weight/ess": effective_size(torch.cat(weights)),
    }


def ensemble_spread(run: Run, extras: Mapping[str, Tensor]) -> dict[str, float]:
    """`ensemble/std_mean`: mean std over the members of the run's ensembles on the final images."""
    levels = []
    for name in run.config.rewards:
        values = extras.get(uncertainty_key(name))
        if values is None or not isinstance(run.rewards[name], EnsembleReward):
            continue
        final = values if values.ndim == 1 else values[:, -1]
        levels.append(final[~final.isnan()].double())
        if len(levels[-1]) and float(levels[-1].mean()) >= 2 * run.trust.levels.get(name, float("inf")):
            run.warn_once(
                f"spread {name}",
                f"the members of '{name}' disagree twice as much as on the base model's images: its score may mean little "
                "from here on; look at the pictures and at a held-out reward",
            )
    present = torch.cat(levels) if levels else torch.zeros(0)
    return {"ensemble/std_mean": float(present.mean())} if len(present) else {}


def _by_step(run: Run, scores: Scores, steps: Sequence[int], metrics: dict[str, float]) -> Tensor | None:
    """(N, S) factors of steps by the more doubtful of the completions before and after each; None if nothing is known."""
    config, levels = run.config.uncertainty, []
    for name in config.native_of or run.config.rewards:
        values, known = scores.extras.get(uncertainty_key(name)), run.trust.quantiles.get(_native(name))
        if values is not None and known is not None and run.config.rewards[name].weight != 0:
            low, high = known
            levels.append(normalised(values.double(), low, high, config.u_max))
    if not levels:
        return None
    level = torch.stack(levels).amax(dim=0)
    doubt = torch.maximum(level[:, :-1], level[:, 1:])
    for column, step in enumerate(steps):
        metrics[f"uncertainty/step_{step:02d}"] = float(doubt[:, column].mean())
    return step_trust(doubt, config.kappa)


def _native(name: str) -> str:
    return f"native/{name}"


def _sources(run: Run, scores: Scores, final: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Source -> uncertainties (N,) float64, NaN where missing."""
    config, found = run.config.uncertainty, {}
    if "native" in config.sources:
        weighted = [name for name, reward in run.config.rewards.items() if reward.weight != 0]
        for name in config.native_of or weighted:
            values = scores.extras.get(uncertainty_key(name))
            if values is not None:
                found[_native(name)] = (values if values.ndim == 1 else values[:, -1]).double()
            elif _native(name) in run.trust.quantiles:  # of none of these images
                found[_native(name)] = torch.full((len(final),), torch.nan, dtype=torch.float64)
    if "rank_disagreement" in config.sources:
        others = [scores.values[name] for name in config.auxiliaries]
        others = [values if values.ndim == 1 else values[:, -1] for values in others]
        found["rank_disagreement"] = rank_disagreement(final, others, groups).clamp_min(0.0)
    return found


def _scale(run: Run, source: str, values: Tensor) -> tuple[float, float]:
    """Median and 90 % quantile of a source, of the base model's images or of those of the first iterations."""
    state = run.trust
    if source not in state.quantiles:
        pool, present = state.pools.setdefault(source, []), values[~values.isnan()]
        if len(present):
            pool.append(present.tolist())
        low, high = quantiles(torch.tensor([x for part in pool for x in part], dtype=torch.float64)) or (0.0, 1.0)
        if len(pool) < WARM_UP:
            return low, high
        state.quantiles[source] = [low, high]
        del state.pools[source]
    low, high = state.quantiles[source]
    return low, high


def _gate(run: Run, uncertainty: Tensor, metrics: dict[str, float]) -> Tensor:
    """(N,) bool: the samples with a penalty; the share follows the level of the uncertainty."""
    config, state = run.config.uncertainty, run.trust
    fraction = config.gate_fraction if state.gate_fraction is None else state.gate_fraction
    positive = uncertainty[uncertainty > 0]
    if len(positive):
        level = float(positive.mean())
        fraction = next_fraction(fraction, level, state.gate_past, config.gate_min, config.gate_max)
        state.gate_past = [*state.gate_past, level][-PAST:]
    state.gate_fraction = fraction
    gated = most_suspicious(uncertainty, fraction)
    metrics["uncertainty/gate_fraction"] = fraction
    metrics["uncertainty/gated"] = float(gated.double().mean())
    return gated
