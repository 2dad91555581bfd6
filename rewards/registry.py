"""From a configuration entry to a reward: registered names, entry points, dotted paths and file paths."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rewards.base import Reward, RewardError, nearest, networks, one_line
from rewards.function import FunctionReward

ENTRY_POINT_GROUP = "align.rewards"

# Targets are strings, so that naming a reward imports nothing.
_REGISTERED = {
    "adversarial": "rewards.adversarial:AdversarialReward",
    "aesthetic": "rewards.aesthetic:AestheticScore",
    "aesthetic_v25": "rewards.aesthetic:AestheticV25",
    "artifact": "rewards.artifact:ArtifactReward",
    "augmented": "rewards.augmented:AugmentedReward",
    "brightness": "rewards.debug:BrightnessReward",
    "cached": "rewards.cache:CachedReward",
    "clip": "rewards.clip:CLIPScore",
    "d2align": "rewards.directional:DirectionalReward",
    "ensemble": "rewards.ensemble:EnsembleReward",
    "geneval": "rewards.geneval:GenEvalReward",
    "hps": "rewards.hps:HPSv2",
    "imagereward": "rewards.imagereward:ImageReward",
    "jpeg": "rewards.jpeg:JPEGReward",
    "judge": "rewards.judge:JudgeReward",
    "ocr": "rewards.ocr:OCRReward",
    "pal": "rewards.pal:PALReward",
    "pickscore": "rewards.pickscore:PickScore",
    "remote": "rewards.remote:RemoteReward",
}


@dataclass
class RewardConfig:
    """One reward of a run."""

    type: str = ""
    """A registered name, `package.module:Class`, `path/to/file.py:Class`, or a function by either path."""
    weight: float = 1.0
    """Factor of the raw score in the sum; 0 logs the reward without optimising it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class, or further keyword arguments of the function."""
    max_batch: int | None = None
    """Most images scored in one call; by default what the reward asks for."""
    offload: bool = False
    """Keep its networks on the CPU, and on its device only while images are scored."""

    def validate(self) -> list[str]:
        """Errors of this entry, one line each; nothing is imported."""
        errors = []
        if not isinstance(self.type, str) or not self.type:
            errors.append(f"type is missing: give {', '.join(known_rewards())} or a path such as my_rewards.py:score")
        else:
            errors += _type_errors(self.type)
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            errors.append(f"weight must be a finite number, got {weight!r}")
        if not isinstance(self.args, Mapping) or any(not isinstance(key, str) for key in self.args):
            errors.append(f"args must map names to values, got {self.args!r}")
        if self.max_batch is not None and (not isinstance(self.max_batch, int) or self.max_batch < 1):
            errors.append(f"max_batch must be a positive integer, got {self.max_batch!r}")
        return errors


def validate_rewards(configs: Mapping[str, RewardConfig]) -> list[str]:
    """Errors of all rewards of a run, each led by the reward's name; also that at least one has a weight."""
    errors = [f"{name}: {error}" for name, config in configs.items() for error in config.validate()]
    if not configs:
        errors.append("no reward is given: name at least one")
    elif all(config.weight == 0 for config in configs.values()):
        errors.append("every reward has weight 0: give at least one reward a weight")
    return errors


def register(name: str, target: str) -> None:
    """Make `name` stand for `target` (a path form) in this process; packages use the entry points instead."""
    _REGISTERED[name] = target


def known_rewards() -> dict[str, str]:
    """Name -> target of everything that can be named, sorted; a registered name wins over an entry point."""
    targets = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return dict(sorted((targets | _REGISTERED).items()))


def build_reward(name: str, config: RewardConfig) -> Reward:
    """The reward of a configuration entry, not yet set up. Raises RewardError, one line with name and remedy."""
    errors = config.validate()
    if errors:
        raise RewardError(f"reward '{name}': {'; '.join(errors)}")
    target = config.type if ":" in config.type else known_rewards()[config.type]
    found = _resolve(name, target)
    if inspect.isclass(found) and issubclass(found, Reward):
        _check_arguments(name, found, 0, config.args)
        try:
            reward = found(**config.args)
        except Exception as error:
            reason = str(error) if isinstance(error, RewardError) else one_line(error)
            raise RewardError(f"reward '{name}': {reason}") from error
    elif callable(found) and not inspect.isclass(found):
        _check_arguments(name, found, 3, config.args)
        reward = FunctionReward(name, found, config.args)
    else:
        kind = f"the class {found.__name__}" if inspect.isclass(found) else f"a {type(found).__name__}"
        raise RewardError(
            f"reward '{name}': {target} is {kind}, expected a subclass of rewards.Reward "
            "or a function f(images, prompts, metadata)"
        )
    reward.name = name
    if config.max_batch is not None:
        reward.max_batch = config.max_batch
    reward.rests = config.offload
    return reward


