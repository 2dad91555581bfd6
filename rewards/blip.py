"""BLIP networks of transformers with weights in the names of the original code (arXiv 2201.12086).

The two implementations compute the same; only the names of the image encoder differ, and two of transformers' defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rewards.base import RewardError, one_line

HEAD_WIDTH = 64
"""Of every attention head: 16 heads of 1024 channels in ViT-L, 12 of 768 in BERT base. The files do not tell."""

_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def load_blip(tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """BlipVisionModel and BlipTextModel, float32, frozen, from a checkpoint with `blip.visual_encoder.*` and `.text_encoder.*`.

    The architecture is read off the shapes. Raises RewardError if a weight is missing or has no place.
    """
    from transformers import BlipTextModel, BlipVisionModel

    vision = {_vision_name(key.removeprefix(_VISION)): value for key, value in _under(tensors, _VISION).items()}
    text = {key.removeprefix(_TEXT): value for key, value in _under(tensors, _TEXT).items()}
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a buffer that older files hold
    try:
        networks = BlipVisionModel(_vision_config(vision)), BlipTextModel(_text_config(text), add_pooling_layer=False)
    except KeyError as error:
        raise RewardError(f"the weights are not of a BLIP network: there is no {error.args[0]}") from error
    for network, weights in zip(networks, (vision, text), strict=True):
        _fill(network, weights)
    return networks


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(prefix)}


def _vision_name(name: str) -> str:
    """transformers' name of a weight of the original image encoder; an unknown name stays as it is."""
    for pattern, replacement in _VISION_NAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _vision_config(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipVisionConfig

    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(weights, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # transformers' default is 1e-5
    )


def _text_config(weights: Mapping[str, Tensor]) -> Any:
    from transformers import BlipTextConfig

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(weights, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,  # transformers' default is 8
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # only says that there are cross-attention layers; attention is causal if forward is told so
    )


def _layers(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for key in weights if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _fill(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        odd = network.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    except RuntimeError as error:  # a shape differs
        raise RewardError(f"the weights do not fit a BLIP network: {one_line(error)}") from error
    if odd.missing_keys or odd.unexpected_keys:
        names = ", ".join((odd.missing_keys + odd.unexpected_keys)[:3])
        raise RewardError(f"the weights are not of a BLIP network: missing or unknown {names}")
    network.eval().requires_grad_(False)
