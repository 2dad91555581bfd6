"""Strengths of an adapter (`--scales`) and mixtures of several (`--mix`) beside the base, in `align grid` and `eval`.

An adapter adds an update to the base's weights. Less of it, or the sum of updates that were trained for different
rewards, are remedies against over-optimisation that need no further training (DRaFT, arXiv 2309.17400).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.checkpoint import checkpoints
from align.compare import STYLES, change_text
from align.compare_runs import BASE, labels
from align.errors import UserError
from align.evaluate import Evaluation, paired_interval
from align.grids import format_score
from align.inference import Setup, Share
from align.report import Score
from align.schema import nearest
from align.tracking import write_json
from align.train import save_comparison

WEIGHTS = "pytorch_lora_weights.safetensors"
ROOM = 36
"""Characters that a mean with its gain takes on one line, with the space around."""


@dataclass(frozen=True)
class Column:
    """One set of weights: the base with the updates of `shares` added."""

    label: str
    """What the grid and the table call it."""
    file: str
    """Where `align eval` writes its scores."""
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Sweep:
    """Which columns a command shows beside the base."""

    scale: float
    """Strength of the target's own adapter where `scales` are not given."""
    scales: tuple[float, ...] | None
    """Strengths of that adapter, without 0, which is the base."""
    mixes: tuple[tuple[Share, ...], ...]
    """Further columns: what each adds up."""

    @property
    def given(self) -> bool:
        """Whether more than base and tuned is asked for."""
        return self.scales is not None or bool(self.mixes)


def read_sweep(scale: float | None, scales: str | None, mixes: Sequence[str] | None) -> Sweep:
    """What `--scale`, `--scales` and every `--mix` say, each column once.

    Raises: UserError if one cannot be read, an adapter is not there, or --scale and --scales are both given.
    """
    shares = tuple(tuple(_share(part, text) for part in text.split(",")) for text in mixes or ())
    if scales is None:
        return Sweep(1.0 if scale is None else scale, None, shares)
    if scale is not None:
        raise UserError("--scale is one strength and --scales are several: give one of the two")
    numbers = [_number(word) for word in scales.split(",")]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--scales: '{scales}' is not a list of finite numbers; for example --scales 0,0.5,1")
    return Sweep(1.0, tuple(number for number in dict.fromkeys(numbers) if number), shares)


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _share(part: str, text: str) -> Share:
    folder, _, word = part.strip().rpartition(":")
    strength = _number(word)
    if not folder or not math.isfinite(strength):
        raise UserError(
            f"--mix: '{text}' is not a list of FOLDER:STRENGTH; for example --mix outputs/a:0.5,outputs/b:0.5"
        )
    return Share(_adapter_of(Path(folder)), strength)


def _adapter_of(folder: Path) -> Path:
    """The adapter of a run's folder, or `folder` where it is one itself."""
    for place in (folder / "adapter", folder):
        if (place / WEIGHTS).is_file():
            return place
    if not folder.is_dir():
        near = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"--mix: there is no run or adapter folder {folder}{nearest(folder.name, near)}")
    saved = checkpoints(folder)
    hint = f"; take a checkpoint's: {saved[-1] / 'adapter'}" if saved else ""
    raise UserError(f"--mix: {folder} has no {WEIGHTS}, nor has its adapter/{hint}")


def sweep_columns(sweep: Sweep, setup: Setup) -> list[Column]:
    """The columns beside the base: the adapter of `setup` at its strengths, then the mixtures.

    Without `scales` the first is that adapter as it is loaded, if there is one. Raises: UserError if there is no adapter
    to scale.
    """
    found: list[Column] = []
    if sweep.scales is not None:
        if setup.adapter is None:
            raise UserError("--scales: a base model has no adapter to scale; give a run's folder, or --adapter FOLDER")
        # no space, which the label of a mixture always has: the two are never the same
        found = [Column(f"scale={n:.15g}", f"scale-{n:.15g}.json", (Share(setup.adapter, n),)) for n in sweep.scales]
    elif setup.adapter is not None:
        found = [Column("tuned", "tuned.json", (Share(setup.adapter, sweep.scale),))]
    names = _names([share.folder for shares in sweep.mixes for share in shares])
    mixes = {" + ".join(f"{names[s.folder]} {s.strength:.15g}" for s in shares): shares for shares in sweep.mixes}
    return found + [Column(label, f"mix-{i}.json", shares) for i, (label, shares) in enumerate(mixes.items(), 1)]


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """What each adapter is called: its run's or checkpoint's folder, with parents where two would be called the same."""
    shown = {folder: folder.parent if folder.name == "adapter" else folder for folder in folders}
    distinct = list({folder.resolve(): None for folder in shown.values()})
    named = dict(zip(distinct, labels(distinct), strict=True))
    return {folder: named[run.resolve()] for folder, run in shown.items()}


def save_sweep(
    folder: Path, evaluations: Mapping[str, Evaluation], columns: Sequence[Column], rows: int
) -> dict[str, Any]:
    """Write each column's scores, grid.png of the first `rows` prompts and summary.json to `folder`.

    `evaluations`: label -> evaluation, of the base and of `columns`. Returns the summary: of each column its adapters,
    mean and, but for the base, the 95 % interval of its paired difference to the base, per reward.
    """
    base = evaluations[BASE].scores
    found: dict[str, Any] = {}
    for column in [Column(BASE, f"{BASE}.json", ()), *columns]:
        evaluation = evaluations[column.label]
        made_of = [{"folder": str(share.folder), "strength": share.strength} for share in column.shares]
        write_json(folder / column.file, {**evaluation.to_json(), "adapters": made_of})
        found[column.label] = {
            "adapters": made_of,
            "mean": {name: evaluation.scores.mean(name) for name in base.values},
            "delta_ci95": {
                name: paired_interval(values, evaluation.scores.values[name])
                for name, values in base.values.items()
                if column.shares
            },
            "scores": column.file,
        }
    grid = save_comparison(folder / "grid.png", dict(evaluations), rows)
    summary = {"columns": found, "grid": str(grid), "report": str(folder)}
    write_json(folder / "summary.json", summary)
    return summary


def print_sweep(summary: Mapping[str, Any], prompts: int, console: Console) -> None:
    """A row a column of the sweep, a column a reward: its mean, the highest in bold, and its gain over the base."""
    columns: dict[str, Any] = summary["columns"]
    base: dict[str, float] = columns[BASE]["mean"]
    table = Table(
        title=f"held-out, {prompts} prompts, same noise",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for reward in base:
        table.add_column(Text.assemble(reward, ("\nmean, gain, 95 %", "dim")), overflow="fold")
    between = "  " if console.width >= ROOM * (len(base) + 1) else "\n"
    best = {
        reward: format_score(max(filter(math.isfinite, (c["mean"][reward] for c in columns.values())), default=None))
        for reward in base
    }
    for label, column in columns.items():
        cells = []
        for reward, mean in column["mean"].items():
            written = format_score(mean)
            cells.append(Text.assemble((written, "bold" if written == best[reward] else "")))
            if label != BASE:
                low, high = column["delta_ci95"][reward]
                score = Score(reward, base[reward], mean, low, high, prompts)
                cells[-1].append(f"{between}{change_text(score)}", STYLES[score.verdict])
        table.add_row(Text(label), *cells)
    console.print(table)
    for key in ("grid", "report"):
        console.print(f"{key:8}{summary[key]}", markup=False, highlight=False, soft_wrap=True)
