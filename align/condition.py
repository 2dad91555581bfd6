"""The network D that reads a condition back from an image, and the reward that measures with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.control_data import check_conditions, check_examples, labels_of, load_examples
from align.control_loss import IGNORE, OutputKind
from align.errors import UserError
from align.models.base import ImageModel, quiet
from align.playground.layouts import mean_iou
from align.prompts import Prompt
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, one_line
from rewards.weights import load_pretrained, recompute_layers

if TYPE_CHECKING:
    from align.config import Config

EDGES = "edges"
SHIPPED_NETWORKS = {"playground": Path(__file__).parent / "playground" / "segmenter_weights"}
_TRIED = 8
# A reading one class away is no chance above these shares, of all pixels and of a class's (mean over classes), and if
# both exceed that of the right class so many times.
_SHIFTED, _TIMES = (0.5, 0.25), 2.0


class ConditionNetwork:
    """Images (B, 3, H, W) in [0, 1] to a condition, differentiable and frozen."""

    kind: OutputKind
    classes: int = 0
    """Number of classes of a probabilistic output."""

    def outputs(self, images: Tensor) -> Tensor:
        """Raw outputs (B, C, H, W) float32 at the images' size: logits of the classes, or maps."""
        raise NotImplementedError

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, where the network can."""


class SegmentationNetwork(ConditionNetwork):
    """Any semantic segmentation network that transformers loads, with the mean and standard deviation it was trained on.

    Images keep their size; logits are brought to it bilinearly. The network works in float32: a softmax in half precision
    gave NaN to others, and a difference of two readings is small.
    """

    kind: OutputKind = "probabilistic"

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        """path: folder, hub id or shipped name. Raises: UserError if there is no such network, or a weight is missing."""
        from transformers import AutoModelForSemanticSegmentation
        from transformers.image_processing_base import ImageProcessingMixin

        place = str(SHIPPED_NETWORKS.get(path, path))
        place = str(Path(place).expanduser()) if place.startswith("~") else place
        try:
            with quiet():
                self.model: Any = load_pretrained(AutoModelForSemanticSegmentation, place, "network", torch.float32)
                settings, _ = ImageProcessingMixin.get_image_processor_dict(place)
        except RewardError as problem:
            raise UserError(str(problem)) from problem
        except (OSError, ValueError) as problem:
            raise UserError(f"'{path}' does not say how images are prepared: {one_line(problem)}") from problem
        self.model.to(device)
        self.classes = int(self.model.config.num_labels)
        plain = settings.get("do_normalize", True) is False
        self._mean, self._std = (
            torch.tensor([fallback] * 3 if plain else settings.get(key) or [fallback] * 3, device=device).view(
                1, 3, 1, 1
            )
            for key, fallback in (("image_mean", 0.0), ("image_std", 1.0))
        )
        self._blue_first = bool(settings.get("do_flip_channel_order", False))

    def outputs(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) float32."""
        with torch.autocast(images.device.type, enabled=False):
            pixels = images.float().flip(1) if self._blue_first else images.float()
            logits = self.model((pixels - self._mean) / self._std).logits
        return F.interpolate(logits.float(), images.shape[-2:], mode="bilinear", align_corners=False)

    def enable_checkpointing(self) -> None:
        """Of the layers that transformers can recompute."""
        recompute_layers(self.model)


class EdgeFilter(ConditionNetwork):
    """Strength of edges by Sobel's filter, in [0, 1]: nothing to train, and nothing that an image could mislead."""

    kind: OutputKind = "continuous"

    def outputs(self, images: Tensor) -> Tensor:
        """Maps (B, 1, H, W) float32: gradient of the brightness, 1 for a step between black and white."""
        grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float32) / 4
        slopes = F.conv2d(grey, torch.stack([across, across.T]).unsqueeze(1))
        # the small term keeps the root differentiable where an image is flat
        return ((slopes.square().sum(1, keepdim=True) / 2 + 1e-6).sqrt() - 1e-3).clamp(min=0)


def load_condition_network(path: str, device: torch.device | str = "cpu") -> ConditionNetwork:
    """The network of `consistency.network`. Raises: UserError, one line, if it cannot be loaded."""
    try:
        return EdgeFilter() if path == EDGES else SegmentationNetwork(path, device)
    except UserError as problem:
        raise UserError(f"consistency.network: {problem}") from problem


