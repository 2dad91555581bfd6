"""The second base: a genuine, small Stable Diffusion pipeline on the first base's autoencoder and text encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

from align.playground import assess
from align.playground.captions import prompts
from align.playground.components import MAX_TOKENS, TEXT_WIDTH, build_tokenizer, token_ids
from align.playground.verifier import verify_batch

FIRST = Path(assess.__file__).parent / "weights"
WEIGHTS = Path(assess.__file__).parent / "unet_weights"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(WEIGHTS)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_folder_is_small_and_float16() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) <= 9_000_000
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert {f.parent.name for f in files} == {"unet", "vae", "text_encoder"}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
        assert dtypes == {torch.float16}
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]


def test_plain_loading_gives_one_dtype(pipe: StableDiffusionPipeline) -> None:
    assert {p.dtype for p in (pipe.vae, pipe.text_encoder, pipe.unet)} == {torch.float32}
    half = StableDiffusionPipeline.from_pretrained(WEIGHTS, dtype=torch.bfloat16)
    assert {p.dtype for p in (half.vae, half.text_encoder, half.unet)} == {torch.bfloat16}


def test_the_schedule_is_that_of_stable_diffusion(pipe: StableDiffusionPipeline) -> None:
    assert isinstance(pipe.scheduler, DDIMScheduler)
    # The figures of SD 1.5: 0.99915 of the signal's power is left at its first timestep, 0.00466 at its last.
    assert pipe.scheduler.alphas_cumprod[[0, -1]].tolist() == pytest.approx([0.99915, 0.00466], abs=1e-5)
    pipe.scheduler.set_timesteps(20)
    assert pipe.scheduler.timesteps[[0, -1]].tolist() == [951, 1]


def test_autoencoder_is_the_first_bases() -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(WEIGHTS / name), load_file(FIRST / name)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [AutoencoderKL.load_config(folder / "vae") for folder in (WEIGHTS, FIRST)]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    assert configs[0]["shift_factor"] is None
    assert "_name_or_path" not in configs[0]  # the folder of whoever made it


def test_text_states_are_the_first_bases_after_a_plain_norm(pipe: StableDiffusionPipeline) -> None:
    texts = ["a red circle", "three blue stars", ""]
    ids = token_ids(build_tokenizer(), texts)
    assert torch.equal(ids, token_ids(pipe.tokenizer, texts))
    first = CLIPTextModelWithProjection.from_pretrained(FIRST / "text_encoder", dtype=torch.float32)
    states, empty = pipe.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=True)
    with torch.no_grad():
        theirs = first(ids, output_hidden_states=True).hidden_states[-2]
    assert states.shape == (3, MAX_TOKENS, TEXT_WIDTH)
    assert (states - torch.nn.functional.layer_norm(theirs, (TEXT_WIDTH,))).abs().max() < 1e-4
    assert torch.equal(states[2], empty[0])  # the empty caption of training is the empty negative prompt


def test_text_encoders_layers_are_the_first_bases() -> None:
    name = "text_encoder/model.safetensors"
    ours, theirs = (
        {key.removeprefix("text_model."): t for key, t in load_file(folder / name).items()}
        for folder in (WEIGHTS, FIRST)
    )
    assert {key.split(".")[2] for key in ours if "layers" in key} == {"0", "1"}
    for key in ours:
        if "final_layer_norm" not in key:
            assert torch.equal(ours[key], theirs[key]), key


def test_a_decoded_latent_is_the_scene(pipe: StableDiffusionPipeline) -> None:
    from align.playground.captions import spec_of
    from align.playground.data import to_tensor
    from align.playground.scenes import render, sample_scene

    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(64)]
    with torch.no_grad():
        raw = pipe.vae.encode(to_tensor(np.stack([render(s) for s in scenes]))).latent_dist.mode()
        latents = raw * pipe.vae.config.scaling_factor
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    # The schedule assumes a variance of about 1. 64 images of about 10 independent regions each: a few percent off.
    assert abs(latents.std().item() - 1) < 0.1
    assert abs(latents.mean().item() - 0.31) < 0.1
    images = pixels.permute(0, 2, 3, 1).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    assert np.mean([v.full for v in verify_batch(images, [spec_of(s) for s in scenes])]) >= 0.97


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (1.0, 1.0), (3.0, 0.0)])
def test_pictures_follow_prompts(pipe: StableDiffusionPipeline, guidance: float, eta: float) -> None:
    rows = prompts("seen_test", 32)
    images = assess.generate(pipe, [r["prompt"] for r in rows], list(range(32)), 10, guidance, eta)
    scores = [v.graded for v in verify_batch(images, [r["metadata"] for r in rows])]
    others = [v.graded for v in verify_batch(images, [r["metadata"] for r in rows[1:] + rows[:1]])]
    assert np.mean(scores) >= 0.4
    assert np.mean(scores) > np.mean(others) + 0.15


def test_the_card_states_these_weights(pipe: StableDiffusionPipeline) -> None:
    figures = json.loads((WEIGHTS / "pretrain.json").read_text())
    for part in ("vae", "text_encoder", "unet"):
        assert sum(p.numel() for p in getattr(pipe, part).parameters()) == figures["parameters"][part]
    # What reinforcement learning starts from: wrong on many held-out prompts, right on enough to learn from.
    assert 0.45 <= figures["scores"]["heldout T=20 CFG=1 eta=0"]["graded"] <= 0.70
    assert "unet_weights" in (WEIGHTS / "README.md").read_text()
