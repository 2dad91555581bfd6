"""Atomic checkpoints, exact resume, and the adapter in diffusers' own layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import UserError
from align.models.base import ImageModel, quiet
from align.models.controlnet import ControlNetSDModel
from align.tracking import write_json

PREFIX = "iteration-"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob(f"{PREFIX}*") if (p / "state.json").is_file())


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to continue from under setting `resume` (auto | never | a folder), or None for a fresh start.

    Raises: UserError if `never` meets an existing run, or the named folder is no checkpoint.
    """
    if resume == "auto":
        found = checkpoints(run_dir)
        return found[-1] if found else None
    if resume == "never":
        if (run_dir / "metrics.jsonl").exists():
            raise UserError(
                f"{run_dir} already holds a run: choose another name, delete it, or set checkpoint.resume=auto"
            )
        return None
    folder = Path(resume)
    if not (folder / "state.json").is_file():
        raise UserError(f"checkpoint.resume: {resume} is not a checkpoint (auto, never, or a folder with state.json)")
    return folder


def save_checkpoint(
    run_dir: Path, iteration: int, tensors: dict[str, Tensor], state: dict[str, Any], model: ImageModel, keep: int
) -> Path:
    """Write checkpoints/iteration-NNNNNN beside, rename it into place, then delete all but the newest `keep`."""
    parent = run_dir / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(parent)
    final = parent / f"{PREFIX}{iteration:06d}"
    if (final / "state.json").is_file():
        return final  # an iteration has one state: what is there is it, and replacing it would risk it
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary / "state.safetensors")
    write_json(temporary / "state.json", {**state, "iteration": iteration})
    write_result(model, temporary / model.result_name)
    _sync(temporary)
    os.replace(temporary, final)
    for old in checkpoints(run_dir)[:-keep]:
        _remove(old)
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON state of a checkpoint."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "state.safetensors"), state


def drop_newer(run_dir: Path, iteration: int) -> None:
    """Delete checkpoints past `iteration`: the run goes on from there, so they belong to a future that will not be."""
    for folder in checkpoints(run_dir):
        if int(folder.name.removeprefix(PREFIX)) > iteration:
            _remove(folder)


def clean_leftovers(parent: Path) -> None:
    """Remove what a killed write left behind."""
    for leftover in parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Rename first, so that a kill in the middle leaves no folder that looks complete and is not."""
    doomed = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent)) / folder.name
    os.replace(folder, doomed)
    shutil.rmtree(doomed.parent)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state as flat tensors, `optim.<parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"optim.{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; the groups (learning rate, betas) stay those of the config."""
    full = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optim."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    full["state"] = state
    optimizer.load_state_dict(full)


def write_result(model: ImageModel, folder: Path) -> None:
    """What the run trains, as diffusers saves it: the ControlNet of a model that trains one, else the LoRA."""
    if isinstance(model, ControlNetSDModel):
        model.write_result(folder)
    else:
        write_adapter(model, folder)


def write_adapter(model: ImageModel, folder: Path) -> None:
    """The live LoRA as `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = {k: v.detach().cpu() for k, v in get_peft_model_state_dict(model.network, adapter_name="default").items()}
    model.pipe.save_lora_weights(
        folder,
        **{f"{model.denoiser_name}_lora_layers": layers},
        **_collate_lora_metadata({model.denoiser_name: model.network}),
    )


def export_adapter(model: ImageModel, folder: Path) -> Path:
    """Write the adapter, load it back with diffusers and compare every value; replaces `folder` atomically.

    A ControlNet is written and checked in the same way.

    Raises: RuntimeError if what diffusers loads is not what was trained.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    write_result(model, temporary)
    if isinstance(model, ControlNetSDModel):
        model.check_result(temporary)
    else:
        check_adapter(model, temporary)
    _sync(temporary)
    if folder.exists():
        _remove(folder)
    os.replace(temporary, folder)
    return folder


def check_adapter(model: ImageModel, folder: Path) -> None:
    """Load `folder` beside the live adapter, compare all tensors and the scale, and remove it again."""
    live = get_peft_model_state_dict(model.network, adapter_name="default")
    scale = _scale(model, "default")
    with quiet():
        model.pipe.load_lora_weights(folder, adapter_name="reload_check")
    try:
        again = get_peft_model_state_dict(model.network, adapter_name="reload_check")
        same = live.keys() == again.keys() and all(
            # what the file lacks stays on the meta device; a half-precision pipeline rounds what it loads
            not again[k].is_meta and torch.equal(live[k].to(again[k].dtype), again[k])
            for k in live
        )
        if not same or _scale(model, "reload_check") != scale:
            raise RuntimeError(f"{folder}: the adapter that diffusers loads differs from the trained one")
    finally:
        with quiet():
            model.network.delete_adapters("reload_check")
        model.network.set_adapter("default")


def _scale(model: ImageModel, adapter: str) -> float:
    config = model.network.peft_config[adapter]
    return float(config.lora_alpha) / float(config.r)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
