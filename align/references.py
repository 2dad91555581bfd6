"""Rewards as preference over the base model's images of the same prompt (PAR, arXiv 2502.18770).

Reference images are made when a prompt first comes up, by the base model in the way of the evaluations, and their scores
are kept in the run's folder: a prompt's references are the same whenever it returns, also in a continued run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from align.collect import passes
from align.evaluate import evaluate
from align.prompts import Prompt
from align.run import Run, deploy_guidance, restore_rng, rng_state
from align.scoring import Scores
from align.tracking import write_json
from rewards.combine import preference

_SEED = 0x504152  # added to the run's, so that references start from other noise than the evaluations
_FILE = "references.json"

Table = dict[str, dict[str, list[float | None]]]
"""prompt -> reward -> scores of its reference images, null where missing."""


def shaped(run: Run, scores: Scores, prompts: Sequence[Prompt], units: Mapping[str, tuple[float, float]]) -> Scores:
    """Scores (N, C) of the rewards in `units` as preference over the references of their prompts, the others as they are.

    Args:
        scores: of all samples, in blocks of `train.group_size` for each of `prompts`.
        prompts: of the iteration, one a group.
        units: see `align.combination.base_units`; the std is the unit of a difference.
    """
    table = _references(run, prompts, list(units))
    values, size = dict(scores.values), run.config.train.group_size
    for name, (_, std) in units.items():
        rows = [[float("nan") if x is None else x for x in table[_key(p)][name]] for p in prompts]
        references = torch.tensor(rows, dtype=torch.float64).repeat_interleave(size, dim=0)
        values[name] = preference(scores.values[name], references, run.config.combine.par.slope / std)
    return Scores(values, {name: scores.valid[name] & ~v.isnan() for name, v in values.items()}, scores.extras)


def _references(run: Run, prompts: Sequence[Prompt], names: list[str]) -> Table:
    """Scores of `prompts`' references, made and stored where they are not yet there; the same on every process."""
    settings = _settings(run, names)
    # one process reads, lest another that sees the file sooner or later takes part in fewer evaluations
    found: list[Any] = [_stored(run.config.run_dir / _FILE, settings) if run.main else None]
    table: Table = broadcast_object_list(found)[0]
    missing = list({_key(p): p for p in prompts if _key(p) not in table}.values())
    if not missing:
        return table
    config, count, before = run.config, run.config.combine.par.images, rng_state()
    images = [prompt for prompt in missing for _ in range(count)]
    judged = evaluate(
        run.model,
        {name: run.rewards[name] for name in names},
        images,
        run.accelerator,
        num_steps=config.eval.num_steps,
        guidance_scale=deploy_guidance(config),
        seed=config.train.seed + _SEED,
        batch_size=config.train.rollout_batch,
        weights=run.model.reference(),
    ).scores
    restore_rng(before)  # whether the references were there already must not change the training
    run.counters.nfe += len(images) * config.eval.num_steps * passes(deploy_guidance(config))
    for i, prompt in enumerate(missing):
        some = slice(i * count, (i + 1) * count)
        table[_key(prompt)] = {
            name: [None if math.isnan(x) else x for x in judged.values[name][some].tolist()] for name in names
        }
    if run.main:
        write_json(run.config.run_dir / _FILE, {"settings": settings, "scores": table})
    return table


def _key(prompt: Prompt) -> str:
    return json.dumps([prompt.text, prompt.metadata], sort_keys=True)


def _settings(run: Run, names: list[str]) -> dict[str, Any]:
    """All that references depend on but their prompt, as JSON has it."""
    config = run.config
    rewards = {name: dataclasses.asdict(config.rewards[name]) | {"weight": 1} for name in names}
    for reward in rewards.values():
        del reward["offload"]  # scores are the same
    settings = {
        "rewards": rewards,
        "images": config.combine.par.images,
        "num_steps": config.eval.num_steps,
        "guidance_scale": deploy_guidance(config),
        "seed": config.train.seed,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _stored(path: Path, settings: dict[str, Any]) -> Table:
    """References in the file at `path`, none if they were made with other settings or it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    scores: Table = data["scores"] if data.get("settings") == settings else {}
    return scores
