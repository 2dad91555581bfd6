"""Reward models of their published sizes with random weights, written in the formats in which they are published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards import RewardConfig

CLIP_L: dict[str, Any] = {
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    },
    "projection_dim": 768,
}  # fmt: skip
CLIP_H: dict[str, Any] = {
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
    },
    "projection_dim": 1024,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384,
    "patch_size": 14,
}  # fmt: skip
BLIP_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224,
    "patch_size": 16,
}  # fmt: skip
BLIP_TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512, "is_decoder": True,
}  # fmt: skip
# transformers' names of BLIP's image encoder -> the original ones
BLIP_NAMES = (
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)


def clip(model: str) -> Callable[[Path], RewardConfig]:
    """CLIPScore with the open_clip network of this name."""

    def build(folder: Path) -> RewardConfig:
        import open_clip

        config = open_clip.get_model_config(model)
        return RewardConfig("clip", args={"config": config, "pretrained": "random"})

    return build


def pickscore(folder: Path) -> RewardConfig:
    from transformers import CLIPConfig, CLIPModel

    CLIPModel(CLIPConfig(**CLIP_H)).half().save_pretrained(folder)
    tokenizer(folder)
    return RewardConfig("pickscore", args={"path": str(folder), "processor": str(folder)})


def hps(folder: Path) -> RewardConfig:
    import open_clip

    torch.save(open_clip.create_model("ViT-H-14").half().state_dict(), folder / "HPS_v2.1_compressed.pt")
    return RewardConfig("hps", args={"path": str(folder)})


def imagereward(folder: Path) -> RewardConfig:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(BlipVisionConfig(**BLIP_VISION)).half().state_dict()
    text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False).half().state_dict()
    tensors = {f"blip.visual_encoder.{_original(name)}": value for name, value in vision.items()}
    tensors |= {f"blip.text_encoder.{name}": value for name, value in text.items()}
    torch.save(tensors | head("mlp.layers.", (0, 2, 4, 6, 7), 768), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", *map(str, range(10))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return RewardConfig("imagereward", args={"path": str(folder), "tokenizer": str(folder)})


def aesthetic(folder: Path) -> RewardConfig:
    from transformers import CLIPConfig, CLIPModel

    CLIPModel(CLIPConfig(**CLIP_L)).half().save_pretrained(folder)
    file = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(head("layers.", (0, 2, 4, 6, 7), 768), file)
    return RewardConfig("aesthetic", args={"path": str(file), "backbone": str(folder)})


def aesthetic_v25(folder: Path) -> RewardConfig:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).half().save_pretrained(folder)
    file = folder / "aesthetic_predictor_v2_5.pth"
    torch.save(head("scoring_head.", (0, 2, 4, 6, 8), 1152), file)
    return RewardConfig("aesthetic_v25", args={"path": str(file), "backbone": str(folder)})


def plain(kind: str) -> Callable[[Path], RewardConfig]:
    """A reward that needs no file."""
    return lambda folder: RewardConfig(kind)


def head(prefix: str, indices: tuple[int, ...], width: int) -> dict[str, Tensor]:
    """The linear layers of a published head, whose widths are the same for all."""
    widths = (width, 1024, 128, 64, 16, 1)
    tensors = {}
    for index, inputs, outputs in zip(indices, widths[:-1], widths[1:], strict=True):
        layer = nn.Linear(inputs, outputs)
        tensors |= {f"{prefix}{index}.weight": layer.weight.detach(), f"{prefix}{index}.bias": layer.bias.detach()}
    return tensors


def tokenizer(folder: Path) -> None:
    """CLIP's own vocabulary, which open_clip brings along, in the files of transformers."""
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in own.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _original(name: str) -> str:
    for pattern, replacement in BLIP_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


# name -> how its weights are made, and the pixels of an image it is given
MODELS: dict[str, tuple[Callable[[Path], RewardConfig], int]] = {
    "jpeg": (plain("jpeg"), 512),
    "verifier": (plain("verifier"), 64),
    "proxy": (plain("proxy"), 64),
    "clip ViT-B-32": (clip("ViT-B-32"), 512),
    "clip ViT-L-14": (clip("ViT-L-14"), 512),
    "clip ViT-H-14": (clip("ViT-H-14"), 512),
    "pickscore": (pickscore, 512),
    "hps": (hps, 512),
    "imagereward": (imagereward, 512),
    "aesthetic": (aesthetic, 512),
    "aesthetic_v25": (aesthetic_v25, 512),
}
