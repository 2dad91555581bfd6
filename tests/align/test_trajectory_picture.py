"""`align grid --trajectory`: it shows what training samples and credits, and marks what the definitions select."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from align.cli import app
from align.collect import collect, score_values
from align.config import load_config
from align.errors import UserError
from align.prompts import Prompt
from align.run import start
from align.trajectory import Trajectories, chosen_prompt, load_setup, sample_trajectories
from align.trajectory_picture import DOWN, UP, trajectory_picture

BLUE = (0, 0, 255)
# The two trajectories that the definitions of arXiv 2602.06422 are usually explained with, and one without a turn.
RISING = [20.0, 20.6, 20.3, 20.9, 21.4, 21.1, 20.8, 21.6, 22.0, 21.9]
FALLING = [22.0, 21.6, 21.9, 21.2, 21.5, 21.3, 21.6, 20.9, 21.0, 20.7]
STEADY = [20.0 + 0.0 * k for k in range(10)]


def draw(*rows: list[float], side: int = 64, **options: Any) -> Image.Image:
    images = [[Image.new("RGB", (side, side), BLUE)] * len(row) for row in rows]
    return trajectory_picture(images, torch.tensor(rows), range(len(rows[0]) - 1), prompt="p", **options)


def runs_of(line: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the stretches of True, end exclusive."""
    edges = np.diff(np.concatenate([[0], line.astype(int), [0]]))
    return list(zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True))


def is_colour(page: Image.Image, colour: str | tuple[int, ...]) -> np.ndarray:
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) if isinstance(colour, str) else colour
    return (np.asarray(page) == rgb).all(-1)


def frames(page: Image.Image, colour: str) -> list[dict[int, int]]:
    """For each row of images, column -> thickness of the frame of `colour` around it, unframed ones left out."""
    blue, coloured = is_colour(page, BLUE), is_colour(page, colour)
    found = []
    for top, bottom in runs_of(blue.any(1)):
        row = {}
        for column, (left, right) in enumerate(runs_of(blue[top])):
            above = coloured[top - 12 : top, left:right].all(1).sum()
            if above:
                assert coloured[bottom : bottom + 12, left:right].all(1).sum() == above
                row[column] = int(above)
        found.append(row)
    return found


def test_turning_points_of_the_worked_examples_are_framed():
    page = draw(RISING, FALLING)
    assert frames(page, UP) == [{0: 6, 2: 6, 6: 6}, {}]
    assert frames(page, DOWN) == [{}, {0: 6, 2: 6, 4: 6, 6: 6, 8: 2}]  # state 8 turns, but nothing follows it


def test_a_row_without_a_turn_has_no_frame_and_no_line_for_credit():
    flat, turning = draw(STEADY), draw(RISING)
    assert frames(flat, UP) == frames(flat, DOWN) == [{}]
    assert not is_colour(flat, UP).any()
    assert not is_colour(flat, DOWN).any()
    assert flat.height < turning.height


def test_a_missing_value_gives_no_arrow_and_no_mark():
    page = draw([0.5, math.nan, 0.9, math.nan])
    assert not is_colour(page, UP).any()
    assert not is_colour(page, DOWN).any()
    draw([math.nan] * 4, [math.nan] * 4)


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_reduced():
    for side, shown in ((64, 128), (48, 144), (128, 128), (512, 192)):
        blue = is_colour(draw(RISING, side=side), BLUE)
        assert [end - begin for begin, end in runs_of(blue.any(0))] == [shown] * 10
        assert [end - begin for begin, end in runs_of(blue.any(1))] == [shown]


def test_any_text_and_scale_can_be_drawn():
    nasty = "ein Löwe\n\x00 V_k_{ _ * − " + "word " * 300
    sizes = {
        draw([v * scale for v in RISING], [0.0] * 10, note=nasty, labels=["a_", "b"]).size for scale in (1e-9, 1.0, 1e9)
    }
    assert len(sizes) == 1


def test_counts_that_do_not_fit_are_refused():
    image = Image.new("RGB", (64, 64))
    for images, values in (
        ([], torch.zeros(0, 3)),
        ([[image] * 2], torch.zeros(1, 3)),
        ([[image] * 3], torch.zeros(2, 3)),
    ):
        with pytest.raises(ValueError, match="2 steps need rows of 3 images"):
            trajectory_picture(images, values, (0, 1), prompt="p")


SAMPLERS: dict[str, dict[str, Any]] = {
    "full": {"sampler": {"num_steps": 4}},
    "window, one noise": {
        "sampler": {"kernel": "cps", "num_steps": 6, "plan": "window", "window_size": 2, "shared_noise": True}
    },
    "own guidance": {"sampler": {"num_steps": 3}, "completions": {"guidance_scale": 2.0, "ode_steps": 2}},
}


