"""The shipped weights: a genuine, small pipeline whose text conditioning, autoencoder and pictures are what we say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from align.playground import assess
from align.playground.captions import WORDS, prompts
from align.playground.components import MAX_TOKENS, build_tokenizer, conditioning, token_ids
from align.playground.verifier import verify_batch

WEIGHTS = Path(assess.__file__).parent / "weights"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(WEIGHTS, text_encoder_3=None, tokenizer_3=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_folder_is_small_and_float16() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) <= 10_000_000
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_tensor(k).dtype for k in tensors.keys()} == {torch.float16}  # noqa: SIM118
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]


def test_all_parts_load_in_one_dtype(pipe: StableDiffusion3Pipeline) -> None:
    parts = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer)
    assert {p.dtype for p in parts} == {torch.float32}
    half = StableDiffusion3Pipeline.from_pretrained(
        WEIGHTS, text_encoder_3=None, tokenizer_3=None, dtype=torch.bfloat16
    )
    assert {getattr(half, n).dtype for n in ("vae", "text_encoder", "transformer")} == {torch.bfloat16}


def test_every_word_is_one_token_and_prompts_fit(pipe: StableDiffusion3Pipeline) -> None:
    texts = [p["prompt"] for split in ("train", "seen_test", "heldout_test") for p in prompts(split, 200)]
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2, build_tokenizer()):
        for word in WORDS:
            ids = tokenizer(word).input_ids
            assert len(ids) == 3, word  # start, word, end
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == word
        assert max(len(ids) for ids in tokenizer(texts).input_ids) <= MAX_TOKENS
        assert tokenizer.model_max_length == MAX_TOKENS


def test_tokenizers_tell_all_captions_apart(pipe: StableDiffusion3Pipeline) -> None:
    texts = [p["prompt"] for p in prompts("train", 300)]
    ids = token_ids(pipe.tokenizer, texts)
    assert len(torch.unique(ids, dim=0)) == len(texts)
    assert torch.equal(ids, token_ids(build_tokenizer(), texts))


@pytest.mark.parametrize("length", [0, 1])
def test_training_conditioning_is_encode_prompt(pipe: StableDiffusion3Pipeline, length: int) -> None:
    texts = ["a red circle", "three blue stars", "a yellow square left of a purple ring", ""]
    states, empty_states, pooled, empty_pooled = pipe.encode_prompt(texts, None, None, max_sequence_length=length)
    encoders = (pipe.text_encoder, pipe.text_encoder_2)
    with torch.no_grad():
        ours, our_pooled = conditioning(encoders, token_ids(build_tokenizer(), texts))
    assert states.shape == (4, MAX_TOKENS + length, 128)
    assert (states[:, :MAX_TOKENS] - ours).abs().max() < 1e-5
    assert (pooled - our_pooled).abs().max() < 1e-5
    assert torch.equal(states[3], empty_states[0])  # the empty caption of training is the empty negative prompt
    assert torch.equal(pooled[3], empty_pooled[0])


def test_pooled_vector_is_read_at_the_first_end_of_text(pipe: StableDiffusion3Pipeline) -> None:
    ids = token_ids(pipe.tokenizer, ["two green rings"])
    first_end = int((ids[0] == pipe.tokenizer.eos_token_id).nonzero()[0])
    changed = ids.clone()
    changed[0, first_end + 1 :] = int(pipe.tokenizer("red").input_ids[1])
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        with torch.no_grad():
            # Attention is causal: what follows the end of the text cannot reach a vector read there.
            assert torch.allclose(encoder(ids).text_embeds, encoder(changed).text_embeds, atol=1e-5)
            other = token_ids(pipe.tokenizer, ["two green stars"])
            assert not torch.allclose(encoder(ids).text_embeds, encoder(other).text_embeds, atol=1e-2)


def test_autoencoder_keeps_scenes_readable(pipe: StableDiffusion3Pipeline) -> None:
    # 99 % of 200: an autoencoder that truly keeps 99.7 % fails this in less than one of 300 draws; the draw is fixed.
    assert assess.round_trip(pipe.vae, 200) >= 0.99


def test_latents_are_normalised(pipe: StableDiffusion3Pipeline) -> None:
    from align.playground.data import to_tensor
    from align.playground.scenes import render, sample_scene

    rng = np.random.default_rng(5)
    images = to_tensor(np.stack([render(sample_scene(rng)) for _ in range(64)]))
    with torch.no_grad():
        raw = pipe.vae.encode(images).latent_dist.mode()
    latents = (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    # 64 images of about 10 independent regions each: the sample deviates by a few percent.
    assert abs(latents.mean().item()) < 0.1
    assert abs(latents.std().item() - 1) < 0.1


def test_plain_pipeline_draws_at_its_default_size(pipe: StableDiffusion3Pipeline) -> None:
    for length in (0, 1):
        image = pipe("a red circle", num_inference_steps=2, guidance_scale=4, max_sequence_length=length).images[0]
        assert image.size == (64, 64)


@pytest.mark.parametrize(("guidance", "bar"), [(1.0, 0.60), (3.0, 0.60)])
def test_pictures_follow_prompts(pipe: StableDiffusion3Pipeline, guidance: float, bar: float) -> None:
    rows = prompts("seen_test", 32)
    images = assess.generate(pipe, [r["prompt"] for r in rows], list(range(32)), 10, guidance)
    verdicts = verify_batch(images, [r["metadata"] for r in rows])
    # Measured .75 and .77; the standard error over 32 prompts is about .04. Pictures of other prompts score .26.
    assert np.mean([v.graded for v in verdicts]) >= bar
    others = verify_batch(images, [r["metadata"] for r in rows[1:] + rows[:1]])
    assert np.mean([v.graded for v in verdicts]) > np.mean([v.graded for v in others]) + 0.25


def test_the_card_states_these_weights(pipe: StableDiffusion3Pipeline) -> None:
    figures = json.loads((WEIGHTS / "pretrain.json").read_text())
    for part, count in figures["parameters"].items():
        assert sum(p.numel() for p in getattr(pipe, part).parameters()) == count
    assert figures["vae"]["psnr_db"] >= 33
    assert (WEIGHTS / "README.md").exists()
