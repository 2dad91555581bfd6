"""The condition-consistency loop on a genuine pipeline: its gradient against the papers' procedure, its data, its result."""

from __future__ import annotations

import json
import runpy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from rich.console import Console
from torch import Tensor

from align.checkpoint import export_adapter
from align.config import CONFIG_DIR, load_config
from align.control_checks import control_notes
from align.control_data import load_conditions, load_examples
from align.control_loop import _gradients, _loss, draw, run_iteration
from align.errors import UserError
from align.evaluate import EVAL_STREAM, sample_images
from align.geometry import memory_estimate
from align.models.base import ModelConfig, load_model
from align.models.controlnet import ControlNetSDModel, from_unet
from align.playground.layouts import CLASSES, IGNORE, condition_image, label_map, scene_of, scene_prompts
from align.playground.scenes import render
from align.playground.train_segmenter import build_segmenter, save
from align.prompts import load_prompts
from align.run import Run, start
from align.targets import prompt_ids
from samplers.noise import keyed_normal

UNET = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Path:
    return UNET["sd_pipeline"](tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    """Folder of a Segformer with random weights that knows the playground's classes."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    model = build_segmenter().eval()
    torch.nn.init.normal_(model.decode_head.classifier.weight, std=1.0)  # an opinion that changes with the image
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A .jsonl of six real images with condition and labels, wider than high."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for i, row in enumerate(scene_prompts("train_scenes", 6)):
        scene = scene_of(row["metadata"])
        labels = label_map(scene)
        labels[:4] = IGNORE
        for name, picture in (("image", render(scene)), ("condition", condition_image(labels)), ("labels", labels)):
            wide = np.concatenate([np.zeros_like(picture[:, :8]), picture, np.zeros_like(picture[:, :8])], 1)
            Image.fromarray(wide).save(folder / f"{name}-{i}.png")
        entry = {key: f"{key}-{i}.png" for key in ("image", "condition", "labels")}
        lines.append(json.dumps({"prompt": row["prompt"], **entry}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def configure(tmp_path, write_config, sd15, segmenter, files) -> Callable[..., Path]:
    """configure(preset, changes) -> a small run on `files`."""

    def make(preset: str = "ctrl_u", changes: dict[str, Any] | None = None) -> Path:
        network = {} if preset == "controlnet" else {"network": str(segmenter), "grad_scale": 0.5, "ramp_updates": 0}
        settings: dict[str, Any] = {
            "model": {"path": str(sd15), "gradient_checkpointing": False},
            "prompts": {"train": str(files), "eval": str(files)},
            "rewards": {},
            "consistency": {"t_max": 600, "checkpointing": False, **network},
            "optim": {"lr": 1e-3, "warmup_updates": 0, "ema_decay": 0.5},
            "train": {"prompts_per_iteration": 4, "group_size": 1, "updates_per_iteration": 1, "iterations": 4},
            "eval": {"every": 2},
            "checkpoint": {"every": 2},
        }
        path = write_config(tmp_path, preset, settings)
        if changes:
            path = write_config(
                tmp_path, preset, {k: {**settings.get(k, {}), **v} for k, v in {**settings, **changes}.items()}
            )
        return path

    return make


@pytest.fixture
def begin(configure, on_cpu) -> Callable[..., Run]:
    """begin(preset, *overrides) -> a run before its first iteration, its ControlNet no longer without effect."""

    def make(preset: str = "ctrl_u", *overrides: str) -> Run:
        run = start(load_config(configure(preset), overrides), Console(quiet=True))
        generator = torch.Generator().manual_seed(11)
        for parameter in run.parameters:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return run

    return make


def quiet(*_: object) -> None:
    pass


def gradient(run: Run, *parts: list[int]) -> Tensor:
    """The gradient of an update of all samples, taken in `parts`, as one vector."""
    run.optimizer.zero_grad(set_to_none=True)
    prompts = [run.train_prompts[i] for i in prompt_ids(run, 0)]
    everyone = list(range(run.shape.samples))
    for part in parts or (everyone,):
        found = _gradients(run, part, everyone, prompts, defaultdict(float), quiet)
        assert isinstance(found, dict), found
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in run.parameters])


def distance(found: Tensor, expected: Tensor) -> float:
    assert float(expected.norm()) > 0
    return float((found - expected).norm() / expected.norm())


def procedure(run: Run, swapped: bool = False, penalty: float = 1.0) -> Tensor:
    """Gradient of the released procedure, written out on diffusers' own modules and DDPM's own variables.

    swapped: with the divergence the other way round; penalty: factor of the penalty's weight.
    """
    settings, model = run.config.consistency, run.model
    prompts = [run.train_prompts[i] for i in prompt_ids(run, 0)]
    labelled = run.condition.kind == "probabilistic"
    examples = load_examples(prompts, 16, labelled=labelled)
    draws = draw(run, list(range(4)))
    vae, unet, controlnet, network = model.pipe.vae, model.network, model.controlnet, run.condition
    z0 = vae.encode(2 * examples.images - 1).latent_dist.mode() * vae.config.scaling_factor
    kept = model.schedule.alphas_cumprod[draws.timesteps].view(2, 4, 1, 1, 1)
    z = torch.cat(list(kept.sqrt() * z0 + (1 - kept).sqrt() * draws.noise))
    embeds = model.conditioning([p.text for p in prompts]).tensors["embeds"].repeat(2, 1, 1)
    t = draws.timesteps.flatten()
    control = examples.conditions.repeat(2, 1, 1, 1)
    down, middle = controlnet(z, t, embeds, control, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    noise = unet(z, t, embeds, **residuals).sample
    diffusion = F.mse_loss(noise, draws.noise.flatten(0, 1))
    a = kept.flatten(0, 1)
    clean = (z - (1 - a).sqrt() * noise) / a.sqrt()
    images = (vae.decode(clean / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    one, two = network.outputs(images).chunk(2)
    if labelled:
        # torch's KL takes the log-probabilities of the input first, the target second; the scale is inside u
        first, second = (two, one) if swapped else (one, two)
        u = settings.ctrlu.u_scale * F.kl_div(first.log_softmax(1), second.softmax(1), reduction="none").sum(1)
        valid = examples.labels != IGNORE
        rectified = F.cross_entropy(one, examples.labels, ignore_index=IGNORE, reduction="none") * torch.exp(-u)
        r, eta = (rectified * valid).sum((1, 2)) / valid.sum((1, 2)), 1.0
    else:
        # squared error from what the filter finds in the real image; the scale is that of the penalty alone
        u = (one - two).abs().mean(1)
        r = ((one - network.outputs(examples.images)).square().mean(1) * torch.exp(-u)).mean((1, 2))
        eta = settings.ctrlu.u_scale
    first, second = (t <= settings.t_max for t in draws.timesteps)
    assert 0 < first.sum() < 4
    assert not torch.equal(first, second)  # so that this is wrong with the mask of the auxiliary timestep
    m = first.float()
    loss = diffusion + settings.grad_scale * (m * r).sum() / m.sum()
    loss = loss + penalty * eta * (m * u.mean((1, 2))).sum() / m.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, run.parameters)])


@pytest.mark.parametrize("network", ["segmentation", "edges"])
@pytest.mark.parametrize("share_noise", [True, False])
def test_the_gradient_is_that_of_the_released_procedure(begin, network, share_noise):
    """And not that without the penalty, nor with the divergence the other way round, which differs in third order only."""
    settings = {"ctrlu.add_timestep": 400, "t_max": 500, "ctrlu.share_noise": share_noise, "ctrlu.u_scale": 1.0}
    settings |= {"network": "edges", "ctrlu.u_scale": 0.3} if network == "edges" else {}
    run = begin("ctrl_u", *(f"consistency.{key}={value}" for key, value in settings.items()))
    found = gradient(run)
    assert distance(found, procedure(run)) < 1e-5
    assert distance(found, procedure(run, penalty=0.0)) > 1e-2
    if network == "segmentation":
        assert distance(found, procedure(run, swapped=True)) > 2e-4


def test_the_ramp_counts_updates(begin):
    run = begin("ctrl_u", "consistency.grad_scale=0.5", "consistency.ramp_updates=4")
    run.counters.updates = 1
    ramped = gradient(run)
    settings = run.config.consistency
    settings.grad_scale, settings.ramp_updates = 0.125, 0
    assert torch.equal(gradient(run), ramped)
    settings.grad_scale = 0.5
    assert distance(gradient(run), ramped) > 1e-2


def test_neither_micro_batches_nor_shares_change_the_gradient(begin):
    """Also where one part has no sample that is judged: the mean is over those of the whole update."""
    run = begin("ctrl_u", "train.micro_batch=4")
    whole = gradient(run)
    run.config.train.micro_batch = 1
    assert distance(gradient(run), whole) < 1e-5
    assert distance(gradient(run, [2, 0], [3, 1]), whole) < 1e-5


def test_recomputed_activations_change_nothing(begin):
    whole = gradient(begin("ctrl_u"))
    run = begin("ctrl_u", "model.gradient_checkpointing=true", "consistency.checkpointing=true")
    assert distance(gradient(run), whole) < 1e-5
    assert run.model.controlnet.is_gradient_checkpointing
    assert run.model.pipe.vae.is_gradient_checkpointing


def test_equal_predictions_make_ctrl_u_controlnet_pp(begin):
    twice = begin("ctrl_u", "consistency.ctrlu.add_timestep=0")
    expected = gradient(twice)
    twice.config.consistency.ctrlu.mode = "off"
    assert distance(gradient(twice), expected) < 1e-5


def test_without_anyone_to_judge_the_loss_is_the_diffusion_loss(begin):
    run = begin("ctrl_u", "consistency.t_max=0")
    assert bool((draw(run, [0, 1, 2, 3]).timesteps[0] > 0).all())
    found = gradient(run)
    run.config.consistency.t_max = 999
    assert distance(gradient(run), found) > 1e-2
    run.condition = None  # both predictions still count for the diffusion loss
    assert torch.equal(gradient(run), found)
    metrics = run_iteration(begin("ctrl_u", "consistency.t_max=0"), quiet)
    assert metrics["train/active_fraction"] == 0.0
    assert "reward/mean" not in metrics


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_promised_size_is_that_of_the_controlnet(begin, factor):
    """Also of one made from the UNet of a model whose VAE has another factor."""
    made = from_unet(UNET["unet"](), factor)
    assert made.controlnet_cond_embedding(torch.zeros(1, 3, 8 * factor, 8 * factor)).shape[-1] == 8
    if factor == 2:
        run = begin("controlnet")
        promised = memory_estimate(run.config)["trainable_parameters"]
        assert promised == sum(p.numel() for p in run.parameters) == sum(p.numel() for p in made.parameters())


def test_draws_are_those_of_the_sample_alone(begin):
    run = begin("ctrl_u")
    together, alone = draw(run, [0, 1, 2]), draw(run, [2])
    assert torch.equal(together.timesteps[:, 2:], alone.timesteps)
    assert torch.equal(together.noise[:, 2:], alone.noise)
    assert torch.equal(together.noise[0], together.noise[1])
    run.config.consistency.ctrlu.share_noise = False
    apart = draw(run, [2])
    assert torch.equal(apart.noise[0], alone.noise[0])
    assert not torch.equal(apart.noise[1], alone.noise[1])


def test_files_are_cut_as_their_image_is(files):
    """Image, condition and labels of one line stay on top of each other."""
    prompts = load_prompts(str(files))[:2]
    scenes = [scene_of(row["metadata"]) for row in scene_prompts("train_scenes", 2)]
    found = load_examples(prompts, 64, labelled=True)
    for i, scene in enumerate(scenes):
        labels = label_map(scene)
        labels[:4] = IGNORE
        assert torch.equal(found.labels[i], torch.from_numpy(labels).long())
        expected = torch.from_numpy(render(scene)).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(found.images[i], expected, rtol=0, atol=1e-6)
    small = load_examples(prompts, 32, labelled=True)
    assert small.labels.shape == (2, 32, 32)
    agree = (small.labels.repeat_interleave(2, 1).repeat_interleave(2, 2) == found.labels).float().mean()
    assert float(agree) > 0.95


# -- whole runs ---------------------------------------------------------------------------------------------------------


def parameters_at(folder: Path, iteration: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state = load_file(folder / "checkpoints" / f"iteration-{iteration:06d}" / "state.safetensors")
    return {k: v for k, v in state.items() if not k.startswith("rng")}


def test_shared_noise_leaves_little_to_disagree_on(tmp_path, on_cpu):
    """On the playground: with noise of their own two predictions disagree over a hundred times more, and more where D errs."""
    config = load_config(
        CONFIG_DIR / "playground" / "ctrl_u.yaml",
        [f"output_dir={tmp_path}", "prompts.train=playground:train_scenes:24", "prompts.eval=playground:heldout_scenes:1",
         "train.prompts_per_iteration=24", "train.micro_batch=16", "trackers=[]", "model.precision=fp32"],
    )  # fmt: skip
    run = start(config, Console(quiet=True))
    found = {}
    for shared in (True, False):
        config.consistency.ctrlu.share_noise = shared
        run.counters.iteration = 0
        found[shared] = run_iteration(run, quiet)
    assert found[False]["train/disagreement"] > 100 * found[True]["train/disagreement"]
    assert found[True]["train/trust"] > 0.9999
    assert found[False]["train/disagreement_corr"] > 0.2
    # in bf16 most of the little that shared noise leaves is rounding, which is said
    config.consistency.ctrlu.share_noise, run.counters.iteration = True, 0
    texts, sums = [run.train_prompts[i] for i in prompt_ids(run, 0)[:8]], defaultdict(float)
    read = []
    for precision in (torch.float32, torch.bfloat16):
        run.model.network.to(precision)
        run.model.dtype = precision
        with torch.no_grad():
            _, row = _loss(run, texts, load_examples(texts, 64, True), draw(run, list(range(8))), 1.0, 8, 8, sums)
        read.append(float(row["uncertainty"].nanmean()))
    assert read[1] > 3 * read[0]
    assert control_notes(config) == []
    config.model.precision = "bf16"
    (note,) = control_notes(config)
    assert "most of their disagreement is rounding" in note
    config.consistency.ctrlu.share_noise = False
    assert control_notes(config) == []


def test_a_resumed_run_is_the_same_bit_for_bit(configure, train_here):
    path = configure("ctrl_u")
    train_here(path, "name=whole")
    train_here(path, "name=parts", "train.iterations=2")
    summary = train_here(path, "name=parts")
    whole, parts = (parameters_at(path.parent / name, 4) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert summary is not None
    assert Path(summary["controlnet"]) == path.parent / "parts" / "controlnet"
    before = json.loads((path.parent / "parts" / "eval" / "base.json").read_text())
    assert before["metadata"][0]["labels"].endswith("labels-0.png")


def test_a_resumed_run_does_not_compare_with_a_base_of_other_conditions(configure, files, train_here):
    path = configure("controlnet")
    lines = [json.loads(line) for line in files.read_text().splitlines()]
    held_out = files.with_name("held-out.jsonl")
    held_out.write_text(files.read_text())
    train_here(path, "train.iterations=1", f"prompts.eval={held_out}")
    base = path.parent / "run" / "eval" / "base.json"
    untouched = base.stat().st_mtime_ns
    train_here(path, "train.iterations=2", f"prompts.eval={held_out}")
    assert base.stat().st_mtime_ns == untouched
    held_out.write_text("\n".join(json.dumps(line | {"condition": "condition-5.png"}) for line in lines))
    train_here(path, "train.iterations=3", f"prompts.eval={held_out}")
    assert {Path(m["condition"]).name for m in json.loads(base.read_text())["metadata"]} == {"condition-5.png"}


def test_the_result_is_a_controlnet_that_diffusers_uses(begin, sd15, tmp_path):
    """Reloaded, diffusers' own pipeline draws from the same noise what the run's evaluation draws."""
    run = begin("controlnet")
    folder = export_adapter(run.model, tmp_path / "controlnet")
    controlnet = ControlNetModel.from_pretrained(folder)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(sd15, controlnet=controlnet, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    text, conditions = run.eval_prompts[0].text, load_conditions(run.eval_prompts[:1], 16)
    ours = sample_images(run.model, [text], [0], 4, 2.0, 7, conditions)
    noise = keyed_normal(run.model.latent_shape, seed=7, iteration=0, samples=[0], step=0, stream=EVAL_STREAM)
    settings = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
    theirs = pipe(text, conditions, latents=noise, **settings)
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=2e-4)
    other = sample_images(run.model, [text], [0], 4, 2.0, 7, 1 - conditions)
    assert float((ours - other).abs().max()) > 2e-3  # the condition has a say
    again = load_model(ModelConfig(path=str(sd15), controlnet=str(folder)))
    assert torch.equal(sample_images(again, [text], [0], 4, 2.0, 7, conditions), ours)


def test_the_reference_is_the_controlnet_of_the_start(begin):
    run = begin("controlnet")
    model = run.model
    assert isinstance(model, ControlNetSDModel)
    made = load_model(run.config.model)
    prompt, conditions = run.train_prompts[:1], load_conditions(run.train_prompts[:1], 16)

    def picture(which: Any) -> Tensor:
        return sample_images(which, [prompt[0].text], [0], 3, 1.0, 7, conditions)

    moved = picture(model)
    with model.reference():
        torch.testing.assert_close(picture(model), picture(made), rtol=0, atol=1e-6)
    assert torch.equal(picture(model), moved)
    assert not torch.equal(picture(made), moved)


def test_a_trained_controlnet_takes_the_place_of_the_start_and_has_no_strength(begin, tmp_path):
    run = begin("controlnet")
    folder = export_adapter(run.model, tmp_path / "controlnet")
    text, conditions = [run.train_prompts[0].text], load_conditions(run.train_prompts[:1], 16)
    made = load_model(run.config.model)
    before = sample_images(made, text, [0], 3, 1.0, 7, conditions)
    made.load_adapter(folder)
    after = sample_images(made, text, [0], 3, 1.0, 7, conditions)
    assert torch.equal(after, sample_images(run.model, text, [0], 3, 1.0, 7, conditions))
    with made.reference():
        assert torch.equal(sample_images(made, text, [0], 3, 1.0, 7, conditions), before)
    for wrong in (lambda: made.load_adapter(folder), lambda: made.use_adapters({"tuned": 0.5})):
        with pytest.raises(UserError, match="a ControlNet has no strength and cannot be added to another"):
            wrong()
    with pytest.raises(UserError, match="^a ControlNet follows condition images, which a prompt alone does not have"):
        sample_images(made, text, [0], 3, 1.0, 7)


def test_the_diffusion_loss_falls(begin):
    run = begin("controlnet", "optim.lr=3e-3", "train.iterations=12", "optim.ema_decay=0")
    losses = []
    for _ in range(12):
        run.counters.iteration = 0  # the same images, times and noise
        losses.append(run_iteration(run, quiet)["train/diffusion_loss"])
    assert losses[-1] < 0.9 * losses[0]


def test_the_consistency_loss_falls(begin):
    settings = ("optim.lr=3e-3", "consistency.grad_scale=5", "optim.ema_decay=0", "consistency.t_max=999")
    run, rewards = begin("controlnet_pp", *settings), []
    for _ in range(12):
        run.counters.iteration = 0
        rewards.append(run_iteration(run, quiet)["reward/mean"])
    assert rewards[-1] > rewards[0] + 0.02


def test_edges_need_no_labels(begin, files, tmp_path):
    """The filter reads its target from the real image."""
    lines = [json.loads(line) for line in files.read_text().splitlines()]
    path = files.with_name("unlabelled.jsonl")
    path.write_text("\n".join(json.dumps({k: v for k, v in line.items() if k != "labels"}) for line in lines))
    run = begin("ctrl_u", "consistency.network=edges", f"prompts.train={path}", f"prompts.eval={path}")
    assert run.condition is not None
    assert run.condition.kind == "continuous"
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1.0
    strength = run.condition.outputs(step)[0, 0]
    assert float(strength[4, 3]) == pytest.approx(2**-0.5, abs=1e-2)
    assert float(strength[4, 0]) == pytest.approx(0.0, abs=1e-6)
    metrics = run_iteration(run, quiet)
    assert metrics["train/disagreement"] > 0
    assert metrics["train/grad_norm"] > 0


# -- what cannot work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "prompts.train=playground:train",
            r"^prompts.train: condition_consistency needs a real image with its condition",
        ),
        ("consistency.network=/nowhere/at/all", "^consistency.network: there is no folder /nowhere/at/all"),
        ("model.controlnet=/nowhere/at/all", "^model.controlnet: no folder /nowhere/at/all"),
        ("model.controlnet=null", "^model.controlnet: objective.type condition_consistency trains a ControlNet"),
        ("model.path=playground", "^model.controlnet: 'playground' is of the family sd3"),
        ("rewards.brightness.type=brightness", "^rewards.brightness: objective.type condition_consistency trains by"),
        ("objective.type=clipped_ratio", "model.controlnet: objective.type clipped_ratio trains an adapter without"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(begin, override, message):
    with pytest.raises(UserError, match=message):
        begin("ctrl_u", override)


def test_labels_that_the_network_does_not_know_are_refused_at_the_start(begin, files):
    labels = np.full((64, 80), len(CLASSES), np.uint8)
    Image.fromarray(labels).save(files.with_name("beyond.png"))
    line = json.loads(files.read_text().splitlines()[0])
    path = files.with_name("beyond.jsonl")
    path.write_text(json.dumps(line | {"labels": "beyond.png"}))
    with pytest.raises(
        UserError, match="^consistency.network: it knows the classes 0 to 5, and the labels of '.*' hold 6"
    ):
        begin("ctrl_u", f"prompts.train={path}", "train.prompts_per_iteration=1")
    path.write_text(json.dumps(line | {"labels": "image-0.png"}))
    with pytest.raises(UserError, match="is no label map: use a PNG of one channel"):
        begin("ctrl_u", f"prompts.train={path}", "train.prompts_per_iteration=1")
    path.write_text(json.dumps({k: v for k, v in line.items() if k != "labels"}))
    with pytest.raises(UserError, match="has no labels; use a .jsonl"):
        begin("ctrl_u", f"prompts.train={path}", "train.prompts_per_iteration=1")
    path.write_text(json.dumps(line | {"condition": "missing.png"}))
    with pytest.raises(UserError, match=r"^prompts.train: there is no file .*missing.png"):
        begin("ctrl_u", f"prompts.train={path}", "train.prompts_per_iteration=1")


def test_a_controlnet_of_another_unet_is_refused(begin, tmp_path):
    other = UNET["unet"](block_out_channels=(8, 16, 16))
    ControlNetModel.from_unet(other, conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has block_out_channels \[8, 16, 16\], and the UNet"):
        begin("ctrl_u", f"model.controlnet={tmp_path / 'other'}")
    ControlNetModel.from_unet(UNET["unet"]()).save_pretrained(tmp_path / "coarse")
    with pytest.raises(UserError, match="wants 8 pixels a latent, and the VAE of model.path has 2"):
        begin("ctrl_u", f"model.controlnet={tmp_path / 'coarse'}")
