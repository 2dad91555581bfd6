"""What a dry run promises for UNets: exact parameter counts, and activations close to what autograd keeps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from align.config import Config, TrainConfig
from align.geometry import memory_estimate
from align.models.base import LoraSettings, ModelConfig, load_model
from samplers.config import SamplerConfig

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny_unet.py"))
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_promised_parameter_counts_are_those_of_the_loaded_model(tmp_path, family):
    config = ModelConfig(path=str(TINY[f"{family}_pipeline"](tmp_path)), lora=LoraSettings(rank=2, alpha=2))
    promised = memory_estimate(Config(model=config))
    model = load_model(config)
    assert promised["denoiser_parameters"] == sum(p.numel() for p in model.network.parameters())
    assert promised["vae_parameters"] == sum(p.numel() for p in model.pipe.vae.parameters())
    assert promised["trainable_parameters"] == sum(p.numel() for p in model.add_lora(seed=0))


# wide enough that what grows with the channels is nearly everything, as at the true sizes
WIDE = {"block_out_channels": (64, 128, 192), "attention_head_dim": 4, "norm_num_groups": 16, "sample_size": 32}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_promised_activations_are_near_what_autograd_keeps(tmp_path, checkpointing):
    lora = LoraSettings(rank=2, alpha=2)
    path = str(TINY["sd_pipeline"](tmp_path, **WIDE))
    model = ModelConfig(path=path, lora=lora, gradient_checkpointing=checkpointing)
    rooms = {"train": TrainConfig(micro_batch=1), "sampler": SamplerConfig(guidance_scale=3.0)}
    promised = memory_estimate(Config(model=model, **rooms))["activations_gib"] * 2**30

    network = TINY["unet"](**WIDE).requires_grad_(False)
    network.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    if checkpointing:
        network.enable_gradient_checkpointing()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}
    held = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        network(torch.randn(2, 4, 32, 32), 500, encoder_hidden_states=torch.randn(2, 77, 16))
    found = sum(kept.values())
    if checkpointing:  # the promise adds what is recomputed of the largest block
        assert 0.5 * promised < found < promised
    else:
        assert found == pytest.approx(promised, rel=0.2)
