"""What a run wrote, read back: whole runs, running ones, and ones killed in the middle of a line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import UserError

MARKS = ("metrics.jsonl", "config.yaml", "summary.json")
NAN = float("nan")


@dataclass
class RunFolder:
    """The files of one run; what is absent is None or empty, and `notes` says in words what is missing or broken."""

    path: Path
    config: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    base: dict[str, Any] | None = None
    tuned: dict[str, Any] | None = None
    grids: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(run_dir: Path | str, only: str | None = None) -> RunFolder:
    """Read a run's folder. UserError if it does not exist or holds none of the files that make it one.

    only: the one kind of metrics that is wanted, "train" or "eval"; without the other a long run is read much faster.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: pass the folder of a run, such as outputs/demo")
    if not any((path / name).is_file() for name in MARKS):
        raise UserError(f"{path} is not the folder of a run: it holds none of {', '.join(MARKS)}")
    run = RunFolder(path)
    run.config = _read_text(path / "config.yaml", run.notes)
    run.environment = _read_json(path / "environment.json", run.notes) or {}
    run.summary = _read_json(path / "summary.json", run.notes)
    rows, problems = metric_rows(path / "metrics.jsonl", only)
    run.notes += problems
    run.train = [row for row in rows if row.get("kind") == "train"]
    run.evals = [row for row in rows if row.get("kind") == "eval"]
    run.base = _read_json(path / "eval" / "base.json", run.notes)
    run.tuned = _read_json(path / "eval" / "tuned.json", run.notes)
    run.grids = sorted((path / "grids").glob("*.png"), key=_natural)
    if not run.grids:
        run.notes.append("grids/*.png is not there")
    return run


def parse_config(text: str | None) -> dict[str, Any]:
    """A run's config.yaml as plain data; empty if it is missing or broken."""
    try:
        config = yaml.safe_load(text or "")
    except yaml.YAMLError:
        return {}
    return config if isinstance(config, dict) else {}


def metric_rows(path: Path, only: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a metrics.jsonl and what was wrong with it, in words.

    A line that is no JSON object is skipped; the last one without a word, since a killed run leaves it so. Where a
    resumed run wrote an iteration again, its last row counts. `only`: of this kind.
    """
    text = _read_text(path, notes := [])
    rows: dict[tuple[Any, Any], dict[str, Any]] = {}
    lines = (text or "").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (only and f'"{only}"' not in line):  # most lines are not worth parsing then
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not math.isfinite(number_of(row.get("iteration"))):
            if number < len(lines):
                notes.append(f"{path.name} line {number} cannot be read and is left out")
            continue
        rows.pop((row.get("kind"), row["iteration"]), None)
        rows[row.get("kind"), row["iteration"]] = row
    return sorted(rows.values(), key=lambda row: row["iteration"]), notes


def number_of(value: Any) -> float:
    """A float; NaN for anything that is no number (None, text, a truth value)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else NAN


def column(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """One metric over `rows`, NaN where a row lacks it."""
    return [number_of(row.get(key)) for row in rows]


def _read_text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{path.name} is not there")
    except OSError as problem:
        notes.append(f"{path.name} cannot be read ({problem.strerror})")
    return None


def _read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    name = f"{path.parent.name}/{path.name}" if path.parent.name == "eval" else path.name
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{name} is not there")
    except (OSError, ValueError):
        notes.append(f"{name} cannot be read")
    else:
        if isinstance(value, dict):
            return value
        notes.append(f"{name} holds no JSON object")
    return None


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Sort key in which iteration-9 comes before iteration-10."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in re.split(r"(\d+)", path.name) if p]
