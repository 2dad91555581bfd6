"""The model seen by the loops is the plain pipeline: same velocities, same images, base untouched by the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from align.errors import UserError
from align.models.attention import DispatchedJointAttention
from align.models.base import Conditioning, ImageModel, LoraSettings, ModelConfig, load_model
from align.models.sd3 import SD3Model
from samplers.grids import make_grid
from samplers.rollout import solve

PROMPTS = ["a red circle", "two blue star and a ring", "a cat left of the dog"]
TOKENS = 8


@pytest.fixture
def load(sd35) -> Callable[..., ImageModel]:
    """load(**settings of the model) -> the tiny model with its prompts embedded, without an adapter."""

    def make(**settings: Any) -> ImageModel:
        config = ModelConfig(**{"path": str(sd35), "max_sequence_length": TOKENS, **settings})
        model = load_model(config)
        model.cache_prompts(PROMPTS)
        return model

    return make


def with_adapter(model: ImageModel, seed: int = 0) -> list[torch.nn.Parameter]:
    """Attach a LoRA far from zero."""
    parameters = model.add_lora(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.finish_setup()
    return parameters


def inputs(model: ImageModel, seed: int = 0) -> tuple[Tensor, Tensor, Conditioning]:
    """Three latents at three times."""
    x = torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor([0.95, 0.5, 0.1]), model.conditioning(PROMPTS)


def test_guidance_mixes_two_single_predictions(load):
    model = load()
    x, t, cond = inputs(model)
    with torch.no_grad():
        conditional = model.velocity(x, t, cond)
        unconditional = model.velocity(x, t, model.conditioning([""] * len(x)))
        model.guidance_scale = 3.5
        guided = model.velocity(x, t, cond)
    assert (conditional - unconditional).abs().max() > 1e-3
    torch.testing.assert_close(guided, unconditional + 3.5 * (conditional - unconditional), rtol=1e-5, atol=1e-5)


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(load):
    model = load()
    x, t, cond = inputs(model)
    with torch.no_grad():
        together = model.velocity(x, t, cond)
        single = torch.cat([model.velocity(x[[i]], t[[i]], cond.take([i])) for i in range(len(x))])
    torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("with_t5", [True, False], ids=["t5", "no t5"])
def test_images_are_those_of_the_plain_pipeline(load, sd35, sd35_without_t5, with_t5, guidance):
    folder = sd35 if with_t5 else sd35_without_t5
    model = load(path=str(folder))
    model.finish_setup()
    model.guidance_scale = guidance
    latents, _, cond = inputs(model)
    grid = make_grid("scheduler", 4, scheduler=model.pipe.scheduler)
    ours = model.decode(solve(model.velocity, latents, cond, grid))
    absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(
        PROMPTS,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=TOKENS if with_t5 else 0,
        output_type="pt",
    ).images
    assert ours.shape == plain.shape == (3, 3, 16, 16)
    assert ours.std() > 0.01
    assert (ours - plain).abs().max() <= 1e-5


def test_reference_is_the_base_bit_for_bit(load):
    base, model = load(), load()
    base.finish_setup()
    x, t, cond = inputs(base)
    with torch.no_grad():
        expected = base.velocity(x, t, cond)
        with_adapter(model)
        tuned = model.velocity(x, t, cond)
        with model.reference():
            reference = model.velocity(x, t, cond)
        again = model.velocity(x, t, cond)
    assert torch.equal(reference, expected)
    assert (tuned - expected).abs().max() > 1e-2
    assert torch.equal(again, tuned)


def test_a_fresh_adapter_changes_nothing(load):
    model = load()
    x, t, cond = inputs(model)
    with torch.no_grad():
        before = model.velocity(x, t, cond)
        parameters = model.add_lora(seed=0)
        assert torch.equal(model.velocity(x, t, cond), before)
    trainable = {id(p) for p in model.network.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in parameters}
    assert {p.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("name", ["math", "auto"])
def test_attention_backends_agree(load, name):
    ours, sdpa = load(attention=name), load(attention="sdpa")
    x, t, cond = inputs(ours)
    for model in (ours, sdpa):
        with_adapter(model)
    with torch.no_grad():
        torch.testing.assert_close(ours.velocity(x, t, cond), sdpa.velocity(x, t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"), [("sdpaa", r"unknown backend 'sdpaa' \(did you mean 'sdpa'\?\)"), ("flahs", "'flash'")]
)
def test_unknown_attention_backend(load, name, message):
    with pytest.raises(UserError, match=message):
        load(attention=name).finish_setup()


@pytest.mark.parametrize("name", ["xformers", "flash", "efficient"])
def test_attention_backend_without_a_kernel_for_cpus(load, name):
    with pytest.raises(UserError, match=f"model.attention: backend '{name}' does not run here") as caught:
        load(attention=name).finish_setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [0, 1], ids=["first", "last, text output unused"])
@pytest.mark.parametrize("which", ["attn", "attn2"], ids=["joint", "image only"])
def test_attention_is_that_of_diffusers(load, block, which):
    attention = getattr(load().network.transformer_blocks[block], which, None)
    if attention is None:
        pytest.skip("only the first block has a second attention")
    image, text = torch.randn(2, 16, 16), torch.randn(2, 9, 16)
    arguments = (image, text) if which == "attn" else (image,)
    ours = DispatchedJointAttention()
    ours._attention_backend = AttentionBackendName.NATIVE
    with torch.no_grad():
        found = ours(attention, *arguments)
        expected = JointAttnProcessor2_0()(attention, *arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradient_checkpointing_recomputes_under_gradients_only(load):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = load(gradient_checkpointing=checkpointing)
        parameters = with_adapter(model)
        x, t, cond = inputs(model)
        count: list[int] = []
        model.network.transformer_blocks[0].norm1.register_forward_hook(lambda *_, count=count: count.append(1))
        with torch.no_grad():
            model.velocity(x, t, cond)
        sampling = len(count)
        model.velocity(x, t, cond).square().mean().backward()
        calls.append((sampling, len(count) - sampling))
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    assert calls == [(1, 1), (1, 2)]
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


def test_unknown_lora_target(load):
    with pytest.raises(UserError, match=r"model\.lora\.targets: .*nowhere"):
        load(lora=LoraSettings(targets=["nowhere"])).add_lora(0)


def test_released_encoders(load):
    model = load()
    known = model.conditioning(PROMPTS).tensors
    model.release_encoders()
    assert all(torch.equal(v, known[k]) for k, v in model.conditioning(PROMPTS).tensors.items())
    with pytest.raises(UserError, match="encoders were released, so 'a green dog' cannot be embedded"):
        model.conditioning(["a green dog"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(load, precision):
    """Frozen weights in half precision; adapter, decoder and what comes out in float32, close to full precision."""
    half, full = load(precision=precision), load()
    for model in (half, full):
        parameters = with_adapter(model)
        assert {p.dtype for p in parameters} == {torch.float32}
    assert half.network.proj_out.weight.dtype == half.dtype
    assert next(half.pipe.vae.parameters()).dtype == torch.float32
    x, t, cond = inputs(full)
    with torch.no_grad():
        found = half.velocity(x, t, half.conditioning(PROMPTS))
        expected = full.velocity(x, t, cond)
    assert found.dtype == torch.float32
    # bf16 keeps 8 bits: a few roundings in a row stay within a few per cent of the velocity's size
    assert (found - expected).norm() / expected.norm() < 0.05


def test_family_is_read_from_the_pipeline(load):
    model = load()
    assert isinstance(model, SD3Model)
    assert model.latent_shape == (16, 8, 8)
    assert load(resolution=32).latent_shape == (16, 16, 16)
