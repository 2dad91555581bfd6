"""What Stable Diffusion 1, 2 and XL share: a UNet on a variance-preserving schedule, seen in flow coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from align.errors import UserError
from align.models.base import Conditioning, ImageModel, ModelConfig, quiet
from samplers.vp import PREDICTIONS, time_table, timestep_of, velocity_coefficients, velocity_from, vp_grid, vp_scale


class VPModel(ImageModel):
    """A pipeline with a UNet. States are `x_vp / (alpha + sigma)` (see `samplers.vp`).

    The schedule is that of `DDIMScheduler.from_config(pipe.scheduler.config)`, whichever scheduler the folder names; its
    clipping and thresholding, meant for pixels, are not applied.
    """

    denoiser_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: Any, config: ModelConfig, device: torch.device) -> None:
        _check_network(pipe)
        self.schedule = _ddim(pipe.scheduler)
        self.prediction: str = self.schedule.config.prediction_type
        super().__init__(pipe, config, device)
        self._table = time_table(self.schedule.alphas).to(device)
        """Flow time of every training timestep."""
        if _last_timestep(self.schedule) > 0:
            self.end_time = float(self._table[0])

    def grid(self, kind: str, num_steps: int, shift: float = 3.0, custom: Sequence[float] | None = None) -> Tensor:
        """Flow times, float32 (num_steps + 1,), of the timesteps that DDIM takes, then `end_time`.

        The end is training timestep 0, above t = 0, unless the last step already starts there (the clamp of arXiv 2305.13301).
        Raises: UserError for another kind than scheduler, for too many steps, and if noise is predicted at t = 1.
        """
        if kind != "scheduler":
            raise UserError(
                f"sampler.grid: {self.family} models have timesteps of their own, not '{kind}'; use scheduler"
            )
        try:
            self.schedule.set_timesteps(num_steps)
            grid = vp_grid(self.schedule.timesteps.tolist(), self._table, self.end_time)
        except ValueError as problem:
            most = self.schedule.config.num_train_timesteps // 2
            raise UserError(f"sampler.num_steps: {num_steps} are too many; use at most {most}") from problem
        if grid[0] == 1 and self.prediction == "epsilon":
            raise UserError(
                "model.path: the schedule starts from pure noise, where a prediction of the noise says nothing; in its "
                "scheduler_config.json use prediction_type v_prediction (if the model is one) or rescale_betas_zero_snr false"
            )
        return grid

    def noise_scale(self, t0: float) -> float:
        """n(t0): x_vp starts as standard normal noise."""
        return float(vp_scale(torch.tensor(t0)))

    def clean(self, latents: Tensor) -> Tensor:
        """x_vp at `end_time`, which the pipelines decode as it is."""
        return latents / self.noise_scale(self.end_time)

    def held_slope(self, t: Tensor) -> Tensor:
        """That of the conversion from the network's output."""
        return velocity_coefficients(t, self.prediction)[1]

    def _predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        x_vp = x / vp_scale(t).float().view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.network(
                x_vp.to(self.dtype),
                timestep_of(t, self._table),
                encoder_hidden_states=cond.tensors["embeds"],
                added_cond_kwargs=self._added(x, cond),
                return_dict=False,
            )[0]
        return velocity_from(out, x, t, self.prediction)

    def _added(self, x: Tensor, cond: Conditioning) -> dict[str, Tensor] | None:
        """Further conditions of the UNet."""
        return None


def _ddim(scheduler: Any) -> Any:
    name, config = type(scheduler).__name__, scheduler.config
    if "beta_schedule" not in config:
        raise UserError(
            f"model.path: its {name} has no beta schedule, which this family needs; supported: DDIM, PNDM, Euler, DPM++ ..."
        )
    try:
        with quiet():
            schedule: Any = DDIMScheduler.from_config(config)
    except NotImplementedError as problem:
        raise UserError(
            f"model.path: DDIM has no beta schedule '{config.beta_schedule}', that of its {name}"
        ) from problem
    if schedule.config.prediction_type not in PREDICTIONS:
        kind = schedule.config.prediction_type
        raise UserError(f"model.path: its {name} has prediction_type '{kind}'; supported: {', '.join(PREDICTIONS)}")
    return schedule


def _last_timestep(schedule: Any) -> int:
    """Timestep from which the last of few steps starts."""
    schedule.set_timesteps(2)
    return int(schedule.timesteps[-1])


def _check_network(pipe: Any) -> None:
    """Refuse UNets that want more than a noisy latent, a timestep and a prompt."""
    unet, channels = pipe.unet.config, pipe.vae.config.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        what = "an inpainting model" if unet.in_channels == 2 * channels + 1 else "no text-to-image model"
        raise UserError(
            f"model.path: this UNet maps {unet.in_channels} to {unet.out_channels} channels and the VAE has {channels}: it is {what}; "
            "use its text-to-image base"
        )
    if unet.time_cond_proj_dim is not None:
        raise UserError(
            "model.path: this UNet takes the guidance scale as an input (latent consistency); use the model that it was "
            "distilled from"
        )
    if pipe.vae.config.get("latents_mean") is not None:
        raise UserError("model.path: this VAE shifts every latent channel by its own mean, which is not supported")
