"""Metrics of a run: metrics.jsonl always, other trackers through Accelerate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from align.runfolder import metric_rows


def write_json(path: Path, data: Any) -> None:
    """Write JSON beside and rename, so that a reader or a crash never sees half a file. NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(_finite(data), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


class Tracker:
    """Appends rows to metrics.jsonl on the main process and forwards them to the configured trackers."""

    def __init__(self, run_dir: Path, accelerator: Accelerator, resume_from: int, complete: bool = False) -> None:
        """`resume_from`: first iteration that will be run; rows at or after it (of a killed run) are dropped.

        `complete`: no iteration is left, only the final evaluation, whose row is dropped too if it was written before.
        """
        self.path = run_dir / "metrics.jsonl"
        self.accelerator = accelerator
        if not accelerator.is_main_process:
            return
        kept = (
            [r for r in metric_rows(self.path)[0] if _precedes(r, resume_from, complete)] if self.path.is_file() else []
        )
        temporary = self.path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def log(self, kind: str, iteration: int, values: Mapping[str, float]) -> None:
        """Add one row. `iteration` counts iterations done for eval rows and is the iteration's index for train rows."""
        if self.accelerator.is_main_process:
            row = _finite({"kind": kind, "iteration": iteration, **values})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self.accelerator.log(numbers, step=iteration)


def _precedes(row: Mapping[str, Any], resume_from: int, complete: bool) -> bool:
    # an eval row at i describes the weights after i iterations; the checkpoint of i iterations is written after it
    done = row["kind"] == "eval" and row["iteration"] == resume_from > 0 and not complete
    return row["iteration"] < resume_from or done
