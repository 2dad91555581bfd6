"""`align fit-direction`: the first stage of D2-Align, the direction in which a CLIP-type reward likes what a model makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from align.config import Config, load_config
from align.credit_stats import mean_rank_correlation
from align.errors import UserError
from align.evaluate import conditions_of, sample_images
from align.models.base import load_model
from align.prompts import Prompt, load_prompts
from align.run import deploy_guidance
from align.schema import nearest
from align.score import best_device
from align.train import readable_errors
from rewards.clip import CLIPScore
from rewards.directional import DirectionalReward, fit_direction, guided_text, save_direction
from rewards.registry import build_reward

LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class Fitted:
    """A direction b and what it does to the images that it was found on."""

    path: Path
    images: int
    norm: float
    """|b|; text embeddings have norm 1."""
    before: float
    """Mean cosine of an image and its prompt."""
    after: float
    """Mean guided score in the same unit."""
    agreement: float
    """Mean rank correlation of guided and plain score among the images of a prompt; 1: they rank images alike."""


def fit_direction_command(
    config: Annotated[str, typer.Argument(help="YAML file of a run with a reward of type d2align")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings that win over the file, as in model.path=MODEL")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="which of the run's d2align rewards (default: the only one)")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="the first training prompts that images are made of")] = 128,
    images: Annotated[int, typer.Option(min=2, help="images of each prompt")] = 4,
    norm: Annotated[float, typer.Option(help="longest direction, where texts have length 1; inf: no limit")] = 0.3,
    steps: Annotated[int, typer.Option(min=1, help="steps of the search")] = 2000,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Find the direction of a d2align reward on the base model's images, and write it where the reward looks for it.

    The model is not trained. For example: align fit-direction configs/playground/d2_align.yaml
    """
    console = Console()
    with readable_errors(console, debug):
        settings = load_config(config, overrides or [])
        fitted = run_fit(settings, reward, prompts, images, norm, steps, console)
        console.print(
            f"{fitted.images} images: guided score {fitted.after:.3f} (plain {fitted.before:.3f}), |b| {fitted.norm:.2f}, "
            f"agreement of guided and plain score among a prompt's images {fitted.agreement:.2f}",
            highlight=False,
            soft_wrap=True,
        )
        if fitted.agreement < LEAST_AGREEMENT:
            console.print(
                "[yellow]warning:[/yellow] the direction has taken over, the score hardly depends on the prompt: "
                "use a smaller --norm",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"direction: {fitted.path}", highlight=False, soft_wrap=True)


def run_fit(
    config: Config, name: str | None, prompts: int, images: int, norm: float, steps: int, console: Console
) -> Fitted:
    """Sample `images` of each of the first `prompts` training prompts once, embed them once, fit b to the embeddings.

    Raises: UserError for a configuration without such a reward; RewardError for a base reward that cannot be loaded.
    """
    if not norm > 0:
        raise UserError(f"--norm: must be positive, got {norm:g}")
    reward, device = _chosen(config, name), best_device()
    if reward.omega == 0.5:
        raise UserError("omega: at 0.5 a direction and its opposite cancel, so there is none to find; 1.5 was best")
    base = reward.base
    base.setup(device, torch.float32)
    rows = [prompt for prompt in load_prompts(config.prompts.train)[:prompts] for _ in range(images)]
    pictures, texts = _embeddings(config, base, rows, device, console)
    direction = fit_direction(pictures, texts, omega=reward.omega, renorm=reward.renorm, norm=norm, steps=steps)
    path = Path(reward.path).expanduser()
    about = {"omega": reward.omega, "images": len(rows), "norm": norm, "steps": steps, "model": config.model.path}
    save_direction(path, direction, base, {key: str(value) for key, value in about.items()})
    plain = (pictures * texts).sum(-1)
    guided = (pictures * guided_text(texts, direction, reward.omega, reward.renorm)).sum(-1)
    return Fitted(
        path,
        len(rows),
        float(direction.norm()),
        float(plain.mean()),
        float(guided.mean()),
        mean_rank_correlation(plain.double(), guided.double(), torch.arange(len(rows)) // images) or 0.0,
    )


def _chosen(config: Config, name: str | None) -> DirectionalReward:
    """The d2align reward `name`, or the only one, not set up."""
    entries = {**config.rewards, **config.eval_rewards}
    if name is not None and name not in entries:
        raise UserError(f"--reward: no reward '{name}'{nearest(name, entries)}")
    found = {n: build_reward(n, entry) for n, entry in entries.items() if name in (None, n)}
    kinds = {n: reward for n, reward in found.items() if isinstance(reward, DirectionalReward)}
    if not kinds:
        raise UserError(
            "no reward of the configuration is of type d2align; add for example  rewards: {guided: {type: d2align, "
            "args: {base: {type: clip}, direction: outputs/direction.safetensors}}}"
        )
    if len(kinds) > 1:
        raise UserError(f"several rewards are of type d2align: choose one with --reward ({', '.join(kinds)})")
    return next(iter(kinds.values()))


@torch.no_grad()
def _embeddings(
    config: Config, base: CLIPScore, rows: list[Prompt], device: torch.device, console: Console
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) float32 on the CPU of an image of each prompt by the base model, and of the prompts."""
    with console.status("loading the model"):
        model = load_model(config.model, device)
    model.finish_setup()
    size = config.train.rollout_batch
    pictures = []
    starts = range(0, len(rows), size)
    for start in track(starts, "sampling", console=console, transient=True, disable=not console.is_terminal):
        some = rows[start : start + size]
        index = list(range(start, start + len(some)))
        steps, guidance = config.eval.num_steps, deploy_guidance(config)
        made = sample_images(
            model, [p.text for p in some], index, steps, guidance, config.train.seed, conditions_of(model, some)
        )
        pictures += [base.embed_images(part).float().cpu() for part in made.split(base.max_batch)]
    return torch.cat(pictures), base.embed_texts([p.text for p in rows]).float().cpu()
