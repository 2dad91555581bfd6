"""What the loops need of a model family, and how one is loaded."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from torch import Tensor

from align.errors import UserError
from align.schema import nearest
from samplers.grids import make_grid

_PLAYGROUND = Path(__file__).parent.parent / "playground"
SHIPPED = {"playground": _PLAYGROUND / "weights", "playground-unet": _PLAYGROUND / "unet_weights"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Clamp = Literal["hard", "straight_through"]


@dataclass
class LoraSettings:
    """The adapter that is trained."""

    rank: int = 32
    """Rank r of the update (32: Flow-GRPO, arXiv 2505.05470)."""
    alpha: int = 64
    """Scale; the update is multiplied by alpha / rank."""
    targets: list[str] | None = None
    """Module-name suffixes that get an adapter; null: the family's attention projections."""
    init_from: str | None = None
    """Folder with a `pytorch_lora_weights.safetensors` to start from; null: a zero update."""


@dataclass
class ModelConfig:
    """Which base model, and how it runs."""

    path: str = "playground"
    """Local diffusers folder, hub id, or a tiny model that ships with the package: `playground` (SD3 type) or
    `playground-unet` (SD 1.5 type)."""
    family: Literal["auto", "sd", "sdxl", "sd3"] = "auto"
    """Adapter to use; auto reads the pipeline class in model_index.json."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the frozen weights and of autocast; adapter, latents and log-probs stay float32."""
    resolution: int | None = None
    """Image side in pixels, a multiple of 16 (of the VAE factor x patch size); null: the model's own size."""
    attention: str = "auto"
    """Attention backend: auto | sdpa | flash | xformers | math | any name diffusers knows; checked at start."""
    gradient_checkpointing: bool = False
    """Recompute block activations in the backward pass: about 1/3 more compute, far less memory."""
    compile: bool = False
    """torch.compile the denoiser (the first calls are slow)."""
    vae_slicing: bool = True
    """Decode one image at a time inside the VAE."""
    max_sequence_length: int = 256
    """T5 tokens per prompt; ignored where the pipeline has no T5."""
    encoders: Literal["release", "keep"] = "release"
    """release: embed every prompt of the run first, then free the text encoders. keep: embed per iteration."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    controlnet: str | None = None
    """ControlNet that is trained in place of an adapter (objective.type condition_consistency): a diffusers folder, a hub
    id, `unet` to make one from the model's own UNet, or `playground`; null: none."""

    def validate(self) -> list[str]:
        """Mistakes that types cannot catch, one line each."""
        errors = []
        if self.lora.rank < 1:
            errors.append(f"model.lora.rank: must be at least 1, got {self.lora.rank}")
        if self.resolution is not None and (self.resolution < 16 or self.resolution % 16):
            errors.append(f"model.resolution: must be a positive multiple of 16, got {self.resolution}")
        if self.max_sequence_length < 0:
            errors.append(f"model.max_sequence_length: must not be negative, got {self.max_sequence_length}")
        return errors


