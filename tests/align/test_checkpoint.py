"""What is written comes back bit for bit, and an adapter that would not is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align.checkpoint import (
    check_adapter,
    export_adapter,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    write_adapter,
)
from align.models.base import ImageModel, LoraSettings, ModelConfig, load_model

NAME = "pytorch_lora_weights.safetensors"
PROMPTS = ["a red circle", "a cat"]


@pytest.fixture
def model(sd35) -> ImageModel:
    """A tiny model whose adapter is far from zero, with alpha three times the rank."""
    model = base_model(sd35)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.add_lora(0):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.finish_setup()
    return model


def base_model(folder: Path) -> ImageModel:
    config = ModelConfig(path=str(folder), max_sequence_length=8, lora=LoraSettings(rank=2, alpha=6))
    model = load_model(config)
    model.cache_prompts(PROMPTS)
    return model


def velocity(model: ImageModel) -> torch.Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.velocity(x, torch.tensor([0.9, 0.3]), model.conditioning(PROMPTS))


def test_optimizer_round_trip(tmp_path):
    """Restored from a file into a fresh optimiser, the next step is the same bit for bit."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator), torch.randn(2)]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(4)]
    first = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = torch.optim.AdamW(first, lr=0.1)

    def step(target, parameters, values):
        # the third parameter never gets a gradient, so it has no state
        for parameter, gradient in list(zip(parameters, values, strict=True))[:2]:
            parameter.grad = gradient.clone()
        target.step()

    for values in gradients[:3]:
        step(optimizer, first, values)
    save_file(optimizer_tensors(optimizer), tmp_path / "state.safetensors")
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    fresh = torch.optim.AdamW(second, lr=0.1)
    restore_optimizer(fresh, load_file(tmp_path / "state.safetensors"))
    for target, parameters in ((optimizer, first), (fresh, second)):
        step(target, parameters, gradients[3])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    again = optimizer_tensors(fresh)
    assert again.keys() == optimizer_tensors(optimizer).keys()
    assert all(torch.equal(v, again[k]) for k, v in optimizer_tensors(optimizer).items())


def test_the_learning_rate_is_that_of_the_config_after_a_restore():
    parameter = torch.nn.Parameter(torch.ones(2))
    old, new = torch.optim.AdamW([parameter], lr=0.1), torch.optim.AdamW([parameter], lr=0.2)
    parameter.grad = torch.ones(2)
    old.step()
    restore_optimizer(new, optimizer_tensors(old))
    assert new.param_groups[0]["lr"] == 0.2


def test_export_keeps_a_scale_other_than_one(model, sd35, tmp_path):
    """alpha / rank is 3 here; a reader that ignored it would apply a third of the update."""
    export_adapter(model, tmp_path / "adapter")
    other = base_model(sd35)
    other.finish_setup()
    base = velocity(other)
    other.load_adapter(tmp_path / "adapter")
    assert (velocity(model) - base).abs().max() > 1e-2
    torch.testing.assert_close(velocity(other), velocity(model), rtol=0, atol=1e-6)


def test_export_replaces_and_leaves_nothing_behind(model, tmp_path):
    (tmp_path / ".tmp-killed").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / NAME).write_bytes(b"old")
    before = velocity(model)
    assert export_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert load_file(tmp_path / "adapter" / NAME)
    assert list(model.network.peft_config) == ["default"]
    assert torch.equal(velocity(model), before)


@pytest.mark.parametrize("what", ["value", "missing", "alpha"])
def test_a_reload_that_differs_is_noticed(model, tmp_path, what):
    """One value off by the smallest step, one tensor gone, or another scale."""
    write_adapter(model, tmp_path)
    check_adapter(model, tmp_path)
    with safe_open(tmp_path / NAME, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / NAME)
    key = min(tensors)
    if what == "value":
        tensors[key].view(-1)[0] = torch.nextafter(tensors[key].view(-1)[0], torch.tensor(10.0))
    elif what == "missing":
        tensors.pop(key)
    else:
        (name,) = (k for k, v in metadata.items() if "lora_alpha" in v)
        metadata[name] = json.dumps({k: 5 if "lora_alpha" in k else v for k, v in json.loads(metadata[name]).items()})
    save_file(tensors, tmp_path / NAME, metadata=metadata)
    before = velocity(model)
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        check_adapter(model, tmp_path)
    assert list(model.network.peft_config) == ["default"]
    assert torch.equal(velocity(model), before)


def test_checkpoints_are_kept_replaced_and_cleaned(model, tmp_path):
    for iteration in (1, 2, 3, 3):
        save_checkpoint(tmp_path, iteration, {"a": torch.full((2,), float(iteration))}, {}, model, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["iteration-000002", "iteration-000003"]
    written = sorted(p.name for p in (folder / "iteration-000003").rglob("*") if p.is_file())
    assert written == [NAME, "state.json", "state.safetensors"]
    assert load_file(folder / "iteration-000003" / "state.safetensors")["a"].tolist() == [3.0, 3.0]
