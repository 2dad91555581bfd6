"""`align fit-artifact`: what it writes can be scored with, and images that cannot make a detector are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from align.cli import app
from align.errors import UserError
from align.fit_artifact import fit_artifact, telling_formats, units_of
from align.grids import as_image, save_png
from align.playground.artifacts import clean_images, corrupted
from align.runfolder import metric_rows
from align.score import read_pictures
from rewards.artifact import ArtifactReward, quality


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """25 clean images, and 24 others with artifacts."""
    folder = tmp_path_factory.mktemp("images")
    clean, others = clean_images(50, seed=6).split(25)
    for name, images in (("clean", clean), ("artifact", corrupted(others, seed=6))):
        for i, image in enumerate(images):
            save_png(as_image(image), folder / name / f"{name}{i:02d}.png")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["fit-artifact", *map(str, arguments)], env={"COLUMNS": "300"})


def test_the_command_fits_measures_and_says_how_to_use_it(folders, tmp_path):
    done = run("--clean", folders / "clean", "--artifact", folders / "artifact", "--out", tmp_path / "mine")
    assert done.exit_code == 0, done.output
    assert "5 clean, 5 with artifacts" in done.output
    assert f"artifact: {{type: artifact, args: {{path: {tmp_path / 'mine'}}}}}" in done.output
    about = json.loads((tmp_path / "mine" / "artifact_head.json").read_text())
    assert about["side"] == 64
    assert about["images"] == {"clean": 25, "artifact": 25}
    assert f"{about['held_out']['auc']:.3f}" in done.output
    assert (tmp_path / "mine" / "held_out_errors.png").is_file() == (about["held_out"]["accuracy"] < 1)
    reward = ArtifactReward(str(tmp_path / "mine"))
    reward.setup(torch.device("cpu"), torch.float32)
    images = torch.cat([clean_images(15, seed=7), corrupted(clean_images(15, seed=7), seed=7)])
    measured = quality(reward.log_odds(images).double(), (torch.arange(30) < 15).double())
    assert measured["auc"] > 0.75


def test_pictures_of_one_name_or_the_same_pixels_are_one_unit_of_the_split(tmp_path):
    """A copy on the other side of the split would be measured as known; here a chain of both kinds."""
    first, second, other = (as_image(torch.rand(3, 40, 48)) for _ in range(3))
    names = {"clean/a.png": first, "clean/b.png": other, "artifact/a.png": second, "artifact/copy of a.png": second}
    for name, image in names.items():
        save_png(image, tmp_path / name)
    pictures = [
        p for kind in ("clean", "artifact") for p in read_pictures(str(tmp_path / kind), None, None, needed=False)
    ]
    found = {f"{p.path.parent.name}/{p.path.name}": unit for p, unit in zip(pictures, units_of(pictures), strict=True)}
    assert found["clean/a.png"] == found["artifact/a.png"] == found["artifact/copy of a.png"] != found["clean/b.png"]


def test_the_same_seed_gives_the_same_detector(folders, tmp_path):
    files = []
    for name in ("one", "two"):
        fit_artifact(str(folders / "clean"), str(folders / "artifact"), None, 0, tmp_path / name, Console(quiet=True))
        files.append((tmp_path / name / "artifact_head.safetensors").read_bytes())
    assert files[0] == files[1]


def test_what_cannot_make_a_detector_is_refused(folders, tmp_path):
    clean, artifact = folders / "clean", folders / "artifact"
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(artifact.iterdir())[:5]:
        shutil.copy(file, few)
    for arguments, words in (
        ((clean, few), "holds 5 images: give at least 20"),
        ((clean, tmp_path / "none"), "--artifact: there is no folder"),
        ((tmp_path, artifact), "holds no image"),
        ((clean, clean), "are one folder"),
    ):
        done = run("--clean", arguments[0], "--artifact", arguments[1], "--out", tmp_path / "out")
        assert done.exit_code == 1
        assert words in done.output
        assert not (tmp_path / "out").exists()
    tiny = tmp_path / "tiny"
    for i in range(20):
        save_png(as_image(torch.rand(3, 16, 40)), tiny / f"{i}.png")
    with pytest.raises(UserError, match="less than 32 pixels"):
        fit_artifact(str(tiny), str(artifact), None, 0, tmp_path / "out", Console(quiet=True))


def test_a_file_type_or_size_that_gives_the_answer_away_is_told(folders, tmp_path):
    clean, artifact = (read_pictures(str(folders / name), None, None, needed=False) for name in ("clean", "artifact"))
    assert telling_formats(clean, artifact) == []
    for i in range(3):
        as_image(torch.rand(3, 40, 48)).save(tmp_path / f"{i}.jpg")
    others = read_pictures(str(tmp_path), None, None, needed=False)
    warnings = telling_formats(clean, others)
    assert len(warnings) == 2
    assert "file type" in warnings[0]
    assert ".png and .jpg" in warnings[0]
    assert "64x64 and 48x40" in warnings[1]
    assert telling_formats(clean, [*others, artifact[0]]) == []


def test_a_detector_gates_the_other_rewards_of_a_run(folders, tmp_path, write_config, train_here):
    fit_artifact(str(folders / "clean"), str(folders / "artifact"), None, 0, tmp_path / "mine", Console(quiet=True))
    rewards = {
        "brightness": {"type": "brightness"},
        "clean": {"type": "artifact", "weight": 0, "args": {"path": str(tmp_path / "mine")}},
    }
    config = write_config(tmp_path, "flow_grpo", {"rewards": rewards, "combine": {"gates": {"clean": 0}}})
    train_here(config, "train.iterations=1", "eval.every=0")
    (row,) = (row for row in metric_rows(tmp_path / "run" / "metrics.jsonl")[0] if row["kind"] == "train")
    assert 0 <= row["gate/clean_open"] <= 1
    assert -6 <= row["reward/clean"] <= 6
    assert row["gate/clean_open"] == round(8 * row["gate/clean_open"]) / 8  # of 2 prompts x 4 images
