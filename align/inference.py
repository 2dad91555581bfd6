"""What `align sample`, `grid` and `eval` share: a model with or without an adapter, from a run or from options."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress

from align.checkpoint import checkpoints
from align.confidence import use_stored
from align.config import Config, load_resolved
from align.errors import UserError
from align.evaluate import Evaluation, evaluate
from align.models.base import ImageModel, ModelConfig, load_model
from align.prompts import Prompt, load_prompts
from align.run import deploy_guidance
from align.schema import nearest
from align.trainable import check_fixed
from rewards.base import Reward
from rewards.registry import RewardConfig, build_reward


@dataclass
class Setup:
    """A loaded model and how to sample from it."""

    model: ImageModel
    adapter: Path | None
    num_steps: int
    guidance_scale: float
    seed: int
    config: Config | None
    """The run's configuration when the target is a run's folder."""
    folder: Path | None = None
    """The run's folder, if it is one."""
    loaded: dict[Path, str] = field(default_factory=dict)
    """Resolved folder -> name in the pipeline, of every adapter that it holds."""


@dataclass(frozen=True)
class Share:
    """`strength` times the update in `folder`: 1 as trained, 0 none of it, below 0 away from it."""

    folder: Path
    strength: float = 1.0


def load_target(
    target: str,
    adapter: str | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
) -> Setup:
    """Load a run's folder (its model, adapter and evaluation settings) or a model (folder, hub id, `playground`).

    Options that are given win over the run's. Raises: UserError if the target or the adapter cannot be loaded.
    """
    run_dir = Path(target)
    config = load_resolved(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(adapter) if adapter else None
    if "/" in target and not run_dir.exists() and run_dir.parent.is_dir():  # otherwise it would pass for a hub id
        near = nearest(run_dir.name, [p.name for p in run_dir.parent.iterdir() if p.is_dir()])
        raise UserError(f"there is no run or model folder {target}{near}")
    if config is not None:
        model_config = replace(config.model, encoders="keep", compile=False)
        kind = "adapter" if config.model.controlnet is None else "controlnet"
        folder = folder or run_dir / kind
        if not adapter and not folder.is_dir():
            saved = checkpoints(run_dir)
            hint = f"give a checkpoint's: --adapter {saved[-1] / kind}" if saved else "it has no checkpoint yet"
            raise UserError(f"{folder} is not there, the run is not finished; {hint}")
        num_steps = num_steps or config.eval.num_steps
        if guidance_scale is None:
            guidance_scale = deploy_guidance(config)
        seed = config.eval.seed if seed is None else seed
    else:
        model_config = ModelConfig(path=target, precision="bf16" if device == "cuda" else "fp32")
    model = load_model(model_config, device)
    if folder is not None:
        model.load_adapter(folder, scale)
    model.finish_setup()
    return Setup(
        model,
        folder,
        num_steps or 28,
        1.0 if guidance_scale is None else guidance_scale,
        seed if seed is not None else 0,
        config,
        run_dir if config is not None else None,
        {folder.resolve(): "tuned"} if folder is not None else {},
    )


def chosen_prompts(setup: Setup, source: str | None, count: int | None) -> list[Prompt]:
    """Prompts of `source`, or of the run's held-out set, at most `count`."""
    if source is None:
        if setup.config is None:
            raise UserError("give --prompts FILE (a .txt, a .jsonl, or playground:heldout_test)")
        source = setup.config.prompts.eval
    prompts = load_prompts(source)
    return prompts if count is None else prompts[:count]


def chosen_rewards(setup: Setup, names: list[str]) -> dict[str, Reward]:
    """Rewards named in the run, else by registry name or path; without names, all of the run that it did not train.

    Raises: UserError for a named one that was trained along with the policy.
    """
    known: dict[str, RewardConfig] = {}
    if setup.config is not None:
        known = {**setup.config.rewards, **setup.config.eval_rewards}
    moving = [name for name, settings in known.items() if build_reward(name, settings).trainable]
    if named := [name for name in names if name in moving]:
        raise UserError(
            f"reward '{named[0]}' was trained along with the policy and cannot compare models: name another"
        )
    rewards = {
        name: ready_reward(name, known.get(name, RewardConfig(type=name)), setup.model.device)
        for name in names or [name for name in known if name not in moving]
    }
    if setup.folder is not None:
        use_stored(rewards, setup.folder)
    return rewards


def ready_reward(name: str, settings: RewardConfig, device: torch.device) -> Reward:
    """The reward, set up on `device`. Raises: RewardError if it cannot be, or has learnt nothing outside a run."""
    reward = build_reward(name, settings)
    check_fixed(name, reward)
    reward.setup(device, torch.float32)
    return reward


def compare(
    setup: Setup,
    rewards: dict[str, Reward],
    prompts: list[Prompt],
    console: Console,
    *,
    keep: int,
    batch_size: int = 16,
    adapters: Mapping[str, Sequence[Share]],
) -> dict[str, Evaluation]:
    """Evaluations of the base and of each of `adapters` (label -> what is added up) on the same prompts and noise.

    An adapter is loaded once, and weights that are the same are evaluated once. The pipeline keeps those of the last.
    Raises: UserError if an adapter does not fit the model.
    """
    weights = {label: _strengths(shares) for label, shares in {"base": (), **adapters}.items()}
    _load(setup, [folder for strengths in weights.values() for folder in strengths])
    found: dict[str, Evaluation] = {}
    accelerator = Accelerator()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks = {label: bar.add_task(f"{label}: sampling and scoring", total=len(prompts)) for label in weights}
        for label, task in tasks.items():
            strengths = weights[label]
            same = next((other for other in found if weights[other] == strengths), None)
            if same is not None:
                found[label] = found[same]
                bar.update(task, completed=len(prompts))
                continue
            if strengths:
                setup.model.use_adapters({setup.loaded[folder]: strengths[folder] for folder in strengths})
            found[label] = evaluate(
                setup.model,
                rewards,
                prompts,
                accelerator,
                num_steps=setup.num_steps,
                guidance_scale=setup.guidance_scale,
                seed=setup.seed,
                batch_size=batch_size,
                keep_images=keep,
                weights=contextlib.nullcontext() if strengths else setup.model.reference(),
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),  # type: ignore[misc]
            )
    return found


def _strengths(shares: Sequence[Share]) -> dict[Path, float]:
    """Resolved folder -> its total strength, without those of 0; in an order that does not depend on that of `shares`."""
    total: dict[Path, float] = {}
    for share in shares:
        folder = share.folder.resolve()
        total[folder] = total.get(folder, 0.0) + share.strength
    return {folder: total[folder] for folder in sorted(total) if total[folder]}


def _load(setup: Setup, folders: Sequence[Path]) -> None:
    """Load what of `folders` is not in the pipeline yet, each under a name of its own."""
    pipe, denoiser = setup.model.pipe, setup.model.denoiser_name
    for folder in folders:
        if folder not in setup.loaded:
            name = f"adapter{len(setup.loaded)}"
            setup.model.load_adapter(folder, name=name)
            setup.loaded[folder] = name
    for folder, name in setup.loaded.items():
        parts = [part for part, names in pipe.get_list_adapters().items() if name in names and part != denoiser]
        if parts:  # the prompts are embedded once for all columns
            raise UserError(f"adapter: {folder} also changes the {parts[0]}; only adapters of the {denoiser} compare")
