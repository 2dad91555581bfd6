"""Stable Diffusion 1.5 and XL seen by the loops: the images are those of the plain pipelines with DDIM."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from align.checkpoint import export_adapter
from align.errors import UserError
from align.models.attention import DispatchedAttention
from align.models.base import Conditioning, ImageModel, LoraSettings, ModelConfig, load_model
from align.models.sd import SDModel
from align.models.sdxl import SDXLModel
from samplers.rollout import solve
from samplers.vp import alpha_sigma, timestep_of, vp_scale

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
FAMILIES = ["sd", "sdxl"]
STEPS = 4
PROMPTS = ["a red circle", "two blue star and a ring", "a cat left of the dog"]
# pure noise at the last timestep, and the spacing that starts there
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[..., Path]:
    """folder(family, **what): a saved pipeline of that kind, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, **what: Any) -> Path:
        key = (family, *((k, repr(v)) for k, v in what.items()))
        if key not in made:
            made[key] = TINY[f"{family}_pipeline"](tmp_path_factory.mktemp(family), **what)
        return made[key]

    return make


@pytest.fixture
def load(folder) -> Callable[..., ImageModel]:
    """load(family, what the folder holds, **settings of the model): with its prompts embedded, without an adapter."""

    def make(family: str, what: dict[str, Any] | None = None, **settings: Any) -> ImageModel:
        model = load_model(ModelConfig(path=str(folder(family, **what or {})), **settings))
        model.cache_prompts(PROMPTS)
        return model

    return make


def scheduler(kind: type = DDIMScheduler, **settings: Any) -> Any:
    unclipped = {"clip_sample": False} if kind is DDIMScheduler else {}
    return kind(**TINY["SCHEDULE"] | unclipped | settings)


def attentions(network: UNet2DConditionModel) -> list[Any]:
    """Every attention layer, in order."""
    return [m for n, m in network.named_modules() if n.endswith((".attn1", ".attn2"))]


def with_adapter(model: ImageModel) -> list[torch.nn.Parameter]:
    """Attach a LoRA far from zero."""
    parameters = model.add_lora(seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.finish_setup()
    return parameters


def inputs(model: ImageModel) -> tuple[Tensor, Tensor, Conditioning]:
    """Three states at three times."""
    x = torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.9, 0.5, 0.1]), model.conditioning(PROMPTS)


def plain_pipeline(folder: Path) -> DiffusionPipeline:
    """The folder's pipeline with DDIM, which like Stable Diffusion's own configuration ends at timestep 0."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(model: ImageModel, noise: Tensor, num_steps: int = STEPS) -> Tensor:
    """Images from standard normal noise by the Euler solver over the model's own grid."""
    grid = model.grid("scheduler", num_steps)
    start = noise * model.noise_scale(float(grid[0]))
    return model.decode(solve(model.velocity, start, model.conditioning(PROMPTS), grid))


SCHEDULERS = {
    "as published": None,
    "v": scheduler(prediction_type="v_prediction"),
    "v, zero terminal": scheduler(prediction_type="v_prediction", **ZERO_TERMINAL),
    "sample": scheduler(prediction_type="sample"),
    "dpm": scheduler(DPMSolverMultistepScheduler, timestep_spacing="trailing"),
}


