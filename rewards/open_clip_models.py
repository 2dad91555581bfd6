"""open_clip networks from a name, a folder or an own architecture, with errors that say which file goes where.

open_clip is imported inside the functions: it takes seconds, and most runs never need it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.base import RewardError, nearest, one_line

RANDOM = "random"

_CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_PRECISIONS = {torch.float32: "fp32", torch.float64: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class LoadedClip:
    """A network with what belongs to it."""

    model: Any
    """open_clip model: encode_image(pixels), encode_text(tokens)."""
    tokenizer: Callable[[list[str]], Tensor]
    """Texts -> (B, context length) int64."""
    transform: dict[str, Any]
    """Arguments of `rewards.preprocess.preprocess`."""


def load_clip(
    model_name: str | None, pretrained: str | None, config: Mapping[str, Any] | None, dtype: torch.dtype
) -> LoadedClip:
    """Load on the CPU; `config` comes from `read_config`. Random weights use torch's current random state.

    Raises RewardError, one line, if something is unknown, missing or does not fit.
    """
    import open_clip

    if dtype not in _PRECISIONS:
        raise RewardError(f"{dtype} is not supported: use float32, bfloat16 or float16")
    precision = _PRECISIONS[dtype]
    if config is not None:
        model, tokenizer = _load_config(config, pretrained or RANDOM, precision)
    elif model_name and Path(model_name).expanduser().is_dir():
        model, tokenizer = _load_folder(Path(model_name).expanduser(), precision)
    else:
        model, tokenizer = _load_named(model_name or "", pretrained, precision)
    if dtype is torch.float64:
        model = model.double()
    return LoadedClip(model, tokenizer, _transform(open_clip.get_model_preprocess_cfg(model)))


def read_config(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """{"model_cfg", "preprocess_cfg"} from a mapping or a JSON file that holds both, or the architecture alone."""
    source = "config"
    if isinstance(config, str):
        source = config
        try:
            config = json.loads(Path(config).expanduser().read_text())
        except OSError:
            raise RewardError(f"{source} cannot be read: config is a mapping or the path of a JSON file") from None
        except ValueError as error:
            raise RewardError(f"{source} is not valid JSON ({one_line(error)})") from None
    if not isinstance(config, Mapping):
        raise RewardError(f"{source} must be a mapping with {', '.join(_CONFIG_KEYS)}")
    whole = dict(config) if "model_cfg" in config else {"model_cfg": dict(config)}
    missing = [key for key in _CONFIG_KEYS if key not in whole["model_cfg"]]
    if missing:
        raise RewardError(f"{source} lacks {', '.join(missing)}: an open_clip model has {', '.join(_CONFIG_KEYS)}")
    whole.setdefault("preprocess_cfg", {})
    return whole


def _load_config(config: Mapping[str, Any], pretrained: str, precision: str) -> tuple[Any, Any]:
    """An own architecture, written as a folder of open_clip's format so that open_clip's loader does the rest."""
    import open_clip

    text = config["model_cfg"]["text_cfg"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        if pretrained != RANDOM:
            weights = _weights_file(pretrained)
            safe = weights.suffix == ".safetensors"
            link = "open_clip_model.safetensors" if safe else "open_clip_pytorch_model.bin"
            (folder / link).symlink_to(weights)
        try:
            model = _create(f"local-dir:{folder}", precision, require_pretrained=pretrained != RANDOM)
            if text.get("hf_tokenizer_name"):  # open_clip would look for its files in the temporary folder
                tokenizer: Any = open_clip.tokenizer.HFTokenizer(
                    text["hf_tokenizer_name"],
                    context_length=text.get("context_length", 77),
                    tokenizer_mode=text.get("tokenizer_mode"),
                    **(text.get("tokenizer_kwargs") or {}),
                )
            else:
                tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        except Exception as error:
            raise RewardError(f"config and pretrained={pretrained} do not fit: {one_line(error)}") from error
    return model, tokenizer


def _load_folder(folder: Path, precision: str) -> tuple[Any, Any]:
    import open_clip

    if not (folder / "open_clip_config.json").is_file():
        raise RewardError(f"{folder} has no open_clip_config.json: model must be a folder in open_clip's format")
    if not any(path.suffix in _WEIGHT_SUFFIXES[:3] for path in folder.iterdir()):
        raise RewardError(f"{folder} has no weights: place open_clip_model.safetensors there")
    try:
        model = _create(f"local-dir:{folder}", precision, require_pretrained=True)
        return model, open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:
        raise RewardError(f"{folder} cannot be loaded: {one_line(error)}") from error


def _load_named(model_name: str, pretrained: str | None, precision: str) -> tuple[Any, Any]:
    import open_clip

    if model_name.startswith("hf-hub:"):
        pretrained = None
    else:
        pretrained = _known_weights(model_name, pretrained)
    try:
        model = _create(model_name, precision, pretrained=pretrained, require_pretrained=True)
        return model, open_clip.get_tokenizer(model_name)
    except Exception as error:
        raise RewardError(f"{_remedy(model_name, pretrained)} ({one_line(error)})") from error


def _create(model_name: str, precision: str, **options: Any) -> Any:
    import open_clip

    return open_clip.create_model(model_name, precision=precision, pretrained_text=False, **options)


def _known_weights(model_name: str, pretrained: str | None) -> str:
    """The tag, or the absolute path of the checkpoint file; raises RewardError if neither exists."""
    import open_clip

    names, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(model_name)
    known = ", ".join(tags) or "none"
    if model_name not in names:
        problem = "there is no folder" if "/" in model_name else "open_clip has no model"
        raise RewardError(f"{problem} '{model_name}'{nearest(model_name, names)}")
    if pretrained is None:
        raise RewardError(f"{model_name} needs pretrained: the path of a checkpoint file, or one of {known}")
    if open_clip.is_pretrained_cfg(model_name, pretrained):
        return pretrained
    if "/" in pretrained or Path(pretrained).suffix in _WEIGHT_SUFFIXES:
        return str(_weights_file(pretrained))
    raise RewardError(f"{model_name} has no weights '{pretrained}'{nearest(pretrained, tags) or f'; known: {known}'}")


def _weights_file(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"there is no checkpoint {path}: place it there or correct pretrained")
    return path


def _remedy(model_name: str, pretrained: str | None) -> str:
    """What to do when a named model could not be created."""
    import open_clip

    if model_name.startswith("hf-hub:"):
        page = f"https://huggingface.co/{model_name.removeprefix('hf-hub:')}"
        return f"{model_name} cannot be loaded: download {page} into a folder and set model to its path"
    entry = open_clip.get_pretrained_cfg(model_name, pretrained or "")
    if not entry:
        return f"{pretrained} does not fit {model_name}"
    repository, _, file = entry.get("hf_hub", "").rpartition("/")
    page = f"https://huggingface.co/{repository}" if repository else entry.get("url", "")
    file = file or ("open_clip_model.safetensors" if repository else Path(page).name)
    return (
        f"the weights '{pretrained}' of {model_name} are not on this machine and could not be downloaded: "
        f"get {file} from {page} and set pretrained to its path"
    )


def _transform(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's preprocessing entry as arguments of `preprocess`."""
    size = cfg["size"]
    return {
        "size": (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "resize_mode": cfg.get("resize_mode") or "shortest",
        "interpolation": "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",
        "fill": (cfg.get("fill_color") or 0) / 255,
    }
