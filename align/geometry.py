"""How an iteration's samples are spread over processes, updates and micro-batches, and what a run will need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from align.config import Config
from align.errors import UserError
from samplers.noise import keyed_generator

ORDER_STREAM = 0x6F72646572


@dataclass(frozen=True)
class Geometry:
    """Counts of one iteration."""

    processes: int
    samples: int
    """N = prompts x group size, over all processes."""
    groups: int
    updates: int
    pairs_per_sample: int
    """Stochastic steps S (clipped_ratio), re-noised times (forward_process), predictions (condition_consistency) or, at most,
    differentiated steps (reward_gradient) trained per image."""
    micro_batch: int

    @property
    def local_samples(self) -> int:
        """Images per process."""
        return self.samples // self.processes

    @property
    def pairs_per_update(self) -> int:
        """(sample, step) pairs per update on one process."""
        return self.local_samples // self.updates * self.pairs_per_sample

    @property
    def accumulation(self) -> int:
        """Forward-backward passes per update on one process."""
        return math.ceil(self.pairs_per_update / self.micro_batch)


def geometry(config: Config, processes: int) -> Geometry:
    """Counts for `processes` processes. Raises: UserError if the samples cannot be divided evenly."""
    samples, updates = config.samples_per_iteration, config.train.updates_per_iteration
    if samples % (processes * updates):
        raise UserError(
            f"train: {config.train.prompts_per_iteration} prompts x group_size {config.train.group_size} = {samples} images "
            f"cannot be split over {processes} processes x {updates} updates; make their product divide it"
        )
    groups = config.train.prompts_per_iteration
    return Geometry(processes, samples, groups, updates, pairs_per_sample(config), config.train.micro_batch)


def pairs_per_sample(config: Config) -> int:
    """(sample, step) pairs trained per image."""
    if config.objective.type == "forward_process":
        from align.objectives import draw_times

        grid = torch.linspace(1, 0, config.sampler.num_steps + 1)
        return draw_times(grid, [0], 0, 0, config.objective.times_per_sample, config.objective.time_range).shape[1]
    if config.objective.type == "condition_consistency":
        return config.consistency.passes
    if config.objective.type == "reward_gradient":
        return config.backprop.most_active(config.sampler.num_steps) + config.backprop.lv_draws
    longest = config.sampler.make_plan(0, config.train.iterations - 1)  # a branched plan's suffix only grows
    return trained_steps(len(longest.stochastic), config.train.step_fraction)


def trained_steps(stochastic: int, fraction: float) -> int:
    """Steps that a sample trains of its stochastic ones: floor(fraction x number), at least 1."""
    # The small term keeps products such as 100 * 0.29 = 28.999999999999996 from losing a step.
    return max(1, int(stochastic * fraction + 1e-9))


def local_order(shape: Geometry, rank: int, seed: int, iteration: int) -> list[list[int]]:
    """Global sample indices of process `rank`, one list per update.

    The samples of an update are the same set for any number of processes: a keyed permutation of the groups cut into
    updates, each cut into processes. A group stays within one update wherever the counts allow it, so that its
    advantages still add up to zero there.
    """
    groups = keyed_generator(seed=seed, iteration=iteration, stream=ORDER_STREAM).permutation(shape.groups)
    per_group = shape.samples // shape.groups
    order = [int(g) * per_group + i for g in groups for i in range(per_group)]
    size, share = shape.samples // shape.updates, shape.local_samples // shape.updates
    return [order[u * size + rank * share : u * size + (rank + 1) * share] for u in range(shape.updates)]


def geometry_table(config: Config, shape: Geometry) -> Table:
    """The numbers a person checks before leaving a run alone."""
    table = Table(title="batch geometry", title_justify="left", show_header=False, title_style="bold")
    for name, value, formula in (
        (
            "images per iteration",
            shape.samples,
            f"{config.train.prompts_per_iteration} prompts x {config.train.group_size}",
        ),
        ("processes", shape.processes, ""),
        ("images per process", shape.local_samples, f"sampled {config.train.rollout_batch} at a time"),
        ("pairs per image", shape.pairs_per_sample, _pairs_formula(config)),
        ("updates per iteration", shape.updates * config.train.inner_epochs, _shares(config, shape)),
        ("micro-batch", shape.micro_batch, "pairs per forward-backward on one process"),
        ("gradient accumulation", shape.accumulation, f"{shape.pairs_per_update} pairs / micro-batch"),
    ):
        table.add_row(name, f"{value:,}", f"[dim]{formula}[/dim]")
    return table


def _pairs_formula(config: Config) -> str:
    if config.objective.type == "condition_consistency":
        return "predictions of a noised real image"
    text = f"of {config.sampler.num_steps} sampling steps"
    if config.objective.type == "reward_gradient":
        copies = f", {config.backprop.lv_draws} of them of noised copies" if config.backprop.lv_draws else ""
        random = config.backprop.steps == "last" and config.backprop.truncation != "fixed"
        return f"differentiated{', at most,' if random else ''} {text}{copies}"
    first = len(config.sampler.make_plan(0, 0).stochastic)
    last = len(config.sampler.make_plan(0, config.train.iterations - 1).stochastic)
    grows = config.sampler.plan == "branched" and first != last
    return f"{text}, in the end; {first} at first" if grows else text


def _shares(config: Config, shape: Geometry) -> str:
    epochs = f", {config.train.inner_epochs} epochs" if config.train.inner_epochs > 1 else ""
    chosen = "up to " if config.selection.rule != "all" else ""
    return f"{chosen}{shape.samples // shape.updates} images each{epochs}"


def memory_estimate(config: Config) -> dict[str, Any]:
    """Parameter counts (exact, from the configs) and a rough peak of memory on one process, in GiB.

    Nothing is loaded: the denoiser and VAE are built on the meta device. Activations of a transformer are estimated as 34
    bytes per token, channel and layer in half precision (68 in float32), or one tensor per layer with checkpointing;
    those of a UNet and of a decoder that is differentiated from their blocks.
    """
    import diffusers
    from accelerate import init_empty_weights

    from align.models.base import family_of, pipeline_index, resolve_path

    family, index, path = family_of(config.model), pipeline_index(config.model), resolve_path(config.model)
    parts: dict[str, Any] = {}
    with init_empty_weights():
        for name in (family.denoiser_name, "vae"):
            cls = getattr(diffusers, index[name][1])
            parts[name] = cls.from_config(cls.load_config(path, subfolder=name, revision=config.model.revision))
        network = parts[family.denoiser_name]
        total = sum(p.numel() for p in network.parameters())
        factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
        trainable = _trainable(config, network, family.lora_targets, factor)
    vae = sum(p.numel() for p in parts["vae"].parameters())
    width = 4 if config.model.precision == "fp32" else 2
    copies = 4 + (config.optim.ema_decay > 0) + (config.objective.type == "forward_process")
    has_t5 = any(index.get("text_encoder_3") or ())
    text_tokens = 77 + (config.model.max_sequence_length if has_t5 else 0)
    activations = _activations(config, network, width, factor, text_tokens)
    stored = _images_held(config) * _states(config) * 4 * _latent_elements(config, parts, factor)
    gib = 1024**3
    decoding, peak = {}, activations
    if config.objective.type == "condition_consistency":
        judged = config.train.micro_batch if config.consistency.grad_scale > 0 else 0
        image = 4 * judged * _decoder_elements(parts["vae"], config, factor)
        decoding["image_path_gib"] = image / gib
        peak = activations + image  # one graph from the noised latent to the condition that is read
    elif config.objective.type == "reward_gradient" and hasattr(parts["vae"].decoder, "mid_block"):
        image = 4 * config.loss.image_batch * _decoder_elements(parts["vae"], config, factor)
        decoding["image_path_gib"] = image / gib
        peak = max(activations, image)  # the graph of the image is freed before that of a step is made
    return {
        "denoiser_parameters": total,
        "vae_parameters": vae,
        "trainable_parameters": trainable,
        "weights_gib": (total * width + vae * 4) / gib,
        "training_state_gib": trainable * 4 * copies / gib,
        "activations_gib": activations / gib,
        **decoding,
        "trajectories_gib": stored / gib,
        "total_gib": (total * width + vae * 4 + trainable * 4 * copies + peak + stored) / gib,
    }


def _trainable(config: Config, network: Any, lora_targets: Sequence[str], factor: int) -> int:
    """Parameters that a run trains, beside or in a denoiser on the meta device; factor: image pixels per latent pixel."""
    from peft import LoraConfig

    if config.model.controlnet is not None:
        from align.models.controlnet import from_unet

        return sum(p.numel() for p in from_unet(network, factor, copy=False).parameters())
    settings = config.model.lora
    targets = list(settings.targets or lora_targets)
    try:
        network.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets))
    except ValueError as problem:
        raise UserError(f"model.lora.targets: {str(problem).splitlines()[0]}") from problem
    return sum(p.numel() for n, p in network.named_parameters() if "lora_" in n)


def _images_held(config: Config) -> int:
    """Images whose states are kept at once: a rollout of all of them, or the chains that are differentiated together."""
    whole = config.samples_per_iteration
    return min(whole, config.train.rollout_batch) if config.objective.type == "reward_gradient" else whole


def _states(config: Config) -> int:
    """Latents kept for each image of a rollout: those around stochastic steps, and the final one.

    With reward_gradient those before differentiated steps, the final one and the gradient there.
    """
    if config.objective.type == "condition_consistency":
        return 0  # nothing is sampled
    if config.objective.type == "reward_gradient":
        return pairs_per_sample(config) + 2 + 2 * config.backprop.lv_draws
    stochastic = config.sampler.make_plan(0, config.train.iterations - 1).stochastic
    return len({*stochastic, *(k + 1 for k in stochastic), config.sampler.num_steps})


def _latent_elements(config: Config, parts: dict[str, Any], factor: int) -> int:
    resolution, sizes = config.model.resolution, [p.config.get("sample_size") for p in parts.values()]
    side = resolution // factor if resolution else int(sizes[0] or 64)
    return int(parts["vae"].config.latent_channels) * side * side


def _activations(config: Config, network: Any, width: int, factor: int, text_tokens: int) -> float:
    """Bytes kept for one backward pass; factor: image pixels per latent pixel."""
    shape = network.config
    side = config.model.resolution // factor if config.model.resolution else shape.get("sample_size") or 64
    alone = config.objective.type == "reward_gradient" and config.backprop.guidance_gradient != "both"
    images: float = config.train.micro_batch * (1 if config.sampler.guidance_scale == 1 or alone else 2)
    if config.objective.type == "condition_consistency":
        images = 1.5 * config.train.micro_batch  # a ControlNet repeats the UNet's first half
    if hasattr(network, "down_blocks"):
        return width * images * _unet_elements(network, side, config.model.gradient_checkpointing)
    layers = shape.get("num_layers") or 1
    channels = (shape.get("num_attention_heads") or 1) * (shape.get("attention_head_dim") or 64)
    tokens = ((side / (shape.get("patch_size") or 1)) ** 2 + text_tokens) * images
    one_layer = 17 * width * tokens * channels
    if config.model.gradient_checkpointing:
        return one_layer + layers * tokens * channels * width
    return layers * one_layer


def _decoder_elements(vae: Any, config: Config, factor: int) -> float:
    """Elements kept for the backward pass through the VAE's decoder, of one image.

    Per pixel 3.5 (in + out) channels of a residual block; with checkpointing half a tensor, and the largest block. Of the
    decoder of SD 1.5 that is what autograd saves, within 2 %.
    """
    from diffusers.models.resnet import ResnetBlock2D

    side = (config.model.resolution or int(vae.config.get("sample_size") or 64)) // factor
    blocks = []
    for level, block in [(0, vae.decoder.mid_block), *enumerate(vae.decoder.up_blocks)]:
        pixels = (side * 2**level) ** 2
        residuals = [m for m in block.modules() if isinstance(m, ResnetBlock2D)]
        blocks.append(pixels * sum(m.in_channels + m.out_channels for m in residuals))
    control = config.objective.type == "condition_consistency"
    if config.consistency.checkpointing if control else config.loss.checkpointing:
        return 0.5 * sum(blocks) + 3.5 * max(blocks)
    return 3.5 * sum(blocks)


def _unet_elements(network: Any, side: int, checkpointing: bool) -> float:
    """Elements kept for the backward pass of one image of `side` latent pixels, with an attention that keeps no scores.

    Per pixel, 5 (in + out) channels of a residual block and 20 channels of a transformer layer; with checkpointing their
    inputs and the largest of them. On SD 1.5 and SDXL within 3 % of what autograd saves, with checkpointing within 25 %.
    """
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    last = len(network.down_blocks) - 1
    levels = [*enumerate(network.down_blocks), (last, network.mid_block)]
    levels += [(last - i, block) for i, block in enumerate(network.up_blocks)]
    residual, layers = [], []
    for level, block in levels:
        pixels = (side / 2**level) ** 2
        for module in block.modules() if block is not None else ():
            if isinstance(module, ResnetBlock2D):
                residual.append(pixels * (module.in_channels + module.out_channels))
            elif isinstance(module, BasicTransformerBlock):
                layers.append(pixels * module.dim)
    if checkpointing:
        return 1.5 * sum(residual) + sum(layers) + max(5 * max(residual), 20 * max(layers, default=0))
    return 5 * sum(residual) + 20 * sum(layers)