def set_up_rewards(configs: Mapping[str, RewardConfig], device: torch.device) -> dict[str, Reward]:
    """Rewards by name, ready to score on `device` in float32; those with `offload` leave it until they do.

    Raises: RewardError if a reward cannot be set up, or has nothing to offload.
    """
    rewards = {}
    for name, config in configs.items():
        reward = rewards[name] = build_reward(name, config)
        reward.setup(device, torch.float32)
        if config.offload:
            if type(reward).offload is Reward.offload and not networks(reward):
                raise RewardError(f"reward '{name}': offload: it holds no network that could leave the device; remove offload")
            reward.offload()
    return rewards


def _type_errors(kind: str) -> list[str]:
    if ":" not in kind:
        known = known_rewards()
        if kind in known:
            return []
        hint = nearest(kind, known) or f"; known: {', '.join(known)}"
        if kind.endswith(".py") or "." in kind:
            hint = f"; a path needs the name after a colon, as in {kind}:MyReward"
        return [f"unknown reward type '{kind}'{hint}"]
    location, _, attribute = kind.rpartition(":")
    if not location or not attribute.isidentifier():
        return [f"'{kind}' must be package.module:Name or path/to/file.py:Name"]
    if _is_file(location) and not Path(location).expanduser().is_file():
        return [f"there is no file {location} (looked in {Path.cwd()})"]
    return []


def _is_file(location: str) -> bool:
    return location.endswith(".py") or "/" in location


def _resolve(name: str, target: str) -> Any:
    """The object a path form names."""
    location, _, attribute = target.rpartition(":")
    try:
        module = _load_file(Path(location).expanduser()) if _is_file(location) else _load_module(location)
    except Exception as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and not _is_file(location):
            hint = "; check the spelling, install the package, or give a path such as path/to/file.py:Name"
        raise RewardError(f"reward '{name}': {location} cannot be imported ({one_line(error)}){hint}") from error
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = nearest(attribute, public)
        raise RewardError(f"reward '{name}': {location} has no '{attribute}'{hint}")
    return getattr(module, attribute)


def _load_module(location: str) -> ModuleType:
    _importable(Path.cwd())  # an installed command does not look in the working directory by itself
    return importlib.import_module(location)


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    _importable(path.parent)  # so that the file can import its neighbours
    # The checksum keeps two files of the same name apart.
    module_name = f"align_reward_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while the file runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _importable(folder: Path) -> None:
    """Append to the search path: at the end, so that nothing installed is shadowed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check_arguments(name: str, target: Callable[..., Any], positional: int, args: Mapping[str, Any]) -> None:
    """Raise RewardError for unknown or missing arguments, before anything is called.

    positional: how many leading parameters the library itself fills (3 for a function, 0 for a class).
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature
        return
    kinds = inspect.Parameter
    if any(parameter.kind is kinds.VAR_POSITIONAL for parameter in parameters):
        positional = min(positional, sum(p.kind is kinds.POSITIONAL_OR_KEYWORD for p in parameters))
    elif sum(p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) for p in parameters) < positional:
        raise RewardError(f"reward '{name}': the function must take (images, prompts, metadata)")
    named = [p for p in parameters[positional:] if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    options = [parameter.name for parameter in named]
    if not any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters):
        for key in args:
            if key not in options:
                hint = nearest(key, options) or f"; known: {', '.join(options) or 'none'}"
                raise RewardError(f"reward '{name}': unknown argument '{key}'{hint}")
    missing = [p.name for p in named if p.default is kinds.empty and p.name not in args]
    if missing:
        raise RewardError(f"reward '{name}': args must give {', '.join(missing)}")
