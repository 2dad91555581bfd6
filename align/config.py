"""The whole configuration of a run: composed of the rooms' own dataclasses, loaded from YAML and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from align.advantages import AdvantageConfig
from align.combination import CombineConfig
from align.config_checks import validate
from align.control_loss import ConsistencyConfig
from align.credit import CreditConfig
from align.diversity import DiversityConfig
from align.early_stop import EarlyStopConfig
from align.errors import UserError
from align.models.base import ModelConfig
from align.objectives import ObjectiveConfig
from align.reward_loss import LossConfig
from align.schema import build, nearest
from align.selection import SelectionConfig
from align.uncertainty import UncertaintyConfig
from rewards.registry import RewardConfig
from samplers.calibration import CalibrationConfig
from samplers.completions import CompletionConfig
from samplers.config import SamplerConfig
from samplers.gradient_plan import BackpropConfig

_REPOSITORY = Path(__file__).parent.parent / "configs"
CONFIG_DIR = _REPOSITORY if _REPOSITORY.is_dir() else Path(__file__).parent / "configs"


@dataclass
class PromptsConfig:
    """Where prompts come from: a .txt (one a line), a .jsonl ({"prompt": ..., "metadata": {}}), `playground:train`, or
    `playground:train:48` for another number of them. With real images and conditions: a .jsonl of lines {"prompt": ...,
    "image": FILE, "condition": FILE, "labels": FILE}, or `playground:train_scenes`."""

    train: str = "playground:train"
    """Prompts that are trained on, visited in a seeded random order without repetition within an epoch."""
    eval: str = "playground:heldout_test"
    """Held-out prompts for evaluation; never trained on."""


@dataclass
class OptimConfig:
    """The optimiser of the adapter."""

    lr: float = 3e-4
    """AdamW learning rate (3e-4: Flow-GRPO and DiffusionNFT with LoRA)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    weight_decay: float = 1e-4
    """AdamW decoupled weight decay."""
    eps: float = 1e-8
    """AdamW epsilon."""
    max_grad_norm: float = 1.0
    """Gradient norm limit; larger gradients are scaled down to it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up; cosine falls to `final_lr_fraction` at the last iteration."""
    warmup_updates: int = 0
    """Updates of linear warm-up."""
    final_lr_fraction: float = 0.1
    """Where the cosine ends, as a fraction of `lr`."""
    ema_decay: float = 0.9
    """Decay of the evaluation average, min((1+n)/(10+n), ema_decay); what is evaluated and exported. 0: none."""
    ema_every: int = 1
    """Updates between two steps of the average."""


@dataclass
class TrainConfig:
    """Size and length of a run. Global numbers: they do not depend on the number of processes."""

    iterations: int = 100
    """Rounds of rollout + updates."""
    seed: int = 0
    """Seed of data order, noise and adapter initialisation."""
    prompts_per_iteration: int = 48
    """Groups P per iteration, over all processes."""
    group_size: int = 24
    """Images G per prompt that are compared with each other."""
    updates_per_iteration: int = 1
    """Optimiser steps per inner epoch, each on an equal share of the samples."""
    inner_epochs: int = 1
    """Passes over the samples of an iteration (2: B2-DiffuRL, arXiv 2503.11240)."""
    step_fraction: float = 1.0
    """Share of the stochastic steps that is trained, a random choice for each sample and epoch (DDPO, 2305.13301)."""
    micro_batch: int = 8
    """(sample, step) pairs per forward-backward on one process; results do not depend on it."""
    rollout_batch: int = 16
    """Images sampled and decoded at once on one process; results do not depend on it."""
    max_invalid_fraction: float = 0.2
    """Share of missing scores above which an iteration is skipped; three skips in a row stop the run."""
    async_scoring: bool = False
    """Judge what is sampled in a thread, while the rest is being sampled; scores are the same up to rounding."""
    scoring_timeout: float = 600.0
    """Seconds without an answer of a reward after which all that is not yet judged counts as missing (`async_scoring`)."""


@dataclass
class EvalConfig:
    """Held-out evaluation: same prompts and same noise for base and tuned, deterministic sampling."""

    every: int = 10
    """Iterations between evaluations on the first `during` prompts; 0: only at the end."""
    during: int = 64
    """Prompts of the evaluations during the run."""
    prompts: int = 256
    """Prompts of the final evaluation (base and tuned)."""
    num_steps: int = 40
    """Sampling steps at deployment."""
    guidance_scale: float | None = None
    """Guidance at deployment; null: that of the sampler."""
    seed: int = 1234
    """Seed of the evaluation noise."""
    grid_prompts: int = 8
    """Rows of the comparison grid."""
    pictures: int = 4
    """Pictures of the first prompts kept at every evaluation, at most 256 pixels long, which show what the rewards hide; of
    the base there are `grid_prompts`."""
    diversity: DiversityConfig = field(default_factory=DiversityConfig)


