"""`align bench --random SIZE`: the shipped configuration on a model made from sizes alone, here tiny ones."""

import dataclasses
import json

import diffusers
import pytest
from accelerate import init_empty_weights
from rich.console import Console

from align import bench
from align.config import CONFIG_DIR, load_config
from align.errors import UserError
from align.models.random_weights import SIZES

TINY_VAE = {
    "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 128,
}  # fmt: skip
TINY_UNET = {"sample_size": 16, "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 24}
# the true configurations, with everything that makes them large made small
TINY = {
    "sd35-medium": {
        "network": {
            "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16,
            "pooled_projection_dim": 24, "pos_embed_max_size": 16, "dual_attention_layers": (0,),
        },
        "prompt": {"embeds": (4, 32), "pooled": (24,)},
    },
    "sd15": {
        "network": TINY_UNET | {"block_out_channels": (8, 8, 8, 8), "attention_head_dim": 2},
        "prompt": {"embeds": (4, 24)},
    },
    "sdxl": {
        "network": TINY_UNET | {
            "block_out_channels": (8, 8, 16), "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (1, 1, 2),
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
        "prompt": {"embeds": (4, 24), "pooled": (24,)},
    },
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """tiny(size): make that size tiny."""

    def shrink(name):
        true = SIZES[name]
        small = {"network": true.network | TINY[name]["network"], "vae": true.vae | TINY_VAE}
        monkeypatch.setitem(SIZES, name, dataclasses.replace(true, prompt=TINY[name]["prompt"], **small))

    return shrink


def shipped(tmp_path, name, *overrides):
    small = ["model.resolution=128", "model.max_sequence_length=3", "train.prompts_per_iteration=2", "eval.prompts=1"]
    small += ["train.group_size=2", "sampler.num_steps=3", f"output_dir={tmp_path}", *overrides]
    return load_config(CONFIG_DIR / "bench" / f"{name}.yaml", small)


@pytest.mark.parametrize("overrides", [[], ["preset=[sd35_medium,dense_grpo]"]], ids=["flow_grpo", "dense_grpo"])
def test_random_weights_of_a_given_size_run_one_full_iteration(tmp_path, tiny, on_cpu, overrides):
    tiny("sd35-medium")
    out = tmp_path / "bench.json"
    config = shipped(tmp_path, "sd35_medium", *overrides)
    row = bench.run_bench(config, 1, "sd35-medium", out, Console(quiet=True))
    assert json.loads(out.read_text())["rows"] == [row]
    # four images, guidance; three steps, with values two states more, the second of which has one step left
    sampled = 4 * 2 * (3 + (1 + 2 if overrides else 0))
    trained = 4 * 2 * 2 * (1 + 1 + 2 + 1)  # two steps: forward, reference, backward, once more for checkpointing
    assert row["nfe"] == sampled + trained
    assert row["gradient_checkpointing"]
    assert row["precision"] == "bf16"
    assert 0 < row["model_flop_utilisation"] < row["hardware_flop_utilisation"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_unet_of_random_weights_runs_one_full_iteration(tmp_path, tiny, on_cpu, name):
    tiny(name)
    config = shipped(tmp_path, name, "sampler.num_steps=2")
    row = bench.run_bench(config, 1, name, tmp_path / "bench.json", Console(quiet=True))
    assert (row["model"], row["precision"], row["images"], row["resolution"]) == (name, "bf16", 4, 128)
    assert 0 < row["model_flop_utilisation"] <= row["hardware_flop_utilisation"]


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_sizes_have_the_published_numbers_of_parameters(name, parameters):
    size = SIZES[name]
    with init_empty_weights():
        network = getattr(diffusers, size.network_class)(**size.network)
        vae = diffusers.AutoencoderKL(**size.vae)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_an_unknown_size_names_the_known_ones(tmp_path, on_cpu):
    with pytest.raises(UserError, match="--random: no size 'sd4'; one of sd15, sdxl, sd35-medium"):
        bench.run_bench(shipped(tmp_path, "sd35_medium"), 1, "sd4", tmp_path / "bench.json", Console(quiet=True))
