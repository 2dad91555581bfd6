"""Reward gradients by the published command: files, adapters, resumed and distributed runs, and the presets."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusion3Pipeline
from typer.testing import CliRunner

from align.checkpoint import checkpoints
from align.cli import app
from align.evaluate import EVAL_STREAM
from align.models.base import SHIPPED
from align.runfolder import metric_rows
from samplers.noise import keyed_normal

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
UNET = runpy.run_path(str(HERE.parent / "tiny_unet.py"))
RESUME = runpy.run_path(str(HERE / "test_resume.py"))
DISTRIBUTED = runpy.run_path(str(HERE / "test_distributed.py"))
METHODS = ("alignprop", "draft_k", "draft_lv", "refl", "drtune", "flowbp_sparse")

# a user's reward with a gradient: random numbers, a missing score on request, and a signal at a chosen moment
REWARD = """\
import os, signal
import numpy as np
import torch

calls = 0

def score(images, prompts, metadata, unknown=None):
    global calls
    calls += 1
    name, call, _ = os.environ.get("MOMENT", "none 0 0").split()
    if calls == int(call):
        os.kill(os.getpid(), signal.Signals[name])
    values = images.mean(dim=(1, 2, 3)) * (1 if unknown else 1 + 0.1 * np.random.rand())
    return torch.where(torch.tensor([p == unknown for p in prompts]), torch.nan, values)

score.differentiable = True
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "bright.py"
    path.write_text(REWARD)
    return f"{path}:score"


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_config, launch) -> Path:
    """Folder of a run on the playground made by `accelerate launch`: AlignProp, two updates an iteration."""
    changes = {
        "model": {"path": "playground", "max_sequence_length": 256, "gradient_checkpointing": False},
        "rewards": {"proxy": {"type": "proxy"}, "verifier": {"type": "verifier", "weight": 0}},
        "eval_rewards": {"brightness": {"type": "brightness"}},
        "sampler": {"kernel": "ode", "num_steps": 4, "guidance_scale": 2.0},
        "train": {"iterations": 2, "prompts_per_iteration": 4, "group_size": 1},
        "prompts": {"train": "playground:train", "eval": "playground:heldout_test"},
        "loss": {"checkpointing": False},
        "eval": {"every": 1},
    }
    folder = tmp_path_factory.mktemp("command")
    config = write_config(folder, "alignprop", changes)
    launch(config)
    return folder / "done"


