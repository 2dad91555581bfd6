"""The real path on a tiny SD3.5-type pipeline: the published command, its files, and its adapter in plain diffusers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from rich.console import Console

from align.config import load_config
from align.evaluate import EVAL_STREAM, sample_images
from align.models.base import load_model
from align.policy_loop import run_iteration
from align.run import start
from align.runfolder import metric_rows
from samplers.noise import keyed_normal

REPOSITORY = Path(__file__).parents[2]
SUMMARY = {"base", "tuned", "delta_ci95", "iterations", "nfe", "seconds", "adapter", "grid", "report"}


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_config, launch, sd35) -> Path:
    """Folder of a run made by `accelerate launch`, with guidance."""
    folder = tmp_path_factory.mktemp("command")
    changes = {
        "sampler": {"guidance_scale": 2.0},
        "eval_rewards": {"jpeg": {"type": "jpeg"}},
        "train": {"iterations": 4},
        "eval": {"every": 2, "diversity": {"prompts": 2, "images": 2, "embedder": {"type": "proxy"}}},
        "trackers": ["tensorboard"],
    }
    config = write_config(folder, "flow_grpo", changes)
    before = digests(sd35)
    launch(config)
    assert digests(sd35) == before
    return folder / "done"


@pytest.mark.e2e
class TestCommand:
    def test_summary(self, finished):
        summary = json.loads((finished / "summary.json").read_text())
        assert set(summary) == SUMMARY
        assert summary["iterations"] == 4
        for key in ("base", "tuned", "delta_ci95"):
            assert set(summary[key]) == {"brightness", "jpeg"}
        for reward, (low, high) in summary["delta_ci95"].items():
            assert low - 1e-6 <= summary["tuned"][reward] - summary["base"][reward] <= high + 1e-6
        for key in ("adapter", "grid", "report"):
            assert Path(summary[key]).exists()

    def test_files(self, finished):
        assert (finished / "adapter" / "pytorch_lora_weights.safetensors").is_file()
        with Image.open(json.loads((finished / "summary.json").read_text())["grid"]) as grid:
            grid.load()
            assert grid.width >= 2 * 16
            assert grid.height >= 2 * 16
        assert "data:image/" in (finished / "report.html").read_text()
        assert list(finished.rglob("events.out.tfevents*"))
        assert not list(finished.rglob(".tmp-*"))

    def test_metrics(self, finished):
        rows = metric_rows(finished / "metrics.jsonl")[0]
        train = [r for r in rows if r["kind"] == "train"]
        assert [r["iteration"] for r in train] == [0, 1, 2, 3]
        for name in ("reward/mean", "reward/brightness", "train/loss", "train/grad_norm", "train/kl", "time/sample"):
            assert all(isinstance(r[name], float) for r in train), name
        evals = [r for r in rows if r["kind"] == "eval"]
        assert [r["iteration"] for r in evals] == [0, 2, 4]
        assert all(isinstance(r[f"eval/{name}"], float) for r in evals for name in ("brightness", "jpeg"))

    def test_every_evaluation_keeps_scores_and_pictures(self, finished):
        rows = {r["iteration"]: r for r in metric_rows(finished / "metrics.jsonl")[0] if r["kind"] == "eval"}
        for iteration in (2, 4):
            kept = json.loads((finished / "eval" / f"iteration-{iteration:06d}.json").read_text())["scores"]
            assert sum(kept["brightness"]) / len(kept["brightness"]) == pytest.approx(rows[iteration]["eval/brightness"])
            assert list((finished / "samples" / f"iteration-{iteration:06d}").glob("*.webp"))
            assert all(isinstance(rows[iteration][f"hacking/{role}"], float) for role in ("optimised", "held_out"))
        assert all(1 <= row["diversity/vendi"] <= 2 for row in rows.values())
        assert "Optimised and held-out rewards" in (finished / "report.html").read_text()

    def test_network_evaluations(self, finished):
        # 8 images x 3 steps sampled; 8 x 2 pairs, each a forward, a reference forward and a backward worth two
        per_iteration = 2 * (8 * 3 + 8 * 2 * 4)  # guidance runs the network twice
        assert metric_rows(finished / "metrics.jsonl")[0][-1]["nfe"] == 4 * per_iteration

    @pytest.mark.parametrize("label", ["base", "tuned"])
    def test_scores(self, finished, label):
        written = json.loads((finished / "eval" / f"{label}.json").read_text())
        assert len(written["prompts"]) == len(written["metadata"]) == 2
        assert {name: len(values) for name, values in written["scores"].items()} == {"brightness": 2, "jpeg": 2}
        mean = json.loads((finished / "summary.json").read_text())[label]["brightness"]
        assert mean == pytest.approx(sum(written["scores"]["brightness"]) / 2)

    def test_adapter_in_a_plain_pipeline_gives_the_same_images(self, finished, sd35):
        written = json.loads((finished / "eval" / "tuned.json").read_text())
        model = load_model(load_config(finished / "config.yaml").model)
        prompts, indices = written["prompts"], [0, 1]
        arguments = (prompts, indices, written["num_steps"], written["guidance_scale"], written["seed"])
        base = sample_images(model, *arguments)
        model.load_adapter(finished / "adapter")
        ours = sample_images(model, *arguments)
        pipe = StableDiffusion3Pipeline.from_pretrained(sd35)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(finished / "adapter")
        noise = {"seed": written["seed"], "iteration": 0, "samples": indices, "step": 0, "stream": EVAL_STREAM}
        plain = pipe(
            prompts,
            latents=keyed_normal(model.latent_shape, **noise),
            num_inference_steps=written["num_steps"],
            guidance_scale=written["guidance_scale"],
            max_sequence_length=8,
            output_type="pt",
        ).images
        assert (ours - plain).abs().max() <= 1e-5
        assert (ours - base).abs().max() > 1e-3  # there is something to agree on
        # the run itself scored these very images
        assert plain.mean(dim=(1, 2, 3)).tolist() == pytest.approx(written["scores"]["brightness"], abs=1e-5)


@pytest.mark.parametrize("preset", ["flow_grpo_fast", "nft"])
def test_training_changes_no_frozen_weight(tmp_path, write_config, sd35, on_cpu, preset):
    """Base, VAE and encoders in memory are bit for bit those on disk after updates and evaluations of the average."""
    changes: dict[str, Any] = {"model": {"encoders": "keep"}, "sampler": {"window_size": 2}}
    run = start(load_config(write_config(tmp_path, preset, changes)), Console(quiet=True))
    before = [p.detach().clone() for p in run.parameters]
    for _ in range(2):
        run_iteration(run, lambda *_: None)
        with run.average.applied():
            sample_images(run.model, ["a cat"], [0], 2, 1.0, 0)
    assert not all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    fresh = DiffusionPipeline.from_pretrained(sd35)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        used = getattr(run.model.pipe, name).state_dict()
        frozen = {k.replace(".base_layer", ""): v for k, v in used.items() if "lora_" not in k}
        on_disk = getattr(fresh, name).state_dict()
        assert frozen.keys() == on_disk.keys()
        assert all(torch.equal(frozen[k], on_disk[k]) for k in on_disk), name