def condition_network(
    config: Config, model: ImageModel, train_prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]
) -> ConditionNetwork | None:
    """The network that condition_consistency trains against, if any, once the examples are known to fit it.

    Raises: UserError if it cannot be loaded, or if images, conditions or labels of the prompts are missing or do not fit.
    """
    settings = config.consistency
    if config.objective.type != "condition_consistency":
        return None
    found = load_condition_network(str(settings.network), model.device) if settings.grad_scale > 0 else None
    side = config.model.resolution or model.native_resolution
    check_examples(train_prompts, found.classes if found is not None else 0, "prompts.train")
    check_conditions(eval_prompts, "prompts.eval")
    if found is not None:
        check_reading(found, train_prompts[:_TRIED], side, model.device)
    if found is not None and settings.checkpointing:
        model.pipe.vae.enable_gradient_checkpointing()
        found.enable_checkpointing()
    return found


@torch.no_grad()
def check_reading(network: ConditionNetwork, prompts: Sequence[Prompt], side: int, device: Any = "cpu") -> None:
    """Let `network` read the real images of a few prompts.

    Raises: UserError if it cannot read images of this size, or finds what the labels say one class lower or higher, as
    where files count classes from 1 and the network from 0.
    """
    labelled = network.kind == "probabilistic"
    counts, hits = torch.zeros(IGNORE), {shift: torch.zeros(IGNORE) for shift in (0, -1, 1)}
    for prompt in prompts:
        example = load_examples([prompt], side, labelled)
        try:
            outputs = network.outputs(example.images.to(device))
        except (RuntimeError, ValueError) as problem:  # of fixed positions, say
            raise UserError(
                f"consistency.network: it cannot read images of {side} x {side}: {one_line(problem)}; use another network or "
                "model.resolution"
            ) from problem
        if example.labels is not None:
            valid = example.labels != IGNORE
            found, labels = outputs.argmax(1).cpu()[valid], example.labels[valid]
            counts += torch.bincount(labels, minlength=IGNORE)
            for shift, hit in hits.items():
                hit += torch.bincount(labels[found == labels + shift], minlength=IGNORE)
    present = counts > 0
    if present.sum() < 2:
        return
    share = {
        shift: (float(hit.sum() / counts.sum()), float((hit[present] / counts[present]).mean()))
        for shift, hit in hits.items()
    }
    for shift, remedy in ((-1, f"subtract 1 from the files and make 0 {IGNORE}"), (1, "add 1 to the files")):
        if all(
            one > least and one > _TIMES * own for one, own, least in zip(share[shift], share[0], _SHIFTED, strict=True)
        ):
            raise UserError(
                "consistency.network: it and the labels count classes from different numbers: in the first real images it reads "
                f"the class {'before' if shift < 0 else 'after'} the label's on {share[shift][0]:.0%} of the pixels, and "
                f"the label's own on {share[0][0]:.0%}; {remedy}"
            )


class ConditionReward(Reward):
    """Mean IoU, in [0, 1], of the labels that a segmentation network reads from an image and those of its prompt.

    The labels are the file `labels` of the prompt's line, or those of its playground scene. With the network that a run
    trains against this is what was optimised, not whether it is true: watch another measure beside it.
    """

    name = "condition"
    uses_prompt = False

    def __init__(self, network: str = "playground") -> None:
        self.path = network

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the network, in float32 whatever `dtype`."""
        try:
            self.network = SegmentationNetwork(self.path, device)
        except UserError as problem:
            raise RewardError(f"reward '{self.name}': {problem}") from problem

    @torch.no_grad()
    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores (B,) in [0, 1], NaN where a prompt has no labels."""
        scores = torch.full((len(batch),), torch.nan)
        found = self.network.outputs(batch.images).argmax(1).cpu().numpy().astype(np.uint8)
        for i, metadata in enumerate(batch.metadata):
            try:
                wanted = labels_of(metadata, batch.images.shape[-1])
            except UserError as problem:
                raise RewardError(f"reward '{self.name}': {problem}") from problem
            if wanted is not None:
                scores[i] = mean_iou(found[i], wanted, IGNORE)
        return RewardOutput(scores)
