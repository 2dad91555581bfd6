"""SD 1.5 and SDXL by the published command: presets, a kill, a resume, and the adapter in the plain pipeline."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline

from align.config import load_resolved
from align.evaluate import EVAL_STREAM, sample_images
from align.models.base import load_model
from align.runfolder import metric_rows
from samplers.noise import keyed_normal

REPOSITORY = Path(__file__).parents[2]
TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
SMALL: dict[str, Any] = {
    "trackers": [],
    "rewards": {"brightness": {"type": "brightness"}},
    "prompts": {"train": "prompts.txt", "eval": "prompts.txt"},
    "sampler": {"num_steps": 4, "branch": {"suffix_start": 3, "suffix_end": 4, "stages": 3}},
    "advantage": {"history": {"min_count": 1}},
    "selection": {"pos_threshold": 0.0, "neg_threshold": 0.0},
    "optim": {"lr": 1e-2},
    "train": {"iterations": 3, "prompts_per_iteration": 2, "group_size": 3, "updates_per_iteration": 1},
    "eval": {"every": 3, "during": 2, "prompts": 2, "num_steps": 3, "grid_prompts": 2},
    "checkpoint": {"every": 1},
}
CASES = [("sd15", "sd", "b2_diffurl"), ("sdxl", "sdxl", "prdp")]


def launch(config: Path, *overrides: str) -> None:
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*command, "-m", "align.train", str(config), *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "family", "method"), CASES)
def test_the_whole_run(tmp_path, preset, family, method):
    """Two iterations, then a third in a new process, with the preset's guidance of 5; fp32, since a CPU lacks fp16."""
    folder = TINY[f"{family}_pipeline"](tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue star\n")
    model = {"path": str(folder), "precision": "fp32", "resolution": None}
    prompts = {"train": str(tmp_path / "prompts.txt"), "eval": str(tmp_path / "prompts.txt")}
    data = SMALL | {"preset": [preset, method], "model": model, "prompts": prompts, "output_dir": str(tmp_path)}
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(data))
    launch(config, "train.iterations=2")
    (tmp_path / "my" / "summary.json").unlink()
    launch(config)
    run = tmp_path / "my"
    rows = metric_rows(run / "metrics.jsonl")[0]
    assert [r["iteration"] for r in rows if r["kind"] == "train"] == [0, 1, 2]
    assert json.loads((run / "summary.json").read_text())["iterations"] == 3
    written = json.loads((run / "eval" / "tuned.json").read_text())
    ours = load_model(load_resolved(run / "config.yaml").model)
    arguments = (written["prompts"], [0, 1], written["num_steps"], written["guidance_scale"], written["seed"])
    base = sample_images(ours, *arguments)
    ours.load_adapter(run / "adapter")
    tuned = sample_images(ours, *arguments)
    assert (tuned - base).abs().max() > 1e-3
    pipe = DiffusionPipeline.from_pretrained(folder, **({"safety_checker": None} if family == "sd" else {}))
    # the chain ends at training timestep 0, as in the published folders
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run / "adapter")
    size = ours.native_resolution
    noise = {"seed": written["seed"], "iteration": 0, "samples": [0, 1], "step": 0, "stream": EVAL_STREAM}
    plain = pipe(
        written["prompts"],
        latents=keyed_normal(ours.latent_shape, **noise),
        num_inference_steps=written["num_steps"],
        guidance_scale=written["guidance_scale"],
        height=size,
        width=size,
        output_type="pt",
    ).images
    assert written["guidance_scale"] == 5.0
    assert (tuned - plain).abs().max() <= 1e-4
    assert plain.mean(dim=(1, 2, 3)).tolist() == pytest.approx(written["scores"]["brightness"], abs=1e-4)