@pytest.mark.parametrize("which", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_plain_pipeline(load, folder, family, which):
    what = {"scheduler": SCHEDULERS[which]}
    model = load(family, what)
    model.finish_setup()
    noise, _, _ = inputs(model)
    pipe = plain_pipeline(folder(family, **what))
    for guidance in (1.0, 5.0):
        model.guidance_scale = guidance
        ours = images(model, noise)
        plain = pipe(
            PROMPTS, latents=noise, num_inference_steps=STEPS, guidance_scale=guidance, output_type="pt"
        ).images
        assert ours.shape == plain.shape == (3, 3, 16, 16)
        assert (ours - plain).abs().max() <= 1e-4
        assert ours.std() > 0.01
    model.guidance_scale = 1.0
    assert (images(model, noise) - ours).abs().max() > 1e-2  # guidance was seen


def test_the_empty_prompt_of_sdxl_follows_the_pipelines_setting(load, folder):
    zeros, text = load("sdxl"), load("sdxl", {"zeros": False})
    assert not any(v.any() for v in zeros.conditioning([""]).tensors.values())
    assert all(v.any() for v in text.conditioning([""]).tensors.values())
    assert torch.equal(zeros.conditioning(PROMPTS).tensors["embeds"], text.conditioning(PROMPTS).tensors["embeds"])
    noise, _, _ = inputs(text)
    text.guidance_scale = 5.0
    plain = plain_pipeline(folder("sdxl", zeros=False))(
        PROMPTS, latents=noise, num_inference_steps=STEPS, guidance_scale=5.0, output_type="pt"
    )
    assert (images(text, noise) - plain.images).abs().max() <= 1e-4


def test_the_size_conditions_of_sdxl_follow_the_resolution(load, folder):
    model = load("sdxl", resolution=32)
    noise, _, _ = inputs(model)
    assert noise.shape == (3, 4, 16, 16)
    pipe = plain_pipeline(folder("sdxl"))
    arguments = {"latents": noise, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"}
    found = images(model, noise)
    assert (found - pipe(PROMPTS, height=32, width=32, **arguments).images).abs().max() <= 1e-4
    cropped = pipe(PROMPTS, height=32, width=32, original_size=(16, 16), **arguments).images
    assert (found - cropped).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_velocity_is_the_predicted_noise_minus_the_predicted_data(load, prediction):
    model = load("sd", {"scheduler": scheduler(prediction_type=prediction)})
    table = model.grid("scheduler", 50)
    x, _, cond = inputs(model)
    t = table[[0, 25, 49]]
    alpha, sigma = (level.float().view(-1, 1, 1, 1) for level in alpha_sigma(t))
    x_vp = x * (alpha + sigma)
    with torch.no_grad():
        out = model.network(x_vp, torch.tensor([981, 481, 1]), encoder_hidden_states=cond.tensors["embeds"]).sample
        data, noise = {
            "epsilon": lambda: ((x_vp - sigma * out) / alpha, out),
            "v_prediction": lambda: (alpha * x_vp - sigma * out, alpha * out + sigma * x_vp),
            "sample": lambda: (out, (x_vp - alpha * out) / sigma),
        }[prediction]()
        torch.testing.assert_close(model.velocity(x, t, cond), noise - data, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [None, scheduler(EulerDiscreteScheduler), scheduler(DPMSolverMultistepScheduler)])
def test_the_grid_is_that_of_ddim_on_the_folders_schedule(load, kind):
    model = load("sd", {"scheduler": kind})
    grid = model.grid("scheduler", 50)
    expected = DDIMScheduler.from_config(model.pipe.scheduler.config)
    expected.set_timesteps(50)
    timesteps = expected.timesteps.tolist()
    assert timestep_of(grid[:-1], model._table).tolist() == timesteps
    if timesteps[-1] > 0:
        assert timestep_of(grid, model._table).tolist() == [*range(981, 0, -20), 0]
        assert model.end_time == float(grid[-1]) == pytest.approx(0.0283409, abs=1e-7)
    else:  # linspace spacing already steps from timestep 0
        assert model.end_time == float(grid[-1]) == 0
    assert (grid.dtype, grid.device.type) == (torch.float32, "cpu")


def test_start_and_end_in_flow_coordinates(load):
    model = load("sd")
    grid = model.grid("scheduler", 50)
    alpha, sigma = alpha_sigma(grid[0])
    assert model.noise_scale(float(grid[0])) == pytest.approx(float(1 / (alpha + sigma)), abs=1e-12)
    final = torch.randn(2, *model.latent_shape)
    torch.testing.assert_close(model.clean(final) * vp_scale(grid[-1]).float(), final)
    upscaled = model.clean(final) / model.pipe.vae.config.scaling_factor
    with torch.no_grad():
        expected = (model.pipe.vae.decode(upscaled).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(final), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "num_steps", "message"),
    [
        (
            "linspace_shift",
            10,
            "sampler.grid: sd models have timesteps of their own, not 'linspace_shift'; use scheduler",
        ),
        ("scheduler", 1000, "sampler.num_steps: 1000 are too many; use at most 500"),
        ("scheduler", 1001, "sampler.num_steps: 1001 are too many; use at most 500"),
    ],
)
def test_grids_that_cannot_be(load, kind, num_steps, message):
    with pytest.raises(UserError, match=message):
        load("sd").grid(kind, num_steps)


def test_noise_prediction_from_pure_noise_is_refused(load):
    model = load("sd", {"scheduler": scheduler(**ZERO_TERMINAL)})
    with pytest.raises(UserError, match="starts from pure noise, .* v_prediction .* or rescale_betas_zero_snr false"):
        model.grid("scheduler", 10)


def test_long_prompts_are_cut_as_the_pipeline_does(load):
    model = load("sd")
    text = "a red circle and " * 10
    embeds = model.conditioning([text]).tensors["embeds"]
    assert embeds.shape == (1, 77, 16)
    torch.testing.assert_close(embeds, model.conditioning([text + "a dog"]).tensors["embeds"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_adapter_gives_the_same_images_in_a_plain_pipeline(load, folder, tmp_path, family):
    model = load(family, lora=LoraSettings(rank=2, alpha=6))
    with_adapter(model)
    model.release_encoders()
    model.guidance_scale = 5.0
    noise, _, _ = inputs(model)
    ours = images(model, noise)
    export_adapter(model, tmp_path / "adapter")
    pipe = plain_pipeline(folder(family))
    arguments = {"latents": noise, "num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"}
    base = pipe(PROMPTS, **arguments).images
    pipe.load_lora_weights(tmp_path / "adapter")
    assert (ours - pipe(PROMPTS, **arguments).images).abs().max() <= 1e-4
    assert (ours - base).abs().max() > 1e-2
    again = load(family, lora=LoraSettings(rank=2, alpha=6, init_from=str(tmp_path / "adapter")))
    again.add_lora(seed=1)
    again.finish_setup()
    again.guidance_scale = 5.0
    assert torch.equal(images(again, noise), ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_covers_every_attention_and_starts_at_zero(load, family):
    model = load(family)
    x, t, cond = inputs(model)
    with torch.no_grad():
        before = model.velocity(x, t, cond)
        parameters = model.add_lora(seed=0)
        assert torch.equal(model.velocity(x, t, cond), before)
    assert len(parameters) == 2 * 4 * len(attentions(model.network))  # A and B of to_q, to_k, to_v and to_out.0
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {id(p) for p in model.network.parameters() if p.requires_grad} == {id(p) for p in parameters}


class FusedAttention(TorchDispatchMode):
    """Head sizes of the fused attention kernels that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.sizes.append(args[0].shape[-1])
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_switch_acts_on_every_layer(load, family):
    model = load(family, attention="sdpa")
    x, t, cond = inputs(model)
    with torch.no_grad():
        untouched = model.velocity(x, t, cond)
        layers = sum(isinstance(m.processor, AttnProcessor2_0) for m in attentions(model.network))
        model.finish_setup()
        with FusedAttention() as fused:
            found = model.velocity(x, t, cond)
        other = load(family, attention="math")
        other.finish_setup()
        with FusedAttention() as plain:
            products = other.velocity(x, t, cond)
    assert layers == len(fused.sizes) == len(attentions(model.network)) > 0
    assert plain.sizes == []  # only matrix products
    torch.testing.assert_close(found, untouched, rtol=0, atol=1e-6)
    torch.testing.assert_close(products, untouched, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("which", [0, 1], ids=["self", "cross"])
def test_attention_is_that_of_diffusers(load, which, masked):
    layer = attentions(load("sd").network)[which]
    hidden = torch.randn(2, 16, layer.query_dim)
    source = torch.randn(2, 7, 16) if layer.is_cross_attention else None
    assert layer.is_cross_attention == bool(which)
    mask = torch.randn(2, 1, 7 if which else 16) if masked else None
    ours = DispatchedAttention()
    ours._attention_backend = AttentionBackendName.NATIVE
    with torch.no_grad():
        found = ours(layer, hidden, source, mask)
        expected = AttnProcessor2_0()(layer, hidden, source, mask)
        assert not masked or (expected - AttnProcessor2_0()(layer, hidden, source)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_layers_that_would_not_obey_the_switch_are_named(load):
    for attention in ("math", "sdpa"):
        model = load("sd", attention=attention)
        special = AttnProcessor()
        attentions(model.network)[0].set_processor(special)
        if attention == "math":
            with pytest.raises(UserError, match="layers with AttnProcessor ignore the choice of a backend"):
                model.finish_setup()
        else:
            model.finish_setup()
            assert attentions(model.network)[0].processor is special


def test_a_backend_is_tried_with_the_networks_own_head_sizes(load):
    model = load("sd")
    with FusedAttention() as seen:
        model.finish_setup()
    assert seen.sizes == [8, 16]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(load, family):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = load(family, gradient_checkpointing=checkpointing)
        parameters = with_adapter(model)
        count: list[int] = []
        attentions(model.network)[0].register_forward_hook(lambda *_, count=count: count.append(1))
        x, t, cond = inputs(model)
        model.velocity(x, t, cond).square().mean().backward()
        calls.append(len(count))
        gradients.append([p.grad for p in parameters])
    assert calls == [1, 2]
    assert max(float(g.abs().max()) for g in gradients[0]) > 1e-3
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_the_vae_and_what_comes_out_in_float32(load, family, precision):
    half, full = load(family, precision=precision), load(family)
    for model in (half, full):
        with_adapter(model)
    assert {p.dtype for p in half.pipe.vae.parameters()} == {torch.float32}
    assert half.network.conv_in.weight.dtype == half.dtype
    x, t, cond = inputs(full)
    with torch.no_grad():
        found, expected = half.velocity(x, t, half.conditioning(PROMPTS)), full.velocity(x, t, cond)
    assert found.dtype == half.decode(x).dtype == torch.float32
    torch.testing.assert_close(half.decode(x), full.decode(x))
    # bf16 keeps 8 bits: a few roundings in a row stay within a few per cent of the velocity's size
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(load, family):
    model = load(family)
    x, t, cond = inputs(model)
    with torch.no_grad():
        together = model.velocity(x, t, cond)
        single = torch.cat([model.velocity(x[[i]], t[[i]], cond.take([i])) for i in range(len(x))])
    torch.testing.assert_close(together, single, rtol=1e-5, atol=1e-5)


def test_families_are_read_from_the_pipeline(load):
    assert isinstance(load("sd"), SDModel)
    assert isinstance(load("sdxl"), SDXLModel)
    assert load("sd").latent_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("family", "what", "message"),
    [
        ("sd", {"in_channels": 9}, "maps 9 to 4 channels and the VAE has 4: it is an inpainting model"),
        ("sd", {"in_channels": 8}, "maps 8 to 4 channels and the VAE has 4: it is no text-to-image model"),
        ("sdxl", {"time_cond_proj_dim": 8}, "takes the guidance scale as an input"),
        ("sd", {"scheduler": EDMEulerScheduler()}, "its EDMEulerScheduler has no beta schedule"),
        ("sd", {"scheduler": scheduler(DPMSolverMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True)},
         "prediction_type 'flow_prediction'; supported: epsilon, v_prediction, sample"),
    ],
)  # fmt: skip
def test_models_that_need_more_are_refused_at_load(folder, family, what, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(ModelConfig(path=str(folder(family, **what))))
    assert "\n" not in str(caught.value)


def test_a_family_that_does_not_fit_is_refused(folder):
    for forced, other in (("sd", "sdxl"), ("sdxl", "sd")):
        with pytest.raises(UserError, match=r"model.family: this UNet .*; use family=auto"):
            load_model(ModelConfig(path=str(folder(other)), family=forced))


def test_a_refiner_is_refused(folder, tmp_path):
    index = json.loads((folder("sdxl") / "model_index.json").read_text())
    for part in folder("sdxl").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").unlink()
    index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is a StableDiffusionXLImg2ImgPipeline; supported"):
        load_model(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="this is a refiner"):
        load_model(ModelConfig(path=str(tmp_path), family="sdxl"))


def test_a_safety_checker_is_left_out_without_a_word(folder, tmp_path, caplog, recwarn, capsys):
    """The folder names one whose weights are not there, as after a download without it."""
    index = json.loads((folder("sd") / "model_index.json").read_text())
    for part in folder("sd").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "model_index.json").unlink()
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = load_model(ModelConfig(path=str(tmp_path)))
    assert model.pipe.safety_checker is None
    assert "safety" not in caplog.text + capsys.readouterr().err + "".join(str(w.message) for w in recwarn)
