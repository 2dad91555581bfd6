"""The whole configuration of a run: composed of the rooms' own dataclasses, loaded from YAML and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from align.advantages import AdvantageConfig
from align.credit import CreditConfig
from align.errors import UserError
from align.models.base import ModelConfig
from align.objectives import ObjectiveConfig
from align.schema import build, nearest
from align.selection import SelectionConfig
from rewards.registry import RewardConfig
from samplers.calibration import CalibrationConfig
from samplers.completions import CompletionConfig
from samplers.config import SamplerConfig
from samplers.plans import suffix_length

_REPOSITORY = Path(__file__).parent.parent / "configs"
CONFIG_DIR = _REPOSITORY if _REPOSITORY.is_dir() else Path(__file__).parent / "configs"


@dataclass
class PromptsConfig:
    """Where prompts come from: a .txt (one a line), a .jsonl ({"prompt": ..., "metadata": {}}), `playground:train`, or
    `playground:train:48` for another number of them."""

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
    """name -> reward; the weighted sum is trained."""
    eval_rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """Further rewards that are only measured, never trained."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    completions: CompletionConfig = field(default_factory=CompletionConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
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


def validate(config: Config) -> list[str]:
    """Impossible values and combinations, one line each."""
    errors = config.model.validate()
    errors += [f"sampler.{line}" for line in config.sampler.validate()]
    errors += [f"completions.{line}" for line in config.completions.validate(config.sampler.num_steps)]
    errors += [f"calibration.{line}" for line in config.calibration.validate()]
    errors += [f"credit.{line}" for line in config.credit.validate()]
    errors += [f"advantage.{line}" for line in config.advantage.validate()]
    errors += [f"selection.{line}" for line in config.selection.validate()]
    errors += [f"objective.{line}" for line in config.objective.validate(config.sampler.num_steps)]
    for kind, group in (("rewards", config.rewards), ("eval_rewards", config.eval_rewards)):
        for name, reward in group.items():
            errors += [f"{kind}.{name}.{line}" for line in reward.validate()]
    if not config.rewards:
        errors.append("rewards: none given; add for example  rewards: {verifier: {type: verifier}}")
    elif all(r.weight == 0 for r in config.rewards.values()):
        errors.append("rewards: every weight is 0, so there is nothing to learn")
    for name in set(config.rewards) & set(config.eval_rewards):
        errors.append(f"eval_rewards.{name}: already in rewards, which are always evaluated too")
    errors += _minimums(config)
    errors += _combinations(config)
    return errors


def _minimums(config: Config) -> list[str]:
    lowest = {
        "train.iterations": 1, "train.prompts_per_iteration": 1, "train.micro_batch": 1,
        "train.group_size": 1 if config.advantage.baseline == "history" else 2, "train.inner_epochs": 1,
        "train.updates_per_iteration": 1, "train.rollout_batch": 1, "train.seed": 0, "eval.every": 0, "eval.during": 1,
        "eval.prompts": 1, "eval.num_steps": 1, "eval.grid_prompts": 1, "eval.seed": 0, "checkpoint.every": 1,
        "checkpoint.keep": 1, "optim.ema_every": 1, "optim.warmup_updates": 0,
    }  # fmt: skip
    errors = []
    for key, low in lowest.items():
        room, name = key.split(".")
        value = getattr(getattr(config, room), name)
        if value < low:
            errors.append(f"{key}: must be at least {low}, got {value}")
    for key in ("lr", "max_grad_norm", "eps"):
        if getattr(config.optim, key) <= 0:
            errors.append(f"optim.{key}: must be positive, got {getattr(config.optim, key)}")
    for key in ("ema_decay", "final_lr_fraction"):
        if not 0 <= getattr(config.optim, key) < 1 + (key != "ema_decay"):
            errors.append(f"optim.{key}: must be between 0 and 1, got {getattr(config.optim, key)}")
    if not 0 <= config.train.max_invalid_fraction <= 1:
        errors.append(f"train.max_invalid_fraction: must be between 0 and 1, got {config.train.max_invalid_fraction}")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        errors.append(f"optim.betas: both must be in [0, 1), got {list(config.optim.betas)}")
    if config.optim.weight_decay < 0:
        errors.append(f"optim.weight_decay: must not be negative, got {config.optim.weight_decay}")
    if "/" in config.name or config.name in ("", ".", ".."):
        errors.append(f"name: must be a plain folder name, got '{config.name}'")
    return errors


