"""Stable Diffusion 1.x and 2.x with a ControlNet (arXiv 2302.05543), which is then all that trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.errors import UserError
from align.models.base import Conditioning, ModelConfig, quiet
from align.models.sd import SDModel
from samplers.vp import timestep_of, velocity_from, vp_scale

CONTROL = "control"
"""Name of the condition images (B, 3, H, W) in [0, 1] among the conditioning's tensors."""
FROM_UNET = "unet"
SHIPPED_CONTROLNETS = {"playground": Path(__file__).parent.parent / "playground" / "controlnet_weights"}
_EMBEDDING_CHANNELS = (16, 32, 96, 256)
_NO_STRENGTH = (
    "--scale, --scales and --mix: a ControlNet has no strength and cannot be added to another; leave them out"
)


class ControlNetSDModel(SDModel):
    """A pipeline of the family `sd` whose UNet takes the residuals of a ControlNet.

    The ControlNet has float32 weights, which are the ones that train; everything else is frozen. The base that a run is
    compared with is the ControlNet as it was at the start.
    """

    result_name = "controlnet"

    def __init__(self, pipe: Any, config: ModelConfig, device: torch.device) -> None:
        super().__init__(pipe, config, device)
        self.controlnet: Any = load_controlnet(config, self.network, pipe.vae_scale_factor)
        with quiet():
            self.controlnet.to(device, torch.float32).eval().requires_grad_(False)
        self._start: list[Tensor] = []

    def trained_parameters(self, seed: int) -> list[torch.nn.Parameter]:
        """All parameters of the ControlNet, in name order; `seed` is not needed."""
        parameters = self._keep_start()
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def _keep_start(self) -> list[torch.nn.Parameter]:
        parameters = [p for _, p in sorted(self.controlnet.named_parameters())]
        # on the CPU: it is needed for a few evaluations only
        self._start = [p.detach().to("cpu", copy=True) for p in parameters]
        return parameters

    def load_adapter(self, folder: str | Path, scale: float = 1.0, name: str = "tuned") -> None:
        """Put the trained ControlNet of `folder` in place of that of the start, which stays the reference.

        Raises: UserError if it does not fit, and for a strength or a second one, which ControlNets do not have.
        """
        if scale != 1 or self._start:
            raise UserError(_NO_STRENGTH)
        found = load_controlnet(replace(self.config, controlnet=str(folder)), self.network, self.pipe.vae_scale_factor)
        self._keep_start()
        self.controlnet.load_state_dict(found.state_dict())

    def use_adapters(self, strengths: Mapping[str, float]) -> None:
        """Nothing to choose: there is one ControlNet, in use outside `reference`. Raises: UserError as `load_adapter`."""
        if list(strengths.values()) != [1.0]:
            raise UserError(_NO_STRENGTH)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the ControlNet is that of the start."""
        if not self._start:
            yield
            return
        parameters = [p for _, p in sorted(self.controlnet.named_parameters())]
        live = [p.data for p in parameters]
        for parameter, first in zip(parameters, self._start, strict=True):
            parameter.data = first.to(self.device)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, live, strict=True):
                parameter.data = value

    def finish_setup(self) -> None:
        """As for any model; the ControlNet too has the attention backend and is checkpointed."""
        from align.models.attention import set_attention

        super().finish_setup()
        with quiet():
            set_attention(self.controlnet, self.config.attention, self.device, self.dtype)
        if self.config.gradient_checkpointing:
            self.controlnet.enable_gradient_checkpointing()

    def unconditional(self, cond: Conditioning) -> Conditioning:
        """The empty prompt with the same condition images, as the pipelines guide."""
        empty = super().unconditional(cond)
        return Conditioning({**empty.tensors, CONTROL: cond.tensors[CONTROL]})

    @property
    def levels(self) -> Tensor:
        """(K,) float32: flow time of every training timestep, rising."""
        return self._table

    def conditional_velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """`velocity` without guidance: what trains."""
        return self._predict(x, t, cond)

    def _predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        x_vp = (x / vp_scale(t).float().view(-1, 1, 1, 1)).to(self.dtype)
        timesteps, embeds = timestep_of(t, self._table), cond.tensors["embeds"]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            down, middle = self.controlnet(
                x_vp,
                timesteps,
                encoder_hidden_states=embeds,
                controlnet_cond=cond.tensors[CONTROL].to(self.dtype),
                return_dict=False,
            )
            out = self.network(
                x_vp,
                timesteps,
                encoder_hidden_states=embeds,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        return velocity_from(out, x, t, self.prediction)

    def write_result(self, folder: Path) -> None:
        """The live ControlNet as diffusers saves one: config.json and safetensors."""
        with quiet():
            self.controlnet.save_pretrained(folder, safe_serialization=True)

    def check_result(self, folder: Path) -> None:
        """Raises: RuntimeError if what `ControlNetModel.from_pretrained` loads from `folder` is not what was trained."""
        with quiet():
            again = type(self.controlnet).from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        live = self.controlnet.state_dict()
        if live.keys() != again.keys() or not all(torch.equal(live[k].cpu(), again[k]) for k in live):
            raise RuntimeError(f"{folder}: the ControlNet that diffusers loads differs from the trained one")


def load_controlnet(config: ModelConfig, unet: Any, factor: int) -> Any:
    """The ControlNet of `config.controlnet`; one made from the UNet fits a VAE of `factor` pixels a latent.

    Raises: UserError if there is none, or it was made for another UNet.
    """
    from diffusers import ControlNetModel

    name = str(config.controlnet)
    if name == FROM_UNET:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of its input layers; with its output layers at zero it changes nothing yet
            return from_unet(unet, factor)
    path = SHIPPED_CONTROLNETS.get(name, Path(name).expanduser())
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"model.controlnet: no folder {name}; give one, a hub id, or '{FROM_UNET}' to make one from the UNet"
        )
    try:
        with quiet():
            found, report = ControlNetModel.from_pretrained(
                str(path) if path.is_dir() else name, torch_dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError) as problem:
        raise UserError(f"model.controlnet: cannot load '{name}': {str(problem).splitlines()[0]}") from problem
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"model.controlnet: '{name}' lacks {len(missing)} weights, such as {missing[0]}")
    _check_fit(found, unet, factor, name)
    return found


def from_unet(unet: Any, factor: int, copy: bool = True) -> Any:
    """A ControlNet of the UNet's shape for `factor` image pixels a latent pixel; copy: with the weights of its first half."""
    from diffusers import ControlNetModel

    levels = factor.bit_length()  # the condition is halved between two levels
    channels = _EMBEDDING_CHANNELS[:levels] + _EMBEDDING_CHANNELS[-1:] * (levels - len(_EMBEDDING_CHANNELS))
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels, load_weights_from_unet=copy)


def _check_fit(controlnet: Any, unet: Any, factor: int, name: str) -> None:
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        own, wanted = (_plain(part.config[key]) for part in (controlnet, unet))
        if own != wanted:
            raise UserError(
                f"model.controlnet: '{name}' has {key} {own}, and the UNet of model.path {wanted}: it is of another model"
            )
    if controlnet.config.conditioning_channels != 3:
        raise UserError(
            f"model.controlnet: '{name}' follows conditions of {controlnet.config.conditioning_channels} channels, and only "
            "pictures of 3 are supported"
        )
    scale = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if scale != factor:
        raise UserError(
            f"model.controlnet: '{name}' wants {scale} pixels a latent, and the VAE of model.path has {factor}"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
