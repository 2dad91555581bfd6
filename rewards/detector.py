"""Objects in images and their colours: Mask2Former through transformers, and CLIP as a zero-shot classifier.

transformers is imported inside the functions: it takes seconds, and most runs never need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import RewardError, one_line, to_uint8
from rewards.open_clip_models import LoadedClip, load_clip, read_config
from rewards.preprocess import preprocess
from rewards.weights import loading

DEFAULT_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
DEFAULT_CLIP = {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}

_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY = 0.6  # #999, what is not the object


class Instance(NamedTuple):
    """One detected object."""

    box: tuple[float, float, float, float]
    """(left, top, right, bottom) in pixels, around the mask."""
    confidence: float
    mask: Tensor
    """(H, W) bool."""


class InstanceDetector:
    """A Mask2Former for instance segmentation; loads in `setup`."""

    def __init__(self, source: str) -> None:
        """source: a folder in the format of transformers, or a hub id."""
        self.source = source
        self.names: frozenset[str] = frozenset()

    def setup(self, owner: str, device: torch.device) -> None:
        """Load in float32. Raises: RewardError, with the reward's name `owner`, if a package or the weights are missing."""
        if find_spec("scipy") is None:
            raise RewardError(f"reward '{owner}' needs scipy for its detector: pip install 'flow-align[geneval]'")
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        path = Path(self.source).expanduser()
        source = str(path) if path.is_dir() else self.source
        with loading(owner):
            try:
                self.processor = AutoImageProcessor.from_pretrained(source)
                network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(source, dtype=torch.float32)
            except Exception as error:
                raise RewardError(
                    f"the detector {self.source} cannot be loaded: download https://huggingface.co/{DEFAULT_DETECTOR} "
                    f"into a folder and set detector to its path ({one_line(error)})"
                ) from error
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.labels = {int(number): str(name) for number, name in network.config.id2label.items()}
        self.names = frozenset(self.labels.values())

    @torch.no_grad()
    def __call__(self, images: Tensor, threshold: float) -> list[dict[str, list[Instance]]]:
        """Class -> instances above `threshold`, for each of (B, 3, H, W) images in [0, 1]."""
        inputs = self.processor(images=list(to_uint8(images).cpu()), return_tensors="pt")
        outputs = self.network(pixel_values=inputs["pixel_values"].to(self.device))
        results = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=threshold,
            target_sizes=[tuple(images.shape[-2:])] * len(images),
            return_binary_maps=True,
        )
        return [self._instances(result) for result in results]

    def _instances(self, result: Mapping[str, Any]) -> dict[str, list[Instance]]:
        found: dict[str, list[Instance]] = {}
        segments = result["segments_info"]
        masks = result["segmentation"] if segments else ()
        for segment, values in zip(segments, masks, strict=True):
            mask = values > 0
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            box = (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)
            name = self.labels[int(segment["label_id"])]
            found.setdefault(name, []).append(Instance(box, float(segment["score"]), mask))
        return found


class ColorNamer:
    """CLIP's choice among colours for objects cut out of an image; loads in `setup`."""

    def __init__(self, colors: Sequence[str], clip: Mapping[str, Any] | None) -> None:
        """clip: model and pretrained, or config and pretrained, as of the reward clip. Raises: RewardError."""
        options = dict(DEFAULT_CLIP if clip is None else clip)
        unknown = [key for key in options if key not in ("model", "pretrained", "config")]
        if unknown:
            raise RewardError(f"clip takes model, pretrained and config, not {', '.join(unknown)}")
        self.colors = tuple(colors)
        self.options = options
        self.config = read_config(options["config"]) if options.get("config") is not None else None
        self.clip: LoadedClip | None = None
        self._texts: dict[str, Tensor] = {}

    def setup(self, owner: str, device: torch.device) -> None:
        """Load in float32. Raises: RewardError, with the reward's name `owner`, if the weights are missing."""
        with loading(owner):
            self.clip = load_clip(self.options.get("model"), self.options.get("pretrained"), self.config, torch.float32)
        self.clip.model.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self._texts.clear()

    @torch.no_grad()
    def __call__(self, image: Tensor, instances: Sequence[Instance], name: str) -> list[str]:
        """The colour of each object of class `name` in an image (3, H, W) in [0, 1]."""
        assert self.clip is not None
        crops = []
        for instance in instances:
            left, top, right, bottom = (int(edge) for edge in instance.box)
            cut = torch.where(instance.mask.to(image.device), image.float(), _GREY)[:, top:bottom, left:right]
            crops.append(preprocess(cut[None].to(self.device), **self.clip.transform))
        features = F.normalize(self.clip.model.encode_image(torch.cat(crops)), dim=-1)
        return [self.colors[i] for i in (features @ self._text(name).T).argmax(dim=-1).tolist()]

    def _text(self, name: str) -> Tensor:
        """(colours, D): the mean of a colour's templates, of unit norm."""
        assert self.clip is not None
        if name not in self._texts:
            texts = [template.format(color=color, name=name) for color in self.colors for template in _TEMPLATES]
            tokens = self.clip.tokenizer(texts).to(self.device)
            features = F.normalize(self.clip.model.encode_text(tokens), dim=-1)
            means = features.reshape(len(self.colors), len(_TEMPLATES), -1).mean(dim=1)
            self._texts[name] = F.normalize(means, dim=-1)
        return self._texts[name]