def _combinations(config: Config) -> list[str]:
    errors = []
    samples, updates = config.samples_per_iteration, config.train.updates_per_iteration
    if updates > 0 and samples % updates:
        errors.append(f"train.updates_per_iteration: {updates} does not divide the {samples} samples of an iteration")
    if config.objective.type == "clipped_ratio" and config.sampler.kernel == "ode":
        errors.append(
            "sampler.kernel: 'ode' is deterministic, so it has no probability ratio; objective.type clipped_ratio needs "
            "flow_sde, dance_sde, cps or ddim (or use objective.type forward_process)"
        )
    if config.objective.type == "reward_difference" and config.sampler.kernel == "ode":
        errors.append("sampler.kernel: 'ode' has no log-prob, which reward_difference needs; use ddim, flow_sde or cps")
    if config.objective.type == "forward_process" and config.sampler.kernel != "ode":
        errors.append(
            f"sampler.kernel: objective.type forward_process trains on final images only and collects them with 'ode'; "
            f"got '{config.sampler.kernel}'"
        )
    if config.sampler.kernel == "ode" and config.sampler.plan != "full":
        errors.append(
            f"sampler.plan: '{config.sampler.plan}' chooses stochastic steps, and kernel 'ode' has none; use plan 'full'"
        )
    if config.sampler.kernel != "ode" and config.sampler.solver != "euler":
        errors.append(
            f"sampler.solver: '{config.sampler.solver}' only acts with kernel 'ode'; got '{config.sampler.kernel}'"
        )
    if config.sampler.kernel == "ode" and config.sampler.psi is not None:
        errors.append("sampler.psi: kernel 'ode' has no noise to set; remove psi")
    errors += _credit_errors(config) + _one_reward_errors(config) + _pair_errors(config)
    chosen, clip = config.selection, config.advantage.clip
    if chosen.rule == "extremes" and chosen.pos_threshold > clip and chosen.neg_threshold < -clip:
        errors.append(
            f"selection: no advantage passes these thresholds, since advantage.clip is {clip:g}; bring them nearer"
        )
    if not 0 < config.train.step_fraction <= 1:
        errors.append(f"train.step_fraction: must be in (0, 1], got {config.train.step_fraction}")
    if config.objective.type == "forward_process":
        for key in ("inner_epochs", "step_fraction"):
            if getattr(config.train, key) != 1:
                errors.append(f"train.{key}: objective.type forward_process trains drawn times once; leave it at 1")
    if (
        config.train.group_size >= 2
        and config.advantage.baseline == "group"
        and config.advantage.min_valid > config.train.group_size
    ):
        errors.append(
            f"advantage.min_valid: {config.advantage.min_valid} is more than train.group_size "
            f"{config.train.group_size}, so no group would ever count"
        )
    return errors


def _credit_errors(config: Config) -> list[str]:
    rule, sampler = config.credit.rule, config.sampler
    if not config.credit.needs_values:
        return []
    if config.objective.type != "clipped_ratio":
        return [
            f"credit.rule: '{rule}' gives every sampling step its own reward, and objective.type "
            f"{config.objective.type} trains by the final reward alone; use clipped_ratio, or credit.rule terminal"
        ]
    if rule == "turning_point" and not sampler.validate() and len(sampler.make_plan(0, 0).stochastic) < 2:
        return ["credit.rule: turning_point compares neighbouring steps, and only 1 is stochastic; use 2 or more"]
    return []


def _one_reward_errors(config: Config) -> list[str]:
    """History and the choice of extremes need one reward per image."""
    rule = config.credit.rule
    if rule == "terminal":
        return []
    errors = []
    if config.advantage.baseline == "history":
        errors.append(
            f"advantage.baseline: history keeps one reward an image, and credit.rule {rule} gives one a step; use group"
        )
    if config.selection.rule == "extremes":
        errors.append(
            f"selection.rule: extremes ranks images by one number, and credit.rule {rule} gives one a step; use all"
        )
    return errors


