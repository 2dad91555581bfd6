"""`align compare` as a person types it: two short runs, trained and compared by the real commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

CONFIG = """\
preset: [playground, nft]
model: {precision: fp32}
sampler: {num_steps: 3}
objective: {times_per_sample: 1}
eval_rewards: {size: {type: jpeg}}
train: {iterations: 1, prompts_per_iteration: 2, group_size: 2, micro_batch: 4, rollout_batch: 4}
eval: {every: 0, prompts: 4, during: 2, num_steps: 2, grid_prompts: 2}
trackers: []
"""

pytestmark = pytest.mark.e2e


def align(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_two_runs_are_trained_and_compared(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    for name, lr in (("slow", "1e-4"), ("fast", "1e-2")):
        made = align(tmp_path, "train", "tiny.yaml", f"name={name}", f"optim.lr={lr}")
        assert made.returncode == 0, made.stdout + made.stderr

    done = align(tmp_path, "compare", "outputs/slow", "outputs/fast", "--rows", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "outputs" / "compare-slow-fast"
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json", "curves.png", "grid.png"]
    for name in ("curves.png", "grid.png"):
        assert f"outputs/compare-slow-fast/{name}" in done.stdout
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 500

    rows = json.loads((out / "compare.json").read_text())["rows"]
    runs = {(row["run"], row["reward"]): row for row in rows if row["kind"] == "run"}
    assert set(runs) == {(run, reward) for run in ("slow", "fast") for reward in ("verifier", "size")}
    for (run, reward), row in runs.items():
        summary = json.loads((tmp_path / "outputs" / run / "summary.json").read_text())
        assert [row["base"], row["tuned"]] == [summary["base"][reward], summary["tuned"][reward]]
        assert [row["ci95_low"], row["ci95_high"]] == summary["delta_ci95"][reward]
        assert (row["iterations"], row["nfe"]) == (1, summary["nfe"])
    (pair,) = (row for row in rows if row["kind"] == "pair" and row["reward"] == "size")
    assert (pair["run"], pair["against"], pair["n"]) == ("fast", "slow", 4)
    # kB of a JPEG with float32 means in the summaries: 1e-5 is their rounding
    assert pair["delta"] == pytest.approx(runs["fast", "size"]["tuned"] - runs["slow", "size"]["tuned"], abs=1e-5)

    refused = align(tmp_path, "compare", "outputs/slow", "outputs/fats")
    assert refused.returncode == 1
    assert "error: outputs/fats is not the folder of a run (did you mean 'outputs/fast'?)" in refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr
