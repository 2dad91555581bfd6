"""A user's path: a reward in a file of their own is checked, served, and trained together with CLIPScore."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import httpx
import pytest
from PIL import Image

from align.runfolder import metric_rows

pytestmark = pytest.mark.e2e

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
REWARD = """
    from rewards import Reward, RewardOutput

    class Warmth(Reward):
        uses_prompt = False
        differentiable = True

        def __init__(self, strength=1.0):
            self.strength = strength

        def score(self, batch):
            red, green, blue = batch.images.mean(dim=(2, 3)).unbind(1)
            return RewardOutput(self.strength * (red - blue).float(), components={"green": green.float()})
"""


def align(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.fixture
def service(tmp_path):
    """The address of the reward, served by the command from a second process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "align.cli", "serve-reward", "warmth.py:Warmth", "--port", str(port)]
    with subprocess.Popen([*command, "--arg", "strength=2"], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                httpx.get(f"{url}/health").raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_reward_of_ones_own_is_checked_served_and_trained_beside_clip(tmp_path, write_config, train_here, request):
    (tmp_path / "warmth.py").write_text(textwrap.dedent(REWARD))
    checked = align("score", "--check", "warmth.py:Warmth", "--arg", "strength=2", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    assert "0 failed" in checked.stdout
    url = request.getfixturevalue("service")
    rewards = {
        "warm": {"type": "remote", "args": {"url": url}},
        "clip": {"type": "clip", "args": {"config": TINY_CLIP, "pretrained": "random"}},
    }
    config = write_config(tmp_path, "nft", {"rewards": rewards, "train": {"iterations": 2}, "eval": {"every": 1}})
    summary = train_here(config)
    assert summary is not None
    rows = metric_rows(config.parent / "run" / "metrics.jsonl")[0]
    trained = [row for row in rows if row["kind"] == "train"]
    for row in trained:
        assert row["reward/invalid_fraction"] == 0
        assert row["advantage/warm_share"] + row["advantage/clip_share"] == pytest.approx(1)
    assert trained[0]["reward/warm"] != trained[0]["reward/clip"]
    assert all({"eval/warm", "eval/clip"} <= row.keys() for row in rows if row["kind"] == "eval")
    assert summary["tuned"].keys() == summary["delta_ci95"].keys() == {"warm", "clip"}
    report = (config.parent / "run" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"warm\b", report)
    assert re.search(r"clip\b", report)
    with Image.open(summary["grid"]) as grid:
        assert min(grid.size) > 200
