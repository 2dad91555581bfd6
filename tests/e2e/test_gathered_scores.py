"""Scores that several processes hold in parts are one table on all of them, and so is a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("gathered_scores.py"))


@pytest.mark.e2e
@pytest.mark.slow
def test_one_two_and_four_processes_form_the_same_advantages_and_stop_together(tmp_path):
    """Groups of four lie across processes, one sample and one whole group have no score, and the last process fails."""
    done = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sets = {n: [json.loads((tmp_path / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in (1, 2, 4)}
    advantages = sets[1][0]["advantages"]
    assert advantages[3] == 0
    assert advantages[8:12] == [0] * 4
    assert abs(sum(advantages[:3])) < 1e-5
    assert len({round(x, 4) for x in advantages}) == 20  # 19 scores that differ, and 0
    weighted = sets[1][0]["weighted"]
    assert weighted[8:12] == [0] * 4
    assert max(abs(sum(weighted[4 * g : 4 * g + 4])) for g in range(6)) < 1e-5
    assert max(abs(a - b) for a, b in zip(weighted, advantages, strict=True)) > 0.1
    for processes, found in sets.items():
        assert sorted(i for one in found for i in one["mine"]) == list(range(24))
        assert all(one["advantages"] == advantages and one["weighted"] == weighted for one in found)
        told = ["a reward failed on another process"] * (processes - 1) + ["reward 'f' failed: no such file"]
        assert [one["words"] for one in found] == told