def _pair_errors(config: Config) -> list[str]:
    """reward_difference compares whole trajectories of one prompt, by their raw rewards."""
    if config.objective.type != "reward_difference":
        return []
    reason = "objective.type reward_difference compares the raw rewards of whole trajectories"
    errors = []
    if config.selection.rule != "all":
        errors.append(f"selection.rule: {reason}; use all")
    if config.train.step_fraction != 1:
        errors.append(f"train.step_fraction: {reason}; use 1")
    if config.sampler.plan not in ("full", "branched") or not (
        config.sampler.branch.shared or config.sampler.plan == "full"
    ):
        errors.append(
            f"sampler.plan: {reason}, from a start that they share or to the end; use full, or branched and shared"
        )
    if (
        config.train.updates_per_iteration > 0
        and config.train.prompts_per_iteration % config.train.updates_per_iteration
    ):
        errors.append(f"train.updates_per_iteration: {reason}, so it must divide train.prompts_per_iteration")
    if config.train.group_size < 2:
        errors.append(f"train.group_size: {reason} in pairs; use at least 2")
    return errors


def without_effect(config: Config) -> list[str]:
    """Settings that differ from their defaults and that nothing will read, each with the reason: notes, not errors.

    A layer may well set what a later layer switches off, so these are said and not refused.
    """
    sampler, optim, plain = config.sampler, config.optim, Config()
    values = config.credit.needs_values or sampler.psi is not None
    cases: list[tuple[bool, str, str]] = [
        (sampler.plan not in ("window", "sliding"), "sampler.window_size", f"sampler.plan is {sampler.plan}"),
        (sampler.plan not in ("window", "sliding"), "sampler.window_range", f"sampler.plan is {sampler.plan}"),
        (sampler.plan != "sliding", "sampler.window_every", f"sampler.plan is {sampler.plan}"),
        (sampler.plan != "sliding", "sampler.window_stride", f"sampler.plan is {sampler.plan}"),
        (sampler.plan != "branched", "sampler.branch", f"sampler.plan is {sampler.plan}"),
        (
            sampler.plan == "branched",
            "sampler.shared_noise",
            "sampler.plan is branched, see sampler.branch.shared",
        ),
        (config.advantage.baseline != "history", "advantage.history", "advantage.baseline is group"),
        (config.advantage.baseline == "history", "advantage.std", "advantage.baseline is history"),
        (config.advantage.baseline == "history", "advantage.std_floor", "advantage.baseline is history"),
        (config.advantage.baseline == "history", "advantage.min_valid", "advantage.baseline is history"),
        (config.objective.type == "reward_difference", "advantage", "objective.type is reward_difference"),
        (config.objective.type == "reward_difference", "selection", "objective.type is reward_difference"),
        (config.selection.rule == "all", "selection.pos_threshold", "selection.rule is all"),
        (config.selection.rule == "all", "selection.neg_threshold", "selection.rule is all"),
        (sampler.grid != "linspace_shift", "sampler.shift", f"sampler.grid is {sampler.grid}"),
        (sampler.kernel == "ode", "sampler.noise_level", "sampler.kernel is ode"),
        (sampler.psi is not None, "sampler.noise_level", "sampler.psi sets the noise"),
        (not values, "completions", f"credit.rule is {config.credit.rule}"),
        (config.credit.rule != "turning_point", "credit.turning_point", f"credit.rule is {config.credit.rule}"),
        (not config.credit.turning_point.balance, "credit.turning_point.balance_scope", "balance is false"),
        (not config.credit.turning_point.balance, "credit.turning_point.balance_key", "balance is false"),
        (config.calibration.rule == "literal", "calibration.tolerance", "calibration.rule is literal"),
        (config.calibration.rule == "fraction", "calibration.count_tolerance", "calibration.rule is fraction"),
        (optim.ema_decay == 0, "optim.ema_every", "optim.ema_decay is 0"),
        (optim.schedule == "constant", "optim.final_lr_fraction", "optim.schedule is constant"),
    ]
    lines = []
    for idle, key, reason in cases:
        if idle and attrgetter(key)(config) != attrgetter(key)(plain):
            lines.append(f"{key} has no effect: {reason}")
    start, end = sampler.branch.lengths(sampler.num_steps)
    if sampler.plan == "branched" and start < end and sampler.branch.stages > config.train.iterations:
        reached = suffix_length(config.train.iterations - 1, start, end, sampler.branch.stages)
        lines.append(
            f"sampler.branch.stages {sampler.branch.stages}: after train.iterations = {config.train.iterations} the suffix has "
            f"grown to {reached} of {end} steps"
        )
    if config.eval.during > config.eval.prompts:
        lines.append(f"eval.during {config.eval.during}: only eval.prompts = {config.eval.prompts} are evaluated")
    return lines


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
