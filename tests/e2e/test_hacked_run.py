"""A run whose watched reward is the trained one turned round: it is warned once, and its report names the way back."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from align.config import load_config
from align.runfolder import metric_rows
from align.train import train

pytestmark = pytest.mark.e2e


def test_a_run_that_is_hacked_says_so_once_while_it_goes_on(on_cpu, write_config, tmp_path: Path):
    (tmp_path / "dark.py").write_text("def score(images, prompts, metadata):\n    return -images.mean(dim=(1, 2, 3))\n")
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(f"a red circle, number {i}" for i in range(12)))
    changes = {
        "rewards": {"bright": {"type": "brightness"}},
        "eval_rewards": {"dark": {"type": f"{tmp_path / 'dark.py'}:score"}},
        "optim": {"lr": 1e-2, "max_grad_norm": 1.0, "ema_decay": 0.0, "warmup_updates": 0},
        "train": {"iterations": 5},
        "eval": {"every": 1, "during": 12, "prompts": 12},
        "checkpoint": {"every": 1, "keep": 2},
    }
    config = load_config(write_config(tmp_path, "draft_k", changes), [f"prompts.eval={prompts}"])
    said = io.StringIO()
    assert train(config, Console(file=said, width=400)) is not None
    rows = [row for row in metric_rows(config.run_dir / "metrics.jsonl")[0] if row["kind"] == "eval"]
    rise = [row.get("hacking/optimised", 0.0) for row in rows]
    assert rise[-1] > 0.25
    # one is the other turned round, and so are their changes in units of the same std
    assert [row.get("hacking/held_out", 0.0) for row in rows] == pytest.approx([-r for r in rise], abs=1e-4)
    assert said.getvalue().count("the reward is being hacked") == 1
    report = (config.run_dir / "report.html").read_text()
    assert "Hacked from the start" in report
    assert "Use the base model" in report
    assert "Pictures before and after" in report
