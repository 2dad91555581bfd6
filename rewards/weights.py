"""Weights of a reward from a local path or the hub, with errors that say which file goes where.

transformers and huggingface_hub are imported inside the functions: they take seconds, and most runs never need them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewards.base import RewardError, one_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Names the reward in a RewardError raised inside, and keeps the run's own random stream as it was.

    Building a network draws random numbers even if all of them are replaced by weights from a file.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        except RewardError as error:
            raise RewardError(f"reward '{name}': {error}") from error


def find_file(given: str, filename: str, page: str, argument: str = "path") -> Path:
    """The weights file that `given` names: the file itself, a folder with `filename`, or the hub id of a repository.

    page: where a person gets the file; argument: the reward's argument that `given` came from. Raises RewardError.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    remedy = f"get {filename} from {page} and set {argument} to its path"
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise RewardError(f"{path} has no {filename}: {remedy}")
    if not _is_hub_id(given):
        raise RewardError(f"there is no file {path}: {remedy}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(given, filename))
    except Exception as error:
        problem = f"{filename} of {given} is not on this machine and could not be downloaded"
        raise RewardError(f"{problem}: {remedy} ({one_line(error)})") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a pickled state dict, on the CPU. Raises RewardError; runs no code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RewardError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RewardError(f"{path} is not a state dict: it must map names to tensors")
    return dict(tensors)


def load_pretrained(kind: Any, given: str, argument: str, dtype: torch.dtype) -> Any:
    """A frozen transformers model of class `kind` in eval mode, from a folder or a hub id.

    Raises RewardError if it is not there, or if a weight is missing: transformers would draw that one at random.
    """
    from transformers.utils import logging

    _check_folder(given, argument)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of weights without a place; those without a value are checked below
    try:
        model, report = kind.from_pretrained(_expanded(given), dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise _unavailable(given, argument, one_line(error)) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise RewardError(f"{given} is no {kind.__name__}: it lacks {len(missing)} weights, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def model_type(given: str, argument: str) -> str:
    """The `model_type` in the config.json of a folder or hub id in transformers' format. Raises RewardError."""
    from transformers import AutoConfig

    _check_folder(given, argument)
    try:
        return str(AutoConfig.from_pretrained(_expanded(given)).model_type)
    except Exception as error:
        raise _unavailable(given, argument, one_line(error)) from error


def load_tokenizer(kind: Any, given: str, argument: str) -> Any:
    """A transformers tokenizer of class `kind`, from a folder or a hub id. Raises RewardError."""
    _check_folder(given, argument)
    try:
        tokenizer = kind.from_pretrained(_expanded(given))
    except Exception as error:
        raise _unavailable(given, argument, one_line(error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where it finds no file
        raise _unavailable(given, argument, f"it has no vocabulary of a {kind.__name__}")
    return tokenizer


def recompute_layers(model: nn.Module) -> None:
    """Let every layer of a transformers model recompute its activations in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # transformers' own switch works in training mode only, which would turn dropout on.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def linear_head(tensors: Mapping[str, Tensor], prefix: str, indices: Sequence[int]) -> nn.Sequential:
    """The linear layers `prefix`I.weight, .bias for I in `indices`, the last of width 1, frozen.

    The published heads have dropout between them and no activation; dropout is left out, so it cannot be on. Raises
    RewardError if the tensors under `prefix` are others: a head with activations has its layers at other indices.
    """
    found = {key for key in tensors if key.startswith(prefix)}
    expected = {f"{prefix}{index}.{part}" for index in indices for part in ("weight", "bias")}
    if found != expected:
        odd = sorted(found ^ expected)
        raise RewardError(f"the weights are not of this head: {prefix}* has or lacks {', '.join(odd[:3])}")
    layers = []
    for index in indices:
        weight, bias = tensors[f"{prefix}{index}.weight"].float(), tensors[f"{prefix}{index}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        layers.append(layer)
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    if any(left[1] != right[0] for left, right in pairwise(widths)) or widths[-1][1] != 1:
        raise RewardError(f"the weights are not of this head: its layers have the widths {widths}")
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and Path(text).suffix not in _FILE_SUFFIXES


def _expanded(given: str) -> str:
    """`~` resolved; a hub id stays as it is."""
    return str(Path(given).expanduser()) if given.startswith("~") else given


def _check_folder(given: str, argument: str) -> None:
    if not _is_hub_id(given) and not Path(given).expanduser().is_dir():
        raise RewardError(f"there is no folder {given}: {argument} is a folder in transformers' format or a hub id")


def _unavailable(given: str, argument: str, reason: str) -> RewardError:
    if Path(given).expanduser().is_dir():
        return RewardError(f"{argument} {given} cannot be loaded: {reason}")
    return RewardError(
        f"{given} is not on this machine and could not be downloaded: get https://huggingface.co/{given} into a folder "
        f"and set {argument} to its path ({reason})"
    )
