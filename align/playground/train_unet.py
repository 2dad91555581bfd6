"""Training of the playground's U-Net to predict the noise, on the text encoder and autoencoder of the first base."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.playground.components import (
    build_unet,
    build_unet_pipeline,
    save_unet_pipeline,
    shared_parts,
)
from align.playground.train_transformer import Recipe, Trainer, run


@dataclass(frozen=True)
class UNetRecipe(Recipe):
    """Settings of the U-Net's training. Timesteps are uniform over the schedule's 1,000."""

    steps: int = 2600
    stop: int = 2000
    save_every: int = 200
    export_every: int = 400


class MatmulCrossAttention:
    """Self- and cross-attention of the U-Net by plain matrix products: on a CPU their backward is the faster one.

    Same result as diffusers' own processor up to rounding, and used in training only.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Any:
        """hidden_states (B, N, C) of the image, encoder_hidden_states (B, M, D) of the text or None; returns (B, N, C)."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def initialise(unet: Any) -> None:
    """Start every residual branch and the output at zero."""
    for name, module in unet.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def noise_batch(
    latents: Tensor, alphas_cumprod: Tensor, seed: int, step: int, batch: int, rows: slice
) -> tuple[Tensor, ...]:
    """Noised latents, integer timesteps and the noise of a process's `rows` of a step (arXiv:2006.11239, eq. 14).

    Noise and timesteps depend on (seed, step) and the place in the global batch, not on the number of processes.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    t = torch.from_numpy(generator.integers(len(alphas_cumprod), size=batch)[rows])
    noise = torch.from_numpy(generator.standard_normal((batch, *latents.shape[1:]), dtype=np.float32)[rows])
    kept = alphas_cumprod[t][:, None, None, None]
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise, t, noise


def split_parameters(unet: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices and kernels of the blocks for Muon, everything else for AdamW)."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in unet.named_parameters():
        hidden = name.startswith(("down_blocks", "mid_block", "up_blocks")) and p.ndim > 1
        (matrices if hidden and "time_emb" not in name else rest).append(p)
    return matrices, rest


class UNetTrainer(Trainer):
    """The trainer of the first base on a U-Net; `first` is that base's folder, whose text encoder stays frozen."""

    def __init__(self, recipe: UNetRecipe, rank: int, world: int, first: Path) -> None:
        self.vae, self.text_encoder = shared_parts(first)
        torch.manual_seed(recipe.seed)
        self.recipe, self.rank, self.world = recipe, rank, world
        self.encoders = nn.ModuleList()  # none learns
        self.transformer = build_unet()
        initialise(self.transformer)
        self.work = deepcopy(self.transformer).to(torch.bfloat16)
        self.work.set_attn_processor(MatmulCrossAttention())
        self.alphas_cumprod = build_unet_pipeline(self.vae, self.text_encoder, self.work).scheduler.alphas_cumprod
        self._optimise(*split_parameters(self.transformer))

    def losses(self, latents: Tensor, ids: Tensor, rows: slice) -> Tensor:
        """Mean squared noise error of this process's part of the batch."""
        recipe = self.recipe
        x, t, noise = noise_batch(latents, self.alphas_cumprod, recipe.seed, self.step_number, recipe.batch, rows)
        with torch.no_grad():
            states = self.text_encoder(ids).last_hidden_state
        low = torch.bfloat16
        out = self.work(x.to(low), t, encoder_hidden_states=states.to(low), return_dict=False)[0]
        return (out.float() - noise).square().mean()

    def write(self, root: Path, folder: Path) -> None:
        """Write the pipeline with the present weights."""
        save_unet_pipeline(folder, self.vae, self.text_encoder, self.transformer)


def unet_worker(rank: int, world: int, folder: str, out: str, recipe: UNetRecipe, first: str) -> None:
    """Train, saving state into `folder` and the averaged pipeline into `out` from time to time and at the end."""
    run(UNetTrainer(recipe, rank, world, Path(first)), Path(folder), Path(out), "unet")
