"""Train one proxy reward: `python -m align.playground.train_proxy --out DIR --seed S`.

A tiny open_clip network learns, by the contrastive loss of CLIP (arXiv 2103.00020), which caption belongs to which
scene. DIR is then a folder in open_clip's format, with the figures of `assess_proxy` in proxy.json beside the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from align.playground.captions import caption
from align.playground.components import EOS, MAX_TOKENS, build_tokenizer, vocabulary
from align.playground.data import epoch_rows, to_tensor
from align.playground.scenes import SIZE, render, sample_scene
from align.playground.train_vae import bar

CAPTIONS_PER_SCENE = 3
LARGEST_SCALE = 100.0  # of the logits, as in CLIP


@dataclass(frozen=True)
class ProxyRecipe:
    """Settings of one proxy. Members of an ensemble share `pool` and differ in `seed`, `patch_size` and `share`."""

    seed: int = 0
    """Of the first weights, the batches, and the member's share of the pool."""
    pool: int = 20_000
    """Scenes with seen colour-shape pairs only; the same for every seed."""
    share: float = 0.7
    """Part of the pool that this member sees, in (0, 1]."""
    patch_size: int = 8
    """Pixels; divides 64."""
    shuffled: float = 0.1
    """Part of the scenes whose captions are another scene's."""
    steps: int = 1000
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if SIZE % self.patch_size:
            raise ValueError(f"patch_size must divide {SIZE}, got {self.patch_size}")
        if not 0 < self.share <= 1 or not 0 <= self.shuffled <= 1:
            raise ValueError(f"share must lie in (0, 1] and shuffled in [0, 1], got {self.share} and {self.shuffled}")
        if int(self.pool * self.share) < self.batch:
            raise ValueError(f"a share of {self.share} of {self.pool} scenes is less than a batch of {self.batch}")


def clip_config(patch_size: int) -> dict[str, Any]:
    """What open_clip_config.json holds: the architecture (about 0.5 million parameters) and the preprocessing."""
    vocab, _ = vocabulary()
    vision = {"image_size": SIZE, "patch_size": patch_size, "width": 96, "head_width": 32, "layers": 3}
    text = {
        "context_length": MAX_TOKENS,
        "vocab_size": len(vocab),
        "hf_tokenizer_name": ".",  # open_clip reads the tokenizer of its own folder, whatever the name
        "width": 64,
        "heads": 2,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": vocab[EOS],
    }
    preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    return {
        "model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": preprocessing,
    }


def build_clip(patch_size: int) -> Any:
    """An untrained open_clip network of `clip_config`, drawn from torch's random state."""
    from open_clip import CLIP

    return CLIP(**clip_config(patch_size)["model_cfg"])


@dataclass
class PairData:
    """Images uint8 (N, 64, 64, 3) and the token ids int64 (N, 3, 16) of their captions."""

    images: np.ndarray
    ids: Tensor


def make_data(recipe: ProxyRecipe, progress: bool = True) -> PairData:
    """This member's share of the pool, rendered and captioned, some of it wrongly.

    A scene of the pool depends on its number alone. Plain renders do: trained on as many images from the autoencoder,
    a network told captions apart no better, be it on renders, on the autoencoder's images or on generated ones.
    """
    rng = np.random.default_rng([recipe.seed, 91])
    rows = np.sort(rng.permutation(recipe.pool)[: int(recipe.pool * recipe.share)])
    images = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
    texts: list[str] = []
    for place, row in enumerate(bar(rows.tolist(), 0 if progress else 1, desc="scenes")):
        scene_rng = np.random.default_rng([17, row])
        scene = sample_scene(scene_rng)
        images[place] = render(scene)
        texts += [caption(scene, scene_rng) for _ in range(CAPTIONS_PER_SCENE)]
    tokens = build_tokenizer()(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids = tokens.input_ids.view(len(rows), CAPTIONS_PER_SCENE, MAX_TOKENS)
    wrong = torch.from_numpy(rng.permutation(len(rows))[: int(len(rows) * recipe.shuffled)])
    ids[wrong] = ids[wrong.roll(1)]
    return PairData(images, ids)


def batches(data: PairData, recipe: ProxyRecipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, 64, 64) in [-1, 1] and token ids (B, 16) of each step, from (seed, step) alone."""
    for step in range(recipe.steps):
        rows = epoch_rows(recipe.seed, step, recipe.batch, len(data.images))
        which = np.random.default_rng([recipe.seed, 92, step]).integers(CAPTIONS_PER_SCENE, size=len(rows))
        yield to_tensor(data.images[rows]), data.ids[torch.from_numpy(rows), torch.from_numpy(which)]


def clip_loss(model: Any, images: Tensor, ids: Tensor) -> Tensor:
    """The symmetric contrastive loss of a batch; a scalar, log(B) for features that tell nothing apart."""
    with torch.autocast("cpu", torch.bfloat16):
        pictures, texts = model.encode_image(images), model.encode_text(ids)
    logits = model.logit_scale.exp() * F.normalize(pictures.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def train(data: PairData, recipe: ProxyRecipe, progress: bool = True) -> tuple[Any, float]:
    """The trained network and the mean loss of its last 50 steps."""
    torch.manual_seed(recipe.seed)
    model = build_clip(recipe.patch_size).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    losses: list[float] = []
    shown = bar(range(recipe.steps), 0 if progress else 1, desc="proxy")
    # With the fused attention kernel a step takes nearly twice as long on a CPU: sequences are short.
    with sdpa_kernel(SDPBackend.MATH):
        for step, (images, ids) in zip(shown, batches(data, recipe), strict=True):
            rate = (
                recipe.lr * min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = clip_loss(model, images, ids)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(LARGEST_SCALE))
            losses.append(loss.item())
            if progress:
                shown.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    return model.eval(), float(np.mean(losses[-50:]))


def save(model: Any, recipe: ProxyRecipe, folder: Path) -> None:
    """Write the network as a folder in open_clip's format: float16 weights, architecture, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config(recipe.patch_size), indent=1) + "\n")
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").chmod(0o644)


def main() -> None:
    """Command line."""
    from align.playground.assess_proxy import assess

    recipe = ProxyRecipe()
    parser = argparse.ArgumentParser(prog="python -m align.playground.train_proxy", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the network")
    options: tuple[tuple[str, Callable[[str], Any], str], ...] = (
        ("seed", int, "of the first weights, the batches and the share of the pool"),
        ("pool", int, "scenes that all members draw their share from"),
        ("share", float, "part of the pool of scenes that this member sees"),
        ("patch_size", int, "of the vision transformer, in pixels"),
        ("shuffled", float, "part of the scenes with another's captions"),
        ("steps", int, "of training"),
    )
    for name, kind, text in options:
        shown = f"{text} (default {getattr(recipe, name)})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(recipe, name), help=shown)
    args = vars(parser.parse_args())
    out = args.pop("out")
    try:
        recipe = ProxyRecipe(**args)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    began = time.process_time()  # of this process: a machine that does other work too takes longer
    data = make_data(recipe)
    prepared = time.process_time()
    model, loss = train(data, recipe)
    seconds = {"data": round(prepared - began, 1), "training": round(time.process_time() - prepared, 1)}
    save(model, recipe, out)
    parameters = sum(p.numel() for p in model.parameters())
    figures = {"recipe": asdict(recipe), "parameters": parameters, "final_loss": round(loss, 4), "cpu_seconds": seconds}
    (out / "proxy.json").write_text(json.dumps(figures | assess(out), indent=1) + "\n")


if __name__ == "__main__":
    main()
