"""Flow-matching training of the playground's text encoders and transformer on precomputed latents."""

from __future__ import annotations

import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.playground.components import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    conditioning,
    save_pipeline,
    token_ids,
)
from align.playground.data import CAPTIONS_PER_SCENE, epoch_rows, open_array
from align.playground.muon import Muon
from align.playground.parallel import average_gradients
from align.playground.train_vae import bar, load_vae, replace


@dataclass(frozen=True)
class Recipe:
    """Settings of a base's training; batch is over all processes.

    The learning rates follow a cosine to zero over `steps`, but training ends at `stop`: a fully trained base is right
    on most prompts and leaves a policy little to learn.
    """

    steps: int = 4000
    stop: int = 2400
    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 1e-3
    warmup: int = 100
    caption_dropout: float = 0.1
    ema: float = 0.998
    seed: int = 0
    save_every: int = 300
    export_every: int = 800


@dataclass(frozen=True)
class FlowRecipe(Recipe):
    """Settings of the transformer's training.

    t is logit-normal with mean `t_mean` and standard deviation 1, 1 being pure noise (arXiv:2403.03206, section 3.1).
    """

    layers: int = 6
    t_mean: float = 0.3


class MatmulAttention:
    """The joint attention of SD3 by plain matrix products.

    On a CPU the fused kernel's bfloat16 backward is five times slower for 80 tokens. Same result as diffusers' own
    processor up to rounding, and used in training only.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        """hidden_states (B, N, C) of the image, encoder_hidden_states (B, M, C) of the text; returns the same pair."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(proj(hidden_states)) for proj in (attn.to_q, attn.to_k, attn.to_v))
        text_projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        tq, tk, tv = (heads(proj(encoder_hidden_states)) for proj in text_projections)
        q = torch.cat([attn.norm_q(q), attn.norm_added_q(tq)], dim=2)
        k = torch.cat([attn.norm_k(k), attn.norm_added_k(tk)], dim=2)
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        out = (weights @ torch.cat([v, tv], dim=2)).transpose(1, 2).flatten(2)
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def initialise(transformer: Any) -> None:
    """Start every block as the identity (adaLN-Zero, arXiv:2212.09748) and the output at zero."""
    last: list[nn.Linear] = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        last += [block.norm1.linear, block.norm1_context.linear]
    for linear in last:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def flow_batch(latents: Tensor, seed: int, step: int, batch: int, rows: slice, t_mean: float) -> tuple[Tensor, ...]:
    """Noised latents, times t in (0, 1) and velocity targets (noise - data) of a process's `rows` of a step.

    Noise and times depend on (seed, step) and the place in the global batch, not on the number of processes.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    t = torch.from_numpy(generator.standard_normal(batch, dtype=np.float32)[rows]).add(t_mean).sigmoid()
    noise = torch.from_numpy(generator.standard_normal((batch, *latents.shape[1:]), dtype=np.float32)[rows])
    s = t[:, None, None, None]
    return (1 - s) * latents + s * noise, t, noise - latents


def split_parameters(transformer: Any, encoders: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices of the blocks' attention and feed-forward layers for Muon, everything else for AdamW)."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = list(encoders.parameters())
    for name, p in transformer.named_parameters():
        hidden = name.startswith("transformer_blocks") and p.ndim == 2 and "norm1" not in name
        (matrices if hidden else rest).append(p)
    return matrices, rest


class Trainer:
    """Float32 weights, a bfloat16 working copy of the transformer, optimisers and the averaged weights."""

    recipe: Any

    def __init__(self, recipe: FlowRecipe, rank: int, world: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.rank, self.world = recipe, rank, world
        self.encoders = nn.ModuleList([build_text_encoder(), build_text_encoder()])
        self.transformer = build_transformer(recipe.layers)
        initialise(self.transformer)
        self.work = deepcopy(self.transformer).to(torch.bfloat16)
        self.work.set_attn_processor(MatmulAttention())
        self._optimise(*split_parameters(self.transformer, self.encoders))

    def _optimise(self, matrices: list[Tensor], rest: list[Tensor]) -> None:
        """Set up the optimisers (Muon for `matrices`, AdamW for `rest`) and the average of the weights just built."""
        self.pairs = list(zip(self.transformer.parameters(), self.work.parameters(), strict=True))
        self.muon = Muon(matrices, rank=self.rank, world=self.world)
        lr = self.recipe.adam_lr
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)
        self.parameters = [*matrices, *rest]
        self.average = [p.detach().clone() for p in self.parameters]
        self.empty = token_ids(build_tokenizer(), [""])[0]
        self.step_number, self.seconds = 0, 0.0

    def losses(self, latents: Tensor, ids: Tensor, rows: slice) -> Tensor:
        """Mean squared velocity error of this process's part of the batch."""
        recipe = self.recipe
        x, t, target = flow_batch(latents, recipe.seed, self.step_number, recipe.batch, rows, recipe.t_mean)
        states, pooled = conditioning((self.encoders[0], self.encoders[1]), ids)
        low = torch.bfloat16
        out = self.work(
            hidden_states=x.to(low),
            encoder_hidden_states=states.to(low),
            pooled_projections=pooled.to(low),
            timestep=1000 * t,
            return_dict=False,
        )[0]
        return (out.float() - target).square().mean()

    def update(self) -> float:
        """Average the gradients, clip, apply both optimisers and the moving average; returns the gradient norm."""
        for full, low in self.pairs:
            full.grad = torch.zeros_like(full) if low.grad is None else low.grad.float()
            low.grad = None
        for p in self.encoders.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        average_gradients(self.parameters, self.world)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        progress = self.step_number / self.recipe.steps
        factor = min(1.0, (self.step_number + 1) / self.recipe.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        self.muon.step(self.recipe.muon_lr * factor)
        self.adam.param_groups[0]["lr"] = self.recipe.adam_lr * factor
        self.adam.step()
        self.encoders.zero_grad(set_to_none=True)
        self.step_number += 1
        with torch.no_grad():
            torch._foreach_copy_([low for _, low in self.pairs], [full for full, _ in self.pairs])
            decay = min(self.recipe.ema, (1 + self.step_number) / (10 + self.step_number))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(norm)

    def save(self, path: Path) -> None:
        """Everything that continuing needs."""
        state = {
            "weights": self.parameters,
            "average": self.average,
            "momenta": self.muon.buffers,
            "adam": self.adam.state_dict(),
            "step": self.step_number,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
        }
        replace(path, state)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Continue from `save`; the state of one process serves all."""
        state = torch.load(path, weights_only=True)
        for name, own in (("weights", self.parameters), ("average", self.average), ("momenta", self.muon.buffers)):
            torch._foreach_copy_(own, state[name])
        self.adam.load_state_dict(state["adam"])
        torch._foreach_copy_([low for _, low in self.pairs], [full for full, _ in self.pairs])
        self.step_number, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def export(self, root: Path, folder: Path) -> None:
        """Write the pipeline with the averaged weights."""
        current = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        self.write(root, folder)
        torch._foreach_copy_(self.parameters, current)

    def write(self, root: Path, folder: Path) -> None:
        """Write the pipeline with the present weights."""
        save_pipeline(folder, load_vae(root), (self.encoders[0], self.encoders[1]), self.transformer)


def flow_worker(rank: int, world: int, folder: str, out: str, recipe: FlowRecipe) -> None:
    """Train, saving state into `folder` and the averaged pipeline into `out` from time to time and at the end."""
    run(Trainer(recipe, rank, world), Path(folder), Path(out), "flow")


def run(trainer: Trainer, root: Path, out: Path, stage: str) -> None:
    """Train to the recipe's `stop` from the last state in `root`; at the end writes `stage`.json beside it."""
    recipe, rank, world = trainer.recipe, trainer.rank, trainer.world
    latents, ids = open_array(root, "latents"), open_array(root, "ids")
    resume = root / f"{stage}_state.pt"
    if resume.exists():
        trainer.load(resume)
    share_size = recipe.batch // world
    rows = slice(rank * share_size, (rank + 1) * share_size)
    began, mean = time.time() - trainer.seconds, 0.0
    start = trainer.step_number
    steps = bar(range(start, recipe.stop), rank, desc=stage, initial=start, total=recipe.stop)
    for step in steps:
        picked = epoch_rows(recipe.seed + 1, step, recipe.batch, len(latents))[rows]
        draw = np.random.default_rng([recipe.seed, 5, step])
        versions = draw.integers(CAPTIONS_PER_SCENE, size=recipe.batch)[rows]
        dropped = torch.from_numpy(draw.random(recipe.batch)[rows] < recipe.caption_dropout)
        texts = torch.from_numpy(ids[picked, versions].astype(np.int64))
        texts = torch.where(dropped[:, None], trainer.empty, texts)
        loss = trainer.losses(torch.from_numpy(latents[picked]), texts, rows)
        loss.backward()
        norm = trainer.update()
        trainer.seconds = time.time() - began
        if rank == 0:
            mean += (loss.item() - mean) * max(0.01, 1 / (step - start + 1))
            steps.set_postfix(loss=f"{mean:.4f}", norm=f"{norm:.2f}")
            if trainer.step_number % recipe.save_every == 0:
                trainer.save(resume)
            if trainer.step_number % recipe.export_every == 0:
                trainer.export(root, out)
    if rank == 0:
        trainer.save(resume)
        trainer.export(root, out)
        summary = {"seconds": trainer.seconds, "loss": mean, "recipe": asdict(recipe)}
        (root / f"{stage}.json").write_text(json.dumps(summary))
