"""`align bench --random SIZE`: the shipped configuration on a model made from sizes alone, here tiny ones."""

import json

import pytest
from rich.console import Console

from align import bench
from align.config import CONFIG_DIR, load_config
from align.errors import UserError

TINY = {
    "transformer": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16,
        "pooled_projection_dim": 24, "pos_embed_max_size": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    },
    "vae": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 128, "scaling_factor": 1.5, "shift_factor": 0.06,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "text_tokens": 4,
}  # fmt: skip


def shipped(tmp_path, *overrides):
    small = ["model.resolution=128", "model.max_sequence_length=3", "train.prompts_per_iteration=2", "eval.prompts=1"]
    small += ["train.group_size=2", "sampler.num_steps=3", f"output_dir={tmp_path}", *overrides]
    return load_config(CONFIG_DIR / "bench" / "sd35_medium.yaml", small)


@pytest.mark.parametrize("overrides", [[], ["preset=[sd35_medium,dense_grpo]"]], ids=["flow_grpo", "dense_grpo"])
def test_random_weights_of_a_given_size_run_one_full_iteration(tmp_path, monkeypatch, on_cpu, overrides):
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    out = tmp_path / "bench.json"
    row = bench.run_bench(shipped(tmp_path, *overrides), 1, "tiny", out, Console(quiet=True))
    assert json.loads(out.read_text())["rows"] == [row]
    # four images, guidance; three steps, with values two states more, the second of which has one step left
    sampled = 4 * 2 * (3 + (1 + 2 if overrides else 0))
    trained = 4 * 2 * 2 * (1 + 1 + 2 + 1)  # two steps: forward, reference, backward, once more for checkpointing
    assert row["nfe"] == sampled + trained
    assert row["gradient_checkpointing"]
    assert row["precision"] == "bf16"
    assert 0 < row["model_flop_utilisation"] < row["hardware_flop_utilisation"]


def test_an_unknown_size_names_the_known_ones(tmp_path, on_cpu):
    with pytest.raises(UserError, match="--random: no size 'sd4'; one of sd35-medium"):
        bench.run_bench(shipped(tmp_path), 1, "sd4", tmp_path / "bench.json", Console(quiet=True))