@dataclass
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 50
    """Iterations between checkpoints (one is always written at the end and on SIGTERM)."""
    keep: int = 3
    """Newest checkpoints kept; older ones are deleted."""
    resume: str = "auto"
    """auto: continue the newest checkpoint of this run, if any. never: refuse to touch an existing run. Or a checkpoint folder."""


@dataclass
class Config:
    """One run."""

    name: str = "run"
    """Folder name below `output_dir`."""
    output_dir: str = "outputs"
    """Where runs land."""
    preset: list[str] = field(default_factory=list)
    """Presets merged below this file, in order: names under configs/methods or configs/models, or paths. A preset may
    name presets of its own, which go below it; its `name` is not taken over."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """name -> reward; `combine` says how several of weight other than 0 are trained together."""
    eval_rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """Further rewards that are only measured, never trained."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    completions: CompletionConfig = field(default_factory=CompletionConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    combine: CombineConfig = field(default_factory=CombineConfig)
    uncertainty: UncertaintyConfig = field(default_factory=UncertaintyConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    backprop: BackpropConfig = field(default_factory=BackpropConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers through Accelerate (tensorboard, wandb, ...); metrics.jsonl is always written."""

    @property
    def run_dir(self) -> Path:
        """outputs/<run>."""
        return Path(self.output_dir) / self.name

    @property
    def samples_per_iteration(self) -> int:
        """N = P x G."""
        return self.train.prompts_per_iteration * self.train.group_size


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, put its presets below it and `key=value` overrides on top.

    Raises: UserError that lists every mistake found, each on its own line.
    """
    overlay = _overrides(overrides)
    own = _plain(_read_yaml(Path(path), "config file"))
    names = _preset_names(overlay.get("preset", own.get("preset")))
    merged = _plain(OmegaConf.merge(*[OmegaConf.create(layer) for layer in [*_layers(names), own, overlay]]))
    merged["preset"] = names
    merged.setdefault("name", Path(path).stem)
    return parse_config(merged)


def load_resolved(path: str | Path) -> Config:
    """Read the config.yaml that a run wrote: everything is in it, so its presets are not looked up again."""
    return parse_config(_plain(_read_yaml(Path(path), "config file")))


def _preset_names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"preset: expected a name or a list of names, got {value!r}")
    return names


def _layers(names: Sequence[str], inside: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Contents of the presets `names`, lowest first; `inside` are the presets that led here."""
    layers = []
    for name in names:
        if name in inside:
            raise UserError(f"preset: '{name}' includes itself ({' -> '.join([*inside, name])})")
        content = _plain(_read_yaml(preset_path(name), f"preset '{name}'"))
        content.pop("name", None)
        layers += [*_layers(_preset_names(content.pop("preset", None)), (*inside, name)), content]
    return layers


def parse_config(data: dict[str, Any]) -> Config:
    """Typed `Config` of plain nested data. Raises: UserError listing every mistake."""
    errors: list[str] = []
    config = build(Config, data, errors=errors)
    if not errors:
        errors += validate(config)
    if errors:
        raise UserError("\n".join(errors))
    return config


def preset_path(name: str) -> Path:
    """File of preset `name`: a path, or a name below configs/methods, configs/models or configs."""
    candidates = [Path(name), *(CONFIG_DIR / sub / f"{name}.yaml" for sub in ("methods", "models", "."))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for sub in ("methods", "models") for p in (CONFIG_DIR / sub).glob("*.yaml"))
    raise UserError(f"preset: no preset '{name}'{nearest(name, known)}; known: {', '.join(known)}")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same object."""
    return OmegaConf.to_yaml(OmegaConf.create({k: _listed(v) for k, v in dataclasses.asdict(config).items()}))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def _read_yaml(path: Path, what: str) -> DictConfig:
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        raise UserError(f"{what}: no file {path}{near}")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as problem:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(problem).split())}") from problem
    if isinstance(loaded, ListConfig):
        raise UserError(f"{path}: expected a mapping at the top, got a list")
    return loaded


def _overrides(items: Sequence[str]) -> dict[str, Any]:
    for item in items:
        if "=" not in item:
            raise UserError(f"'{item}': overrides are written key=value, for example train.iterations=20")
    try:
        return _plain(OmegaConf.from_dotlist(list(items)))
    except (YAMLError, OmegaConfBaseException) as problem:
        raise UserError(f"overrides: {' '.join(str(problem).split())}") from problem


def _plain(config: Any) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as problem:
        raise UserError(f"config: {' '.join(str(problem).split())}") from problem
