"""What every evaluation during a run leaves behind: the scores of its prompts and a few small pictures of them.

Prompts and noise are the same each time, so scores of two evaluations are compared prompt by prompt, and pictures side
by side.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from align.grids import as_image
from align.hacking import Point
from align.runfolder import RunFolder, number_of, parse_config

if TYPE_CHECKING:  # a report loads no model
    from align.evaluate import Evaluation

LONGEST_SIDE = 256
"""Of a kept picture, in pixels; larger ones are reduced."""
SETTINGS = ("num_steps", "guidance_scale", "seed")
"""What scores of a prompt depend on besides the weights; a continued run may change it."""
_LOSSLESS = 128


def keep_snapshot(run_dir: Path, iteration: int, evaluation: Evaluation, prompts: int, pictures: int) -> None:
    """Write eval/iteration-NNNNNN.json and samples/iteration-NNNNNN/NNNN.webp of the first `prompts` and `pictures`."""
    from align.tracking import write_json

    scores = {name: [float(x) for x in values[:prompts]] for name, values in evaluation.scores.values.items()}
    settings = {key: getattr(evaluation, key) for key in SETTINGS}
    write_json(_scores_file(run_dir, iteration), {**settings, "scores": scores})
    for i, tensor in enumerate(evaluation.images[:pictures]):
        image = as_image(tensor)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        _save_webp(image, _pictures_folder(run_dir, iteration) / f"{i:04d}.webp")


def kept_pictures(run_dir: Path, iteration: int) -> list[Path]:
    """Pictures of an evaluation, in the order of the prompts; those of the base at iteration 0. Empty if there are none."""
    folder = run_dir / "samples" / "base" if iteration == 0 else _pictures_folder(run_dir, iteration)
    return sorted(p for p in folder.glob("*") if p.suffix in (".webp", ".png") and not p.name.startswith("."))


def points(run: RunFolder) -> list[Point]:
    """The evaluations of a run in order, the base's first; empty if the base was not evaluated during the run.

    Those that are known to have been made with other settings than eval/base.json, which a continued run writes again, are
    left out: a level at fewer steps is no change of the model.
    """
    rewards = sorted(
        {k.removeprefix("eval/") for row in run.evals for k in row if k.startswith("eval/") and not k.endswith("_ci95")}
    )
    settings = {key: (run.base or {}).get(key) for key in SETTINGS}
    found = []
    for row in run.evals:
        iteration = int(row["iteration"])
        kept = _read_scores(run.path, iteration) if iteration else None
        if kept is not None and any(kept.get(key) != value for key, value in settings.items()):
            continue
        means = {name: number_of(row.get(f"eval/{name}")) for name in rewards}
        half_widths = {name: number_of(row.get(f"eval/{name}_ci95")) for name in rewards}
        found.append(Point(iteration, means, half_widths, _table((kept or {}).get("scores"))))
    if not found or found[0].iteration != 0:
        return []
    base, during = _table((run.base or {}).get("scores")), _during(run)
    if len(found) > 1 and found[-1].scores:  # base.json is about all prompts, of which the others have the first
        counts = {name: len(values) for name, values in found[-1].scores.items()}
    else:
        counts = dict.fromkeys(base, during)
    cut = {name: values[: counts.get(name, 0)] for name, values in base.items()}
    # as base.json says, which is newer than the row of a run that was continued with other settings
    means = {name: float(np.nanmean(v)) for name, v in cut.items() if any(map(math.isfinite, v))}
    found[0] = Point(
        0, {**found[0].means, **{n: m for n, m in means.items() if n in rewards}}, found[0].half_widths, cut
    )
    return found


def _during(run: RunFolder) -> int:
    """eval.during; 0 where the configuration does not say."""
    section = parse_config(run.config).get("eval")
    value = number_of(section.get("during")) if isinstance(section, Mapping) else math.nan
    return int(value) if value > 0 else 0


def base_std(run: RunFolder) -> dict[str, float]:
    """Reward -> population std of the base model's held-out scores, of the rewards whose scores differ."""
    units = {}
    for name, values in _table((run.base or {}).get("scores")).items():
        present = np.array([v for v in values if math.isfinite(v)])
        if len(present) and float(present.std()) > 1e-12 * max(1.0, float(np.abs(present).max())):
            units[name] = float(present.std())
    return units


def _scores_file(run_dir: Path, iteration: int) -> Path:
    return run_dir / "eval" / f"iteration-{iteration:06d}.json"


def _pictures_folder(run_dir: Path, iteration: int) -> Path:
    return run_dir / "samples" / f"iteration-{iteration:06d}"


def _read_scores(run_dir: Path, iteration: int) -> Mapping[str, object] | None:
    """What `keep_snapshot` wrote of an evaluation; None if it is not there: a run of before, or a damaged file."""
    try:
        data = json.loads(_scores_file(run_dir, iteration).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, Mapping) else None


def _table(scores: object) -> dict[str, list[float]]:
    if not isinstance(scores, Mapping):
        return {}
    return {str(k): [number_of(x) for x in v] for k, v in scores.items() if isinstance(v, list)}


def _save_webp(image: Image.Image, path: Path) -> None:
    """Whole or not at all. Small pictures lose nothing: there every pixel is to be seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(beside, format="WEBP", lossless=max(image.size) <= _LOSSLESS, quality=90)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
