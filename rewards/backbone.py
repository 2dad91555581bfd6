"""Frozen image networks whose tokens a small trained head reads: CLIP towers of open_clip, and transformers' DINOv2 or CLIP.

transformers is imported inside the functions: it takes seconds, and most runs never need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.base import RewardError, nearest
from rewards.clip import CLIPScore
from rewards.open_clip_models import LoadedClip, load_clip
from rewards.preprocess import preprocess
from rewards.registry import RewardConfig, build_reward, known_rewards
from rewards.weights import CLIP_MEAN, CLIP_STD, load_pretrained, model_type, recompute_layers

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Model type in config.json -> class of transformers, mean and std of its pixels.
_FAMILIES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD),
    "clip": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD),
    "clip_vision_model": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD),
}


class Tokens(NamedTuple):
    """What a layer makes of B images, in float32 or, if the network is so loaded, float64."""

    image: Tensor
    """(B, D) the class token."""
    patches: Tensor
    """(B, P, D)"""


class Backbone(ABC):
    """A frozen vision transformer in evaluation mode; images are resized and cropped as its own preprocessing does."""

    def __init__(self, network: Any, transform: dict[str, Any], dtype: torch.dtype) -> None:
        """network: module; transform: arguments of `rewards.preprocess.preprocess`; dtype: of its weights."""
        self.network = network.eval().requires_grad_(False)
        self.transform, self.dtype = transform, dtype

    def to(self, device: torch.device) -> Backbone:
        self.network.to(device)
        self.device = torch.device(device)
        return self

    def tokens(self, images: Tensor) -> tuple[Tokens, Tokens]:
        """Tokens of the middle layer and of the last one, of images (B, 3, H, W) in [0, 1]."""
        pixels = preprocess(images.to(self.device), **self.transform).to(self.dtype)
        middle, last = self._layers(pixels)
        return _upcast(middle), _upcast(last)

    @abstractmethod
    def _layers(self, pixels: Tensor) -> tuple[Tokens, Tokens]:
        """Middle and last layer's tokens of normalised pixels (B, 3, *size)."""

    @abstractmethod
    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""


class _OpenClip(Backbone):
    def _layers(self, pixels: Tensor) -> tuple[Tokens, Tokens]:
        depth = len(self.network.transformer.resblocks)
        found = self.network.forward_intermediates(
            pixels, indices=[(depth - 1) // 2, depth - 1], normalize_intermediates=False, intermediates_only=True,
            output_fmt="NLC", output_extra_tokens=True,
        )  # fmt: skip
        layers = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
        (first, patches), (last, last_patches) = layers
        norm = self.network.ln_post  # the last layer as the network's own pooling reads it
        return Tokens(first[:, 0], patches), Tokens(norm(last[:, 0]), norm(last_patches))

    def enable_checkpointing(self) -> None:
        self.network.set_grad_checkpointing(True)


class _Transformers(Backbone):
    def _layers(self, pixels: Tensor) -> tuple[Tokens, Tokens]:
        states = self.network(pixel_values=pixels, output_hidden_states=True)
        skipped = 1 + getattr(self.network.config, "num_register_tokens", 0)
        middle = states.hidden_states[len(states.hidden_states) // 2]
        last = states.last_hidden_state
        return Tokens(middle[:, 0], middle[:, skipped:]), Tokens(last[:, 0], last[:, skipped:])

    def enable_checkpointing(self) -> None:
        recompute_layers(self.network)


def load_backbone(given: str, dtype: torch.dtype) -> Backbone:
    """The image network that `given` names, on the CPU.

    given: a folder in transformers' format or a hub id (DINOv2, CLIP), a folder in open_clip's format, `hf-hub:org/name`,
    or the name of a registered reward on open_clip, such as the playground's `proxy`. Raises RewardError, one line.
    """
    folder = Path(given).expanduser()
    if given in known_rewards():
        reward = build_reward(given, RewardConfig(type=given))
        if not isinstance(reward, CLIPScore):
            raise RewardError(f"backbone '{given}' is a reward without an image network of open_clip")
        reward.setup(torch.device("cpu"), dtype)
        assert reward.clip is not None
        return _open_clip(given, reward.clip, dtype)
    if given.startswith("hf-hub:") or (folder / "open_clip_config.json").is_file():
        return _open_clip(given, load_clip(given, None, None, dtype), dtype)
    return _transformers(given, dtype)


def _open_clip(given: str, clip: LoadedClip, dtype: torch.dtype) -> Backbone:
    visual = clip.model.visual
    if not hasattr(visual, "forward_intermediates") or not hasattr(visual, "ln_post"):
        raise RewardError(f"backbone '{given}' has no vision transformer of open_clip ({type(visual).__name__})")
    return _OpenClip(visual, clip.transform, dtype)


def _transformers(given: str, dtype: torch.dtype) -> Backbone:
    import transformers

    kind = model_type(given, "backbone")
    if kind not in _FAMILIES:
        raise RewardError(
            f"backbone {given} is of type '{kind}'{nearest(kind, _FAMILIES)}; known: {', '.join(_FAMILIES)}"
        )
    name, mean, std = _FAMILIES[kind]
    network = load_pretrained(getattr(transformers, name), given, "backbone", dtype)
    side = int(network.config.image_size)
    return _Transformers(network, {"size": (side, side), "mean": mean, "std": std}, dtype)


def _upcast(tokens: Tokens) -> Tokens:
    return Tokens(*(part.to(torch.promote_types(part.dtype, torch.float32)) for part in tokens))
