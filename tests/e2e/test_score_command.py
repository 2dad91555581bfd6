"""`align score`: files in, table and JSON out; the check of one's own reward; and how mistakes are told."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from align.cli import app

pytestmark = pytest.mark.e2e

REWARDS = """
    import torch
    from rewards import Reward, RewardOutput

    def redness(images, prompts, metadata, floor=0.0):
        red, green, blue = images.mean(dim=(2, 3)).unbind(1)
        scores = (red - (green + blue) / 2).clamp_min(floor)
        return [float(s) if "red" in p else None for s, p in zip(scores, prompts)]

    class Broken(Reward):
        def score(self, batch):
            return RewardOutput(batch.images.mean(dim=(1, 2, 3)).half())
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """red.png, grey.jpg and a wide blue.png, and my_rewards.py beside them."""
    colours = {
        "a_red.png": ((8, 8), (255, 0, 0)),
        "b_grey.jpg": ((8, 8), (128, 128, 128)),
        "c_blue.png": ((12, 8), (0, 0, 255)),
    }
    for name, (size, colour) in colours.items():
        Image.new("RGB", size, colour).save(tmp_path / name)
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(REWARDS))
    return tmp_path


def score(*arguments) -> Result:
    return CliRunner().invoke(app, ["score", *(str(a) for a in arguments)], env={"COLUMNS": "300"})


def written(folder: Path, *arguments) -> dict:
    """The JSON of a command that must succeed."""
    result = score(*arguments, "--out", folder / "scores.json")
    assert result.exit_code == 0, result.output
    return json.loads((folder / "scores.json").read_text())


def refused(*arguments) -> str:
    result = score(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    return lines[0].removeprefix("error: ")


def test_a_folder_is_scored_in_order_of_name_whatever_the_sizes(folder):
    found = written(folder, folder, "--reward", "brightness", "--reward", "jpeg")
    assert [Path(row["image"]).name for row in found["rows"]] == ["a_red.png", "b_grey.jpg", "c_blue.png"]
    values = [row["scores"]["brightness"] for row in found["rows"]]
    assert values == pytest.approx([1 / 3, 128 / 255, 1 / 3])
    assert found["mean"]["brightness"] == pytest.approx(np.mean(values))
    assert all(row["scores"]["jpeg"] == -row["components"]["jpeg"]["kilobytes"] for row in found["rows"])


def test_a_reward_of_ones_own_gets_prompts_and_arguments(folder):
    (folder / "prompts.txt").write_text("a red wall\nred fog\nthe sea\n")
    target = f"{folder}/my_rewards.py:redness"
    found = written(folder, folder, "--reward", target, "--prompts", folder / "prompts.txt", "--arg", "floor=0.25")
    assert [row["scores"][target] for row in found["rows"]] == [1.0, 0.25, None]
    assert found["mean"][target] == pytest.approx(0.625)  # a missing score enters no mean
    assert found["args"] == {"floor": 0.25}


def test_a_jsonl_brings_image_prompt_and_metadata(folder):
    lines = [
        {"image": "c_blue.png", "prompt": "a blue circle"},
        {
            "image": "a_red.png",
            "prompt": "?",
            "metadata": {"objects": [{"color": "red", "shape": "circle", "count": 1}]},
        },
    ]
    (folder / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = written(folder, folder / "list.jsonl", "--reward", "verifier")
    assert [Path(row["image"]).name for row in found["rows"]] == ["c_blue.png", "a_red.png"]
    assert all(row["scores"]["verifier"] is not None for row in found["rows"])


def test_the_table_shows_every_image_and_the_mean(folder):
    result = score(folder / "a_red.png", "--reward", "brightness")
    assert "a_red.png" in result.output
    assert "0.333" in result.output
    assert "mean" not in result.output  # of one image
    assert "mean" in score(folder, "--reward", "brightness").output


def test_a_missing_score_is_told_with_its_reason(folder):
    result = score(folder, "--reward", "verifier", "--prompt", "the sea")
    assert result.exit_code == 0, result.output
    assert "verifier: no score for 3 of 3 images: " in result.output


def test_a_sound_reward_passes_the_check_and_a_broken_one_exits_with_1(folder):
    passed = score("--check", f"{folder}/my_rewards.py:redness", "--arg", "floor=0.1")
    assert passed.exit_code == 0, passed.output
    assert ", 0 failed" in passed.output
    failed = score("--check", f"{folder}/my_rewards.py:Broken", "--out", folder / "verdicts.json")
    assert failed.exit_code == 1
    assert "scores are torch.float16: compute them in float32" in failed.output
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    assert [v["point"] for v in verdicts if v["status"] == "fail"] == ["float32 scores"]


def test_the_check_takes_ones_own_images(folder):
    (folder / "c_blue.png").unlink()
    result = score(folder, "--check", f"{folder}/my_rewards.py:redness", "--prompt", "red")
    assert result.exit_code == 0, result.output
    assert "2 of 2 images have a score" in result.output


def test_mistakes_are_one_line_each(folder):
    redness = f"{folder}/my_rewards.py:redness"
    assert "give an image" in refused("--reward", "jpeg")
    assert "give at least one --reward" in refused(folder)
    assert "there is no image or folder" in refused(folder / "none.png", "--reward", "jpeg")
    assert "did you mean 'jpeg'" in refused(folder, "--reward", "jpg")
    assert "judges an image by its prompt" in refused(folder, "--reward", redness)
    assert "one size, got 8x8, 8x12" in refused(folder, "--check", redness, "--prompt", "red")
    assert "expected key=value" in refused(folder, "--reward", "jpeg", "--arg", "quality")
    assert "unknown argument 'qualty'; did you mean 'quality'" in refused(
        folder, "--reward", "jpeg", "--arg", "qualty=3"
    )
    (folder / "two.txt").write_text("red\nblue\n")
    assert "2 prompts for 3 images" in refused(folder, "--reward", redness, "--prompts", folder / "two.txt")
    (folder / "d_text.png").write_text("not an image")
    assert "d_text.png cannot be read" in refused(folder, "--reward", "jpeg")