@pytest.mark.e2e
class TestCommand:
    def test_metrics(self, finished):
        rows = metric_rows(finished / "metrics.jsonl")[0]
        train = [r for r in rows if r["kind"] == "train"]
        assert [r["iteration"] for r in train] == [0, 1]
        names = [
            "reward/mean",
            "reward/proxy",
            "reward/verifier",
            "train/loss",
            "train/grad_norm",
            "train/adjoint_norm",
        ]
        names += ["train/adjoint_growth", "train/active_steps", "train/saturated_fraction", "train/lr", "time/sample"]
        for name in names:
            assert all(isinstance(r[name], float | int) for r in train), name
        assert all(r["train/grad_norm"] > 0 for r in train)
        assert all(1 <= r["train/active_steps"] <= 3 for r in train)
        assert all(r["sample/nfe_per_image"] == 2 * 4 for r in train)
        # guidance runs the network twice: 4 images of 4 steps, and each active step again, forward and backward
        spent = [2 * (4 * 4 + 3 * 4 * r["train/active_steps"]) for r in train]
        assert train[-1]["nfe"] == pytest.approx(sum(spent))
        assert [r["iteration"] for r in rows if r["kind"] == "eval"] == [0, 1, 2]
        assert "data:image/" in (finished / "report.html").read_text()

    def test_the_adapter_in_a_plain_pipeline_gives_the_images_that_were_scored(self, finished):
        written = json.loads((finished / "eval" / "tuned.json").read_text())
        base = json.loads((finished / "eval" / "base.json").read_text())
        pipe = StableDiffusion3Pipeline.from_pretrained(SHIPPED["playground"], text_encoder_3=None, tokenizer_3=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(finished / "adapter")
        noise = {"seed": written["seed"], "iteration": 0, "samples": [0, 1], "step": 0, "stream": EVAL_STREAM}
        images = pipe(
            written["prompts"],
            latents=keyed_normal((4, 16, 16), **noise),
            num_inference_steps=written["num_steps"],
            guidance_scale=written["guidance_scale"],
            max_sequence_length=0,
            output_type="pt",
        ).images
        found = images.float().mean(dim=(1, 2, 3)).tolist()
        assert found == pytest.approx(written["scores"]["brightness"], abs=1e-4)
        assert found != pytest.approx(base["scores"]["brightness"], abs=1e-4)


# -- resuming ------------------------------------------------------------------------------------------------------

RANDOM: dict[str, Any] = {
    "backprop": {"truncation": "gaussian", "cut_ratio": 0.5, "velocity_penalty": 0.1},
    "sampler": {"num_steps": 4, "guidance_scale": 2.0},
    "optim": {"ema_decay": 0.9},
    "loss": {"image_batch": 8},
    "train": {"group_size": 2, "rollout_batch": 8},
    "checkpoint": {"keep": 2},
}


@pytest.mark.e2e
def test_three_iterations_and_three_more_after_kill_9_are_six(tmp_path, write_config, train_here, reward):
    """Calls of the reward: base evaluation, iterations 0 1 2, evaluation, iteration 3, and the end within iteration 4."""
    changes = RANDOM | {"rewards": {"bright": {"type": reward}}, "checkpoint": {"keep": 2, "every": 3}}
    changes["train"] = RANDOM["train"] | {"updates_per_iteration": 1}
    config = write_config(tmp_path, "draft_k", changes)
    assert RESUME["killed"](config, call=7, delay=0) == -9
    assert [c.name for c in checkpoints(tmp_path / "disturbed")] == ["iteration-000003"]
    train_here(config, "name=disturbed")
    train_here(config, "name=undisturbed")
    RESUME["assert_same_end"](tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.parametrize(("call", "done"), [(4, 1), (5, 2)])
def test_a_signal_before_the_first_update_undoes_the_iteration_and_a_later_one_lets_it_end(
    tmp_path, write_config, train_here, reward, monkeypatch, call, done
):
    """Calls: base evaluation, then two updates an iteration."""
    changes = RANDOM | {"rewards": {"bright": {"type": reward}}, "checkpoint": {"keep": 2, "every": 100}}
    config = write_config(tmp_path, "draft_k", changes)
    monkeypatch.setenv("MOMENT", f"SIGTERM {call} 0")
    assert train_here(config, "name=disturbed") is None
    monkeypatch.delenv("MOMENT")
    assert [c.name for c in checkpoints(tmp_path / "disturbed")] == [f"iteration-{done:06d}"]
    train_here(config, "name=disturbed")
    train_here(config, "name=undisturbed")
    RESUME["assert_same_end"](tmp_path / "disturbed", tmp_path / "undisturbed")


# -- processes and batches -----------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    # random lengths through a UNet with ancestral sampling, both predictions of guidance
    "alignprop": {"sampler": {"num_steps": 5, "guidance_scale": 2.0}, "optim": {"lr": 3e-4}},
    # stops, spread steps and the conditional prediction alone; the penalty, and an average
    "drtune": {
        "backprop": {"velocity_penalty": 0.1},
        "sampler": {"num_steps": 7, "guidance_scale": 2.0},
        "loss": {"value": 2.0},
        "optim": {"lr": 3e-4},
    },
    # copies, and a prompt that has no score
    "draft_lv": {"sampler": {"num_steps": 3}, "optim": {"lr": 3e-4}, "train": {"max_invalid_fraction": 0.9}},
}


@pytest.mark.e2e
@pytest.mark.slow
def test_cutting_of_batches_and_two_processes(tmp_path, write_config, train_here, reward):
    """Three methods in one launch; the same rows to 1e-5."""
    configs = []
    for method, settings in RUNS.items():
        unknown = "a cat left of the dog" if method == "draft_lv" else "nothing"
        changes: dict[str, Any] = settings | {"rewards": {"bright": {"type": reward, "args": {"unknown": unknown}}}}
        changes["train"] = {"iterations": 3, "prompts_per_iteration": 4, "group_size": 2} | settings.get("train", {})
        if method == "alignprop":
            changes["model"] = {"path": str(UNET["sd_pipeline"](tmp_path / "sd15"))}
        configs.append(write_config(tmp_path / method, method, changes))
    for config in configs:
        train_here(config, "name=alone")
        cut = ("train.micro_batch=1", "train.rollout_batch=4", "loss.image_batch=1")
        train_here(config, "name=cut", *cut)
        DISTRIBUTED["assert_equal_runs"](config.with_name("alone"), config.with_name("cut"))
    DISTRIBUTED["launch"]("torchrun", str(HERE / "several_runs.py"), *map(str, configs))
    for config in configs:
        assert json.loads((config.with_name("both") / "environment.json").read_text())["processes"] == 2
        DISTRIBUTED["assert_equal_runs"](config.with_name("alone"), config.with_name("both"))


# -- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_can_be_checked_before_it_is_run(tmp_path, method):
    """With the playground's own prompts and proxy; nothing that a preset sets is without effect."""
    path = tmp_path / "run.yaml"
    rewards = "{proxy: {type: proxy}, verifier: {type: verifier, weight: 0}}"
    path.write_text(f"preset: [{method}, playground]\nrewards: {rewards}\noutput_dir: {tmp_path / 'runs'}\n")
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert "note:" not in result.output
    for words in ("type: reward_gradient", "images per iteration", "differentiated", "trainable", "total"):
        assert words in result.output, words
    assert not (tmp_path / "runs").exists()


def test_a_mistake_of_the_new_sections_is_told_with_its_place(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: [drtune, playground]\nrewards: {verifier: {type: verifier}}\n")
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run"], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert result.output.startswith("error: reward 'verifier' has no gradient")
    path.write_text("preset: [drtune, playground]\nbackprop: {k: 0}\nloss: {scale: -1}\n")
    result = CliRunner().invoke(app, ["train", str(path), "--dry-run"], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "backprop.k: must be at least 1, got 0" in result.output
    assert "loss.scale: must be positive, got -1" in result.output