@dataclass
class Conditioning:
    """Prompt embeddings of a batch: every tensor has the batch in dimension 0."""

    tensors: dict[str, Tensor]

    def take(self, index: Tensor | Sequence[int]) -> Conditioning:
        """Rows `index`, in that order (repeats allowed)."""
        return Conditioning({k: v[torch.as_tensor(index, device=v.device)] for k, v in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        """The same embeddings on `device`."""
        return Conditioning({k: v.to(device, non_blocking=True) for k, v in self.tensors.items()})

    @staticmethod
    def stack(items: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch."""
        return Conditioning({k: torch.cat([i.tensors[k] for i in items]) for k in items[0].tensors})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


class ImageModel:
    """A diffusers pipeline seen by the loops: velocity, prompt embeddings, decoding and the adapter.

    States are in flow coordinates, x = (1 - t) data + t noise, for every family. Subclasses fill in `encode`,
    `_predict` and the class attributes.
    """

    family: str
    lora_targets: tuple[str, ...]
    denoiser_name = "transformer"
    load_arguments: ClassVar[dict[str, Any]] = {}
    """Further arguments of `from_pretrained`."""
    end_time = 0.0
    """Flow time of final states: the last time of every grid."""
    result_name = "adapter"
    """What a run trains, and the folder that it lands in."""

    def __init__(self, pipe: Any, config: ModelConfig, device: torch.device) -> None:
        self.pipe, self.config, self.device = pipe, config, device
        self.dtype = DTYPES[config.precision]
        self.network: Any = getattr(pipe, self.denoiser_name)
        self.guidance_scale = 1.0
        self._embedded: dict[str, Conditioning] = {}
        self._released = False
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.network.to(device)
        pipe.vae.to(
            device, memory_format=torch.channels_last
        )  # the layout that convolutions are fast in, on CPUs twice
        if config.vae_slicing:
            pipe.vae.enable_slicing()
        pipe.set_progress_bar_config(disable=True)

    # -- prompts ------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of `prompts` (batch len(prompts)) by the pipeline's own encoders, without gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def cache_prompts(self, prompts: Sequence[str], progress: Any = None, batch_size: int = 16) -> None:
        """Embed every distinct prompt not yet known (and the empty one, for guidance), kept on the CPU."""
        wanted = [p for p in dict.fromkeys(["", *prompts]) if p not in self._embedded]
        if wanted and self._released:
            raise UserError(
                f"model.encoders: the text encoders were released, so '{wanted[0]}' cannot be embedded; use encoders=keep"
            )
        for start in range(0, len(wanted), batch_size):
            chunk = wanted[start : start + batch_size]
            encoded = self.encode(chunk).to("cpu")
            for row, prompt in enumerate(chunk):
                self._embedded[prompt] = encoded.take([row])
            if progress is not None:
                progress(len(chunk), len(wanted))

    def remember(self, prompt: str, embedding: Conditioning) -> None:
        """Put an embedding made elsewhere (batch 1) into the cache."""
        self._embedded[prompt] = embedding

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Cached embeddings of `prompts` on the model's device; embeds unknown ones if the encoders are still there."""
        if any(p not in self._embedded for p in prompts):
            self.cache_prompts(prompts)
        return Conditioning.stack([self._embedded[p] for p in prompts]).to(self.device)

    def forget_prompts(self) -> None:
        """Empty the cache (used when the encoders stay and prompts are embedded per iteration)."""
        self._embedded = {"": self._embedded[""]} if "" in self._embedded else {}

    def release_encoders(self) -> None:
        """Free the text encoders' memory. Prompts not in the cache cannot be embedded afterwards."""
        for name in [n for n in self.pipe.components if n.startswith("text_encoder")]:
            setattr(self.pipe, name, None)
        self._released = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- images -------------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity dx/dt at x (B, C, H, W) float32, t (B,) float32 in [0, 1]; (B, C, H, W) float32.

        The one function used by rollouts, training, completions and evaluation. With `guidance_scale` g != 1 it
        returns uncond + g (cond - uncond), at twice the cost.
        """
        guidance = self.guidance_scale
        if guidance == 1.0:
            return self._predict(x, t, cond)
        both = self._predict(torch.cat([x, x]), torch.cat([t, t]), Conditioning.stack([cond, self.unconditional(cond)]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def unconditional(self, cond: Conditioning) -> Conditioning:
        """What guidance leads away from: the empty prompt, as often as `cond` has rows."""
        return self.conditioning([""]).take([0] * len(cond))

    def held_slope(self, t: Tensor) -> Tensor:
        """(B,) float32: derivative of the velocity by x at t (B,) where the network's output is held, with any guidance."""
        return torch.zeros_like(t)

    def _predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One network evaluation of `velocity`, without guidance."""
        raise NotImplementedError

    def grid(self, kind: str, num_steps: int, shift: float = 3.0, custom: Sequence[float] | None = None) -> Tensor:
        """Sampling times, float32 (num_steps + 1,), of one of `samplers.grids.GRID_KINDS`; the last is `end_time`."""
        return make_grid(kind, num_steps, scheduler=self.pipe.scheduler, shift=shift, custom=custom)

    def noise_scale(self, t0: float) -> float:
        """What standard normal noise is multiplied by to start from at time t0."""
        return 1.0

    def clean(self, latents: Tensor) -> Tensor:
        """Final states (B, C, h, w), at `end_time`, as the clean latents that the VAE decodes."""
        return latents

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        side = (self.config.resolution or self.native_resolution) // self.pipe.vae_scale_factor
        return (self.pipe.vae.config.latent_channels, side, side)

    @property
    def native_resolution(self) -> int:
        """Image side in pixels that the denoiser was built for."""
        return int(self.network.config.sample_size * self.pipe.vae_scale_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Final states (B, C, h, w) float32 -> images (B, 3, H, W) float32 in [0, 1]."""
        images = []
        for chunk in latents.split(batch_size):
            images.append(self._decoded(chunk).div_(2).add_(0.5).clamp_(0, 1))  # in place: full-size images are large
        return torch.cat(images)

    def decode_with_gradient(self, latents: Tensor, clamp: Clamp = "hard") -> tuple[Tensor, Tensor]:
        """The images of `decode`, with gradient to `latents` (B, C, h, w); all B at once.

        Returns images (B, 3, H, W) float32 in [0, 1], and the share (B,) float32, detached, of each image's values that
        were outside and had to be clamped. Their gradient is zero with clamp=hard; straight_through passes it on as if
        nothing was cut.
        """
        free = self._decoded(latents) / 2 + 0.5
        images = free.clamp(0, 1)
        saturated = (images != free).detach().float().mean(dim=(1, 2, 3))
        if clamp == "straight_through":
            images = images.detach() + (free - free.detach())  # adds exactly zero, and the gradient of the identity
        return images, saturated

    def _decoded(self, latents: Tensor) -> Tensor:
        """What the VAE makes of final states (B, C, h, w): (B, 3, H, W), near [-1, 1] but not clamped."""
        config = self.pipe.vae.config
        unscaled = self.clean(latents.float()) / config.scaling_factor + (config.shift_factor or 0.0)
        return self.pipe.vae.decode(unscaled.contiguous(memory_format=torch.channels_last), return_dict=False)[0]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the clean latents (B, C, h, w) float32 that the VAE would decode to them.

        The mode of the VAE's posterior, not a sample. Latents are what `clean` returns: a final state is the same up to
        its factor.
        """
        config = self.pipe.vae.config
        pixels = (2 * images.float() - 1).contiguous(memory_format=torch.channels_last)
        mode = self.pipe.vae.encode(pixels).latent_dist.mode()
        return ((mode - (config.shift_factor or 0.0)) * config.scaling_factor).float().contiguous()

    # -- the adapter --------------------------------------------------------------------------------------------

    def trained_parameters(self, seed: int) -> list[torch.nn.Parameter]:
        """Make trainable what a run trains, by default a new LoRA, and return its parameters in name order."""
        return self.add_lora(seed)

    def add_lora(self, seed: int) -> list[torch.nn.Parameter]:
        """Attach a trainable LoRA named `default` (float32, zero update) and return its parameters, in name order."""
        settings = self.config.lora
        lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets or self.lora_targets),
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.network.add_adapter(lora, adapter_name="default")
            except ValueError as problem:
                raise UserError(f"model.lora.targets: {str(problem).splitlines()[0]}") from problem
        if settings.init_from:
            self._load_lora_values(settings.init_from)
        parameters = [p for _, p in sorted(self.network.named_parameters()) if p.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.to(torch.float32)
        return parameters

    def _load_lora_values(self, folder: str) -> None:
        from peft import set_peft_model_state_dict

        state = self.pipe.lora_state_dict(_existing(folder, "model.lora.init_from"))
        state = state[0] if isinstance(state, tuple) else state  # UNet pipelines return their network alphas beside it
        prefix = f"{self.denoiser_name}."
        values = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            result = set_peft_model_state_dict(self.network, values, adapter_name="default")
        except RuntimeError as problem:
            raise UserError(
                f"model.lora.init_from: {folder} does not fit rank {self.config.lora.rank}: "
                f"{str(problem).splitlines()[-1].strip()}"
            ) from problem
        if not values or getattr(result, "unexpected_keys", None):
            raise UserError(f"model.lora.init_from: {folder} holds no adapter for {type(self.network).__name__}")

    def load_adapter(self, folder: str | Path, scale: float = 1.0, name: str = "tuned") -> None:
        """Load an exported adapter for inference, with diffusers' own `load_lora_weights`; it alone is then in use.

        name: what `pipe.set_adapters` calls it; several may be loaded. Raises: UserError if `folder` holds no adapter for
        this network, or one of which a part would be left out.
        """
        from diffusers.utils import logging as diffusers_logging
        from peft import get_peft_model_state_dict

        path, network = _existing(str(folder), "adapter"), type(self.network).__name__
        try:
            with quiet():
                diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)  # it logs what it raises
                held = self.pipe.lora_state_dict(path)
                self.pipe.load_lora_weights(path, adapter_name=name)
        except (OSError, RuntimeError, ValueError) as problem:
            raise UserError(
                f"adapter: {folder} does not fit {network}: {str(problem).splitlines()[-1].strip()}"
            ) from problem
        held = held[0] if isinstance(held, tuple) else held  # UNet pipelines return their network alphas beside it
        present = [key for key in held if key.startswith(f"{self.denoiser_name}.") and "lora" in key]
        if not present:
            raise UserError(f"adapter: {folder} holds none for {network}; it was made for another kind of model")
        taken = get_peft_model_state_dict(self.network, adapter_name=name)
        if len(taken) < len(present):
            raise UserError(
                f"adapter: {folder} does not fit {network}: it has a place for {len(taken)} of {len(present)} tensors"
            )
        self.use_adapters({name: scale})

    def use_adapters(self, strengths: Mapping[str, float]) -> None:
        """Compute with the loaded adapters of these names, each at its strength."""
        self.pipe.set_adapters(list(strengths), adapter_weights=list(strengths.values()))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the adapter is off: the network is the base model."""
        if not getattr(self.network, "peft_config", None):
            yield
            return
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def finish_setup(self) -> None:
        """Apply attention backend, gradient checkpointing and compilation, after the adapter is attached."""
        from align.models.attention import set_attention

        with quiet():
            self.attention_backend = set_attention(self.network, self.config.attention, self.device, self.dtype)
        if self.config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()  # diffusers applies it only where gradients are recorded
        if self.config.compile:
            self.network.compile()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the libraries' progress bars, hints and future warnings are off; errors still come through."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    for log, _ in levels:
        log.set_verbosity_error()
        log.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for log, level in levels:
                log.set_verbosity(level)


def _existing(folder: str, key: str) -> str:
    path = Path(folder)
    if not (path / "pytorch_lora_weights.safetensors").is_file() and not path.is_file():
        raise UserError(f"{key}: {folder} has no pytorch_lora_weights.safetensors")
    return folder


def resolve_path(config: ModelConfig) -> str:
    """The folder or hub id to load; a missing local folder is a UserError."""
    if config.path in SHIPPED:
        return str(SHIPPED[config.path])
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"model.path: {config.path} has no model_index.json; is it a diffusers pipeline folder?")
        return str(folder)
    if looks_local:
        raise UserError(f"model.path: no folder {config.path}{nearest(config.path, list(SHIPPED))}")
    return config.path


def pipeline_index(config: ModelConfig) -> dict[str, Any]:
    """The pipeline's model_index.json (downloads that one file for a hub id)."""
    from diffusers import DiffusionPipeline

    path = resolve_path(config)
    try:
        return dict(DiffusionPipeline.load_config(path, revision=config.revision))
    except (OSError, ValueError) as problem:
        raise UserError(f"model.path: cannot load '{config.path}': {str(problem).splitlines()[0]}") from problem


def family_of(config: ModelConfig) -> type[ImageModel]:
    """The adapter class for the configured pipeline."""
    from align.models.sd import SDModel
    from align.models.sd3 import SD3Model
    from align.models.sdxl import SDXLModel

    families: dict[str, type[ImageModel]] = {"sd": SDModel, "sdxl": SDXLModel, "sd3": SD3Model}
    pipelines = {
        "StableDiffusionPipeline": "sd",
        "StableDiffusionXLPipeline": "sdxl",
        "StableDiffusion3Pipeline": "sd3",
    }
    index = pipeline_index(config)
    name = str(index.get("_class_name"))
    if config.family != "auto":
        family = families[config.family]
        if family.denoiser_name not in index:
            raise UserError(
                f"model.family: '{config.path}' is a {name} without a {family.denoiser_name}; use family=auto"
            )
        return _with_controlnet(family, config)
    if name not in pipelines:
        raise UserError(f"model.path: '{config.path}' is a {name}; supported: {', '.join(pipelines)}")
    return _with_controlnet(families[pipelines[name]], config)


def _with_controlnet(family: type[ImageModel], config: ModelConfig) -> type[ImageModel]:
    if config.controlnet is None:
        return family
    from align.models.controlnet import ControlNetSDModel

    if not issubclass(ControlNetSDModel, family):
        raise UserError(
            f"model.controlnet: '{config.path}' is of the family {family.family}, and a ControlNet is supported for Stable "
            "Diffusion 1 and 2 (sd) only"
        )
    return ControlNetSDModel


def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> ImageModel:
    """Load the base model of `config` onto `device`, frozen and in eval mode, without an adapter yet."""
    from diffusers import DiffusionPipeline

    family = family_of(config)
    index = pipeline_index(config)
    # some pipelines insist that optional encoders be passed, even where model_index.json holds nulls
    absent = {k: None for k, v in index.items() if isinstance(v, (list, tuple)) and list(v) == [None, None]}
    absent |= family.load_arguments
    # half-precision decoders lose detail and can overflow
    dtypes = {"default": DTYPES[config.precision], "vae": torch.float32}
    with quiet():
        try:
            pipe = DiffusionPipeline.from_pretrained(
                resolve_path(config), revision=config.revision, torch_dtype=dtypes, **absent
            )
        except (OSError, ValueError) as problem:
            raise UserError(f"model.path: cannot load '{config.path}': {str(problem).splitlines()[0]}") from problem
    return family(pipe, config, torch.device(device))
