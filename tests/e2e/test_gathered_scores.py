"""Scores that several processes hold in parts are one table on all of them, and so is a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("gathered_scores.py"))


def launched(processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each process found; a process that waits for another for ever fails the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, SCRIPT, str(folder)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.e2e
@pytest.mark.slow
def test_one_two_and_four_processes_form_the_same_advantages_and_stop_together(tmp_path):
    """Groups of four lie across processes, one sample and one whole group have no score, only the last process has
    uncertainties, and in the end it fails."""
    (alone,) = launched(1, tmp_path)
    assert sorted(alone["mine"]) == list(range(24))
    advantages = alone["advantages"]
    assert advantages[3] == 0
    assert advantages[8:12] == [0] * 4
    assert abs(sum(advantages[:3])) < 1e-5
    assert len({round(x, 4) for x in advantages}) == 20  # 19 scores that differ, and 0
    for processes in (2, 4):
        found = launched(processes, tmp_path)
        assert sorted(i for one in found for i in one["mine"]) == list(range(24))
        assert all(one["advantages"] == advantages for one in found)
        told = ["a reward failed on another process"] * (processes - 1) + ["reward 'f' failed: no such file"]
        assert [one["words"] for one in found] == told
        said = [x if i in found[-1]["mine"] else None for i, x in enumerate(alone["doubts"])]
        assert all(one["doubts"] == said for one in found)
