"""CLIPScore through open_clip: agreement of image and prompt, differentiable (arXiv 2104.08718)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput
from rewards.open_clip_models import LoadedClip, load_clip, read_config
from rewards.preprocess import preprocess


class CLIPScore(Reward):
    """Cosine of the image and the text embedding, in [-1, 1]; the logit scale is not applied.

    Each image is compared with its own prompt only. Weights come from one of

    - `model` and `pretrained`: an open_clip name and a tag of it, or a local checkpoint file;
    - `model`: a folder in open_clip's own format (open_clip_config.json beside the weights), or `hf-hub:org/name`;
    - `config` and `pretrained`: an own architecture (embed_dim, vision_cfg, text_cfg, as a mapping or a JSON file) and
      a checkpoint file of it, or `random` for an untrained network drawn from `seed`.

    Weights of OpenAI and DFN were trained with QuickGELU: a checkpoint file of them needs a `-quickgelu` model name.
    """

    name = "clip"
    differentiable = True

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        config: str | Mapping[str, Any] | None = None,
        seed: int = 0,
        text_cache: int = 20_000,
    ) -> None:
        """text_cache: how many prompts keep their embedding. Without any argument: ViT-L-14-quickgelu of OpenAI."""
        if model and config is not None:
            raise RewardError("give either model or config, not both")
        if config is None and model is None:
            model, pretrained = "ViT-L-14-quickgelu", pretrained or "openai"
        if config is not None and pretrained is None:
            raise RewardError("config needs pretrained: the path of a checkpoint, or random for an untrained network")
        self.model_name, self.pretrained, self.seed, self.text_cache = model, pretrained, seed, text_cache
        self.config = None if config is None else read_config(config)
        self.clip: LoadedClip | None = None
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the network in `dtype`. Raises RewardError if weights are missing or do not fit."""
        # Building a network draws random numbers; the run's own stream must not notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                clip = load_clip(self.model_name, self.pretrained, self.config, dtype)
            except RewardError as error:
                raise RewardError(f"reward '{self.name}': {error}") from error
        clip.model.to(device).eval().requires_grad_(False)
        self.clip = clip
        self._device = torch.device(device)
        self._dtype = dtype
        self._texts.clear()

    def enable_checkpointing(self) -> None:
        # Only the image tower: prompts are embedded without gradient. A tower that cannot ignores it.
        self._loaded().model.visual.set_grad_checkpointing(True)

    def score(self, batch: RewardBatch) -> RewardOutput:
        return self.output(self.similarity(batch.images, batch.prompts).float())

    def output(self, cosines: Tensor) -> RewardOutput:
        """What the reward makes of cosines (B,) float32."""
        return RewardOutput(cosines)

    def similarity(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (B,) of each image with its own prompt, in float32 or, if so set up, float64."""
        pictures = self.embed_images(images)
        return (pictures * self.embed_texts(prompts)).sum(dim=-1)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Embeddings (B, D) of unit norm of prompts, without gradient."""
        return torch.stack([self._text(prompt) for prompt in prompts])

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of unit norm of images (B, 3, H, W) in [0, 1], in the precision of `similarity`."""
        clip = self._loaded()
        pixels = preprocess(images.to(self._device), **clip.transform)
        return _unit(clip.model.encode_image(pixels.to(self._dtype)))

    def _loaded(self) -> LoadedClip:
        if self.clip is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        return self.clip

    def _text(self, prompt: str) -> Tensor:
        """Embedding (D,) of one prompt, kept for the next time.

        Prompts go through the network one by one: the result then does not depend on which others were new in the same
        batch, and a resumed run gets the same bits.
        """
        if prompt in self._texts:
            self._texts.move_to_end(prompt)
            return self._texts[prompt]
        clip = self._loaded()
        with torch.no_grad():
            text = _unit(clip.model.encode_text(clip.tokenizer([prompt]).to(self._device)))[0]
        self._texts[prompt] = text
        if len(self._texts) > self.text_cache:
            self._texts.popitem(last=False)
        return text


def _unit(features: Tensor) -> Tensor:
    """L2-normalised along the last dimension, at least in float32: half precision makes ties between scores."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
