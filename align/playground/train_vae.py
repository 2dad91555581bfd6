"""The autoencoder of the playground: data, training, and the latents of all images."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.playground.components import build_vae, shared_parts
from align.playground.data import epoch_rows, fill_scenes, open_array, to_tensor
from align.playground.parallel import average_gradients


@dataclass(frozen=True)
class VaeRecipe:
    """Settings of the autoencoder's training; batch is over all processes."""

    steps: int = 1100
    batch: int = 32
    lr: float = 2e-3
    kl: float = 3e-4
    seed: int = 0


def bar(iterable: Any, rank: int, **kwargs: Any) -> Any:
    """A progress bar on process 0, the bare iterable elsewhere."""
    from tqdm.auto import tqdm

    return tqdm(iterable, mininterval=5.0, **kwargs) if rank == 0 else iterable


def render_worker(rank: int, world: int, folder: str, count: int, seed: int) -> None:
    """Render this process's share of the scenes."""
    rows = range(rank * count // world, (rank + 1) * count // world)
    for _ in bar(fill_scenes(Path(folder), rows, seed), rank, total=len(rows), desc="scenes"):
        pass


def _loss(vae: Any, images: Tensor, kl_weight: float, noise: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
    with torch.autocast("cpu", torch.bfloat16):
        error = vae.decode(z).sample.float() - images
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + kl_weight * kl


def vae_worker(rank: int, world: int, folder: str, recipe: VaeRecipe) -> None:
    """Train the autoencoder and write vae.pt (weights, scaling and shift factors, PSNR) into `folder`."""
    root = Path(folder)
    images = open_array(root, "images")
    torch.manual_seed(recipe.seed)
    vae = build_vae()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    start, began = 0, time.time()
    resume = root / "vae_state.pt"
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start, began = state["step"], began - state["seconds"]
    share_size = recipe.batch // world
    noise = torch.Generator()
    for step in (progress := bar(range(start, recipe.steps), rank, desc="vae", initial=start, total=recipe.steps)):
        warm = min(1.0, (step + 1) / 50)
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.lr * warm * (0.02 + 0.98 * cosine)
        rows = epoch_rows(recipe.seed, step, recipe.batch, len(images))[rank * share_size : (rank + 1) * share_size]
        noise.manual_seed(recipe.seed * 1_000_003 + step * world + rank)
        loss = _loss(vae, to_tensor(images[np.sort(rows)]), recipe.kl, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if rank == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
            if (step + 1) % 250 == 0:
                state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                replace(resume, state | {"seconds": time.time() - began})
    if rank == 0:
        _finish(vae, images, root, time.time() - began)


def replace(path: Path, state: Any) -> None:
    """`torch.save` that never leaves a half-written file."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def _finish(vae: Any, images: np.ndarray, root: Path, seconds: float) -> None:
    vae.eval()
    batches = [to_tensor(images[i : i + 64]) for i in range(0, min(len(images), 1024), 64)]
    means = [vae.encode(b).latent_dist.mode() for b in batches]
    errors = [(vae.decode(m).sample.clamp(-1, 1) - b).square().mean() for m, b in zip(means, batches, strict=True)]
    # Pixel values span 2, so the peak of the ratio is 2 squared.
    psnr = 10 * math.log10(4 / torch.stack(errors).mean().item())
    latents = torch.cat(means)
    info = {
        "psnr": psnr,
        "shift_factor": latents.mean().item(),
        "scaling_factor": 1 / latents.std().item(),
        "seconds": seconds,
        "channel_std": latents.std((0, 2, 3)).tolist(),
        "channel_mean": latents.mean((0, 2, 3)).tolist(),
    }
    replace(root / "vae.pt", vae.state_dict())
    (root / "vae.json").write_text(json.dumps(info, indent=1))


def load_vae(root: Path) -> Any:
    """The trained autoencoder with its scaling and shift factors set."""
    info = json.loads((root / "vae.json").read_text())
    vae = build_vae()
    vae.load_state_dict(torch.load(root / "vae.pt", weights_only=True))
    vae.register_to_config(scaling_factor=info["scaling_factor"], shift_factor=info["shift_factor"])
    return vae.eval()


@torch.no_grad()
def latent_worker(rank: int, world: int, folder: str, first: str | None = None, batch: int = 64) -> None:
    """Write the latents of this process's share of the images, normalised as the pipeline that decodes them expects.

    They come from the autoencoder just trained, or from that of the base in the folder `first`, for its U-Net sibling.
    """
    root = Path(folder)
    images, latents = open_array(root, "images"), open_array(root, "latents", "r+")
    vae = load_vae(root) if first is None else shared_parts(Path(first))[0]
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    last = (rank + 1) * len(images) // world
    for low in bar(range(rank * len(images) // world, last, batch), rank, desc="latents"):
        high = min(low + batch, last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_tensor(images[low:high])).latent_dist.mode()
        latents[low:high] = ((mean.float() - shift) * scale).numpy()