@pytest.mark.parametrize("changes", list(SAMPLERS.values()), ids=list(SAMPLERS))
def test_it_shows_what_training_samples_and_scores(tmp_path, write_config, on_cpu, changes: dict[str, Any]):
    path = write_config(tmp_path, "flow_grpo", changes)
    run = start(load_config(path), Console(quiet=True))
    prompts, samples = [Prompt("a red circle")], [0, 1, 2, 3]  # one group
    batch = collect(run, prompts, samples, 0, 5, lambda *_: None, with_values=True, plan=plan_of(path, seed=5))
    wanted = score_values(run, prompts, batch, 4, lambda *_: None).values["brightness"]

    found = sample_trajectories(load_setup(str(path), seed=5), prompts[0], samples)
    assert found.steps == batch.plan.stochastic
    torch.testing.assert_close(found.values, wanted, atol=1e-4, rtol=0)  # a GPU may be used here and not there
    assert wanted.diff(dim=1).abs().max() > 1e-3  # the noise matters, so the comparison says something
    brightness = found.images.mean(dim=(2, 3, 4))
    torch.testing.assert_close(brightness, found.values, atol=1e-4, rtol=0)  # each image stands above its own value
    if changes["sampler"].get("shared_noise"):
        assert found.values[:, 0].unique().numel() == 1


def plan_of(path: Path, seed: int) -> Any:
    return load_config(path).sampler.make_plan(seed, 0)


@pytest.fixture
def sampled(tmp_path, write_config, on_cpu) -> Callable[..., Trajectories]:
    """sampled(samples, preset, changes, **options) -> trajectories of the tiny model."""

    def sample(samples: Any, preset: str = "flow_grpo", changes: Any = None, **options: Any) -> Trajectories:
        setup = load_setup(str(write_config(tmp_path, preset, changes)), seed=1)
        return sample_trajectories(setup, chosen_prompt(setup, None, None), samples, **options)

    return sample


def test_a_sample_does_not_depend_on_the_others(sampled):
    alone, beside = sampled([3]), sampled([2, 3, 4])
    torch.testing.assert_close(alone.values[0], beside.values[1], atol=1e-6, rtol=0)
    assert (beside.values[0] - beside.values[1]).abs().max() > 1e-4


def test_a_run_that_samples_without_noise_is_shown_with_some(sampled):
    found = sampled([0], "nft", num_steps=4)
    assert found.steps == (0, 1, 2)
    assert "flow_sde 0.7, 4 steps" in found.note


def test_a_value_is_the_weighted_sum_that_is_trained(sampled):
    brightness = {"type": "brightness"}
    rewards = {
        "a": {**brightness, "weight": 2.0},
        "b": {**brightness, "weight": -0.5},
        "c": {**brightness, "weight": 0.0},
    }
    one, sum_ = sampled([0]), sampled([0], changes={"rewards": rewards})
    torch.testing.assert_close(sum_.values, 1.5 * one.values)
    assert sum_.note.startswith("reward: 2 a + -0.5 b; base model")
    torch.testing.assert_close(sampled([0], changes={"rewards": rewards}, reward_names=["c"]).values, one.values)


def test_a_calibrated_table_is_the_runs_own(sampled, tmp_path):
    changes = {"sampler": {"psi": "auto"}}
    with pytest.raises(UserError, match="no noise table has been measured yet"):
        sampled([0], changes=changes)
    table = tmp_path / "run" / "psi.json"
    table.parent.mkdir()
    linear = {"sampler": {"psi": "auto", "grid": "linspace_shift", "shift": 1.0}}
    grid = [1.0, 0.666667, 0.333333, 0.0]
    table.write_text(json.dumps({"fingerprint": {"grid": grid}, "sigma": [0.8, 0.4, 0.1], "nfe": 1}))
    assert "calibrated noise" in sampled([0], changes=linear).note
    with pytest.raises(UserError, match="for 3 steps at other times than the 5 of this grid; leave out --steps"):
        sampled([0], changes=linear, num_steps=5)
    with pytest.raises(UserError, match="for 3 steps at other times than the 3 of this grid"):
        sampled([0], changes=changes)
    table.write_text("{}")
    with pytest.raises(UserError, match="not a table that align calibrate wrote"):
        sampled([0], changes=linear)


def test_the_metadata_of_a_known_prompt_comes_with_it(tmp_path, write_config):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "two stars", "metadata": {"category": "count"}}))
    setup = load_setup(str(write_config(tmp_path / "run", changes={"prompts": {"train": str(path)}})))
    assert chosen_prompt(setup, "two stars", None).metadata == {"category": "count"}
    assert chosen_prompt(setup, "something else", None) == Prompt("something else")
    assert chosen_prompt(setup, None, str(path)).text == "two stars"


def test_the_command_draws_a_finished_run_and_its_adapter_alike(tmp_path, write_config, train_here):
    train_here(write_config(tmp_path), "train.iterations=1", "eval.every=0")
    run = tmp_path / "run"
    options = ["--trajectory", "--n", "2", "--sample", "5"]
    pictures = []
    for target, out in ((run, run / "grids" / "trajectory.png"), (run / "adapter", tmp_path / "a.png")):
        result = CliRunner().invoke(
            app, ["grid", str(target), *options, *([] if target == run else ["--out", str(out)])]
        )
        assert result.exit_code == 0, result.output
        assert str(out) in result.output.replace("\n", "")
        pictures.append(np.asarray(Image.open(out)))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["playground", "--trajectory", "--prompt", "a red circle"], "give at least one --reward NAME"),
        (["playground", "--prompt", "a red circle"], "--prompt and --sample go with --trajectory"),
        (["nothing.yaml", "--trajectory"], "no file nothing.yaml"),
    ],
)
def test_mistakes_are_one_clear_line(arguments: list[str], words: str):
    result = CliRunner().invoke(app, ["grid", *arguments])
    assert result.exit_code == 1
    assert words in result.output
    assert len(result.output.splitlines()) == 1
