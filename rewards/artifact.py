"""An artifact detector as a reward: is this image free of what no description asks for? (after arXiv 2601.03468)

That paper asks a vision-language model (type `judge`); this detector is a logistic regression on statistics of the texture
and, where they help, on the tokens of a frozen image network. `align fit-artifact` fits it to a few dozen images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from rewards.backbone import Backbone, load_backbone
from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, nearest, one_line
from rewards.preprocess import resize
from rewards.weights import find_file, load_tensors, loading

WEIGHTS_FILE, ABOUT_FILE = "artifact_head.safetensors", "artifact_head.json"
FOLDS = 5
_OUTPUTS = ("log_odds", "probability")
_SCALES, _CELLS, _QUANTILES = 4, 8, (0.1, 0.25, 0.5, 0.75, 0.9)
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_SAME_FEATURES = 0.05  # relative distance that rounding explains


@dataclass
class ArtifactHead:
    """A fitted detector: log p(clean) - log p(artifact) = features . weight + bias."""

    weight: Tensor
    """(F,) float32, of the features as they are, not standardised."""
    bias: float
    side: int
    """Pixels of the shorter side at which images are looked at."""
    backbone: str | None
    """The network whose tokens count, see `rewards.backbone.load_backbone`; None if the texture alone decides."""
    probe: Tensor
    """(F,) features of `probe_image`, by which another network is noticed."""
    about: dict[str, Any] = field(default_factory=dict)
    """Numbers of images, and how the detector does on those that it was not fitted to."""

    def save(self, folder: Path) -> None:
        """Write the head as safetensors and JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight, "bias": torch.tensor([self.bias]), "probe": self.probe}
        save_file({key: value.float().contiguous() for key, value in tensors.items()}, folder / WEIGHTS_FILE)
        about = {"side": self.side, "backbone": self.backbone, **self.about}
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_head(path: str) -> ArtifactHead:
    """The head in the folder (or of the hub id) `path`. Raises RewardError if it is not there or damaged."""
    page = "a folder that `align fit-artifact` wrote"
    file, about_file = (find_file(path, name, page) for name in (WEIGHTS_FILE, ABOUT_FILE))
    tensors = load_tensors(file)
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        side, backbone = int(about.pop("side")), about.pop("backbone")
        weight, bias, probe = (tensors[key] for key in ("weight", "bias", "probe"))
        return ArtifactHead(weight, float(bias[0]), side, backbone, probe, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RewardError(f"{path} holds no artifact detector that can be read: {one_line(error)}") from error


class ArtifactReward(Reward):
    """How surely an image is free of artifacts, by a detector that was fitted to examples; blind to the prompt.

    The score is the log-odds within +-clip, or the probability of "clean"; both are in the components, and 4 p (1 - p) is
    the uncertainty. Differentiable: an image that is beyond the clip on the artifact side keeps its gradient, one that is
    surely clean has none.
    """

    name = "artifact"
    differentiable = True
    uses_prompt = False

    def __init__(self, path: str, output: str = "log_odds", clip: float = 6.0) -> None:
        """path: what `align fit-artifact` wrote; output: log_odds or probability; clip: of the log-odds."""
        if output not in _OUTPUTS:
            raise RewardError(f"output '{output}' must be {' or '.join(_OUTPUTS)}{nearest(str(output), _OUTPUTS)}")
        if not clip > 0:
            raise RewardError(f"clip must be positive, got {clip}")
        self.path, self.output, self.clip = path, output, clip
        self.head: ArtifactHead | None = None
        self.backbone: Backbone | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the head and, if it reads one, its network in `dtype`. Raises RewardError if either does not fit."""
        with loading(self.name):
            head = load_head(self.path)
            self.backbone = None if head.backbone is None else load_backbone(head.backbone, dtype).to(device)
            with torch.no_grad():
                found = features(probe_image(head.side).to(device), head.side, self.backbone)[0].float().cpu()
            if found.shape != head.probe.shape or (found - head.probe).norm() > _SAME_FEATURES * head.probe.norm():
                raise RewardError(f"{self.path} was fitted to other features than {head.backbone or 'the texture'} gives now: "
                                  "fit it again")  # fmt: skip
        self.head = head
        self._weight = head.weight.to(device, torch.promote_types(dtype, torch.float32))

    def enable_checkpointing(self) -> None:
        if self.backbone is not None:
            self.backbone.enable_checkpointing()

    def score(self, batch: RewardBatch) -> RewardOutput:
        odds = self.log_odds(batch.images).float()
        clean = torch.sigmoid(odds)
        scores = clean if self.output == "probability" else _clipped(odds, self.clip)
        unsure = 4 * (clean * (1 - clean)).detach()
        return RewardOutput(scores, {"p_clean": clean, "log_odds": odds}, uncertainty=unsure)

    def log_odds(self, images: Tensor) -> Tensor:
        """log p(clean) - log p(artifact), (B,), of images (B, 3, H, W) in [0, 1]."""
        if self.head is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        found = features(images.to(self._weight.device), self.head.side, self.backbone)
        return found.to(self._weight.dtype) @ self._weight + self.head.bias


def _clipped(odds: Tensor, clip: float) -> Tensor:
    """Within +-clip; below, the gradient passes as if it were not cut, lest a bad image stay as it is."""
    kept = odds.clamp(max=clip)
    return kept + (kept.clamp(min=-clip) - kept).detach()


def features(images: Tensor, side: int, backbone: Backbone | None) -> Tensor:
    """What the head sees, (B, F), of images (B, 3, H, W) in [0, 1] whose shorter side becomes `side` pixels."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    parts = [texture(resize(images, (max(side, round(height * scale)), max(side, round(width * scale)))))]
    if backbone is not None:
        middle, last = backbone.tokens(images)
        parts += [middle.patches.mean(1), middle.patches.std(1, correction=0), last.image]
    return torch.cat(parts, dim=1)


def texture(images: Tensor) -> Tensor:
    """Statistics of local contrast, (B, 80): images (B, 3, H, W), at least 16 pixels high and wide.

    At four scales and along both axes: the log of the mean squared difference of neighbouring pixels in the cells of a
    grid of about 8 x 8, quantiles of it over the cells, and the squares of their distance from a middling value: too
    smooth and too rough are both suspicious.
    """
    levels = torch.tensor(_QUANTILES, dtype=images.dtype, device=images.device)
    found = []
    for scale in range(_SCALES):
        if scale:
            images = F.avg_pool2d(images, 2) if min(images.shape[-2:]) >= 4 else images
        for steps in (images.diff(dim=-1), images.diff(dim=-2)):
            energy = steps.square().mean(dim=1, keepdim=True)
            cells = F.avg_pool2d(energy, max(1, min(energy.shape[-2:]) // _CELLS)).flatten(1)
            found.append(torch.quantile((cells + 1e-5).log(), levels, dim=1).T)
    values = torch.cat(found, dim=1)
    return torch.cat([values, (values + 7).square()], dim=1)


def probe_image(side: int) -> Tensor:
    """(1, 3, side, side) in [0, 1]: always the same waves."""
    axis = torch.linspace(0, 12, side)
    waves = [torch.sin(axis.unsqueeze(1) * (i + 1) + axis * (3 - i)) for i in range(3)]
    return torch.stack(waves).mul(0.4).add(0.5).unsqueeze(0)


def fit_head(
    found: Tensor, clean: Tensor, units: Sequence[int], side: int, backbone: str | None, probe: Tensor, seed: int = 0
) -> ArtifactHead:
    """Fit a detector to four fifths of the images and measure it on the others.

    The strength of the ridge penalty, and whether the network's features are used at all, are those of the lowest log
    loss in a cross-validation within the four fifths.

    Args:
        found: (N, F) `features` of the images, of the texture alone if `backbone` is None.
        clean: (N,) bool, False for an image with artifacts.
        units: N numbers; images of one number (a picture and its damaged copy) are never on both sides of a split.
        probe: (F,) `features` of `probe_image`.
        seed: of the splits.
    """
    values, labels = found.double().cpu(), clean.cpu().double()
    folds = deal(clean.tolist(), units, FOLDS, seed)
    held, kept = folds == 0, folds != 0
    inner = deal(clean[kept].tolist(), [u for u, k in zip(units, kept.tolist(), strict=True) if k], FOLDS, seed + 1)
    plain = texture(probe_image(side)).shape[1]
    best = (float("inf"), plain, _PENALTIES[0])
    for width in (plain,) if backbone is None else (plain, values.shape[1]):
        for penalty in _PENALTIES:
            best = min(best, (_cross_validated(values[kept, :width], labels[kept], inner, penalty), width, penalty))
    loss, width, penalty = best
    weight, bias = logistic_fit(values[kept, :width], labels[kept], penalty)
    odds = values[held, :width] @ weight + bias
    measured = quality(odds, labels[held])
    about = {
        "images": {"clean": int(clean.sum()), "artifact": int((~clean).sum())},
        "held_out": {
            "clean": int(clean[held].sum()),
            "artifact": int((~clean[held]).sum()),
            **measured,
            "accuracy_ci95": interval(measured["accuracy"], int(held.sum())),
        },
        "penalty": penalty,
        "cross_validated_log_loss": loss,
    }
    used = backbone if width > plain else None
    return ArtifactHead(weight.float(), float(bias), side, used, probe[:width].float().cpu(), about)


def deal(clean: Sequence[bool], units: Sequence[int], folds: int, seed: int) -> Tensor:
    """A fold for each image, (N,) int64: clean ones, others and pairs are each spread evenly, units stay whole."""
    kinds: dict[int, set[bool]] = {}
    for label, unit in zip(clean, units, strict=True):
        kinds.setdefault(unit, set()).add(bool(label))
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [sorted(kinds)[i] for i in order]
    place = {unit: i % folds for i, unit in enumerate(sorted(shuffled, key=lambda u: sorted(kinds[u])))}
    return torch.tensor([place[unit] for unit in units])


def logistic_fit(values: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge logistic regression: weight (F,) and bias () float64 for values (N, F) as they are and labels (N,) 0 or 1.

    Both classes count alike, however many images they have; the penalty acts on standardised features.
    """
    mean, std = values.mean(dim=0), values.std(dim=0, correction=0).clamp_min(1e-6)
    inputs = (values - mean) / std
    share = labels.mean()
    balance = torch.where(labels > 0, 0.5 / share, 0.5 / (1 - share))
    parameters = torch.zeros(values.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        odds = inputs @ parameters[1:] + parameters[0]
        loss = F.binary_cross_entropy_with_logits(odds, labels, weight=balance)
        loss = loss + penalty * parameters[1:].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    fitted = parameters.detach()
    weight = fitted[1:] / std
    return weight, fitted[0] - (weight * mean).sum()


def quality(odds: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy at log-odds 0, area under the ROC curve and log loss of log-odds (N,) for labels (N,) 0 or 1."""
    good, bad = odds[labels > 0], odds[labels == 0]
    difference = good.unsqueeze(1) - bad
    return {
        "accuracy": float(((odds > 0) == (labels > 0)).double().mean()),
        "auc": float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean()),
        "log_loss": float(F.binary_cross_entropy_with_logits(odds, labels)),
    }


def interval(share: float, count: int) -> list[float]:
    """The 95 % interval (Wilson) of a share that was seen in `count` independent cases."""
    z = 1.959964
    centre, spread = share + z * z / (2 * count), z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return [(centre + sign * spread) / (1 + z * z / count) for sign in (-1, 1)]


def _cross_validated(values: Tensor, labels: Tensor, folds: Tensor, penalty: float) -> float:
    """Mean log loss over images on which the regression was not fitted."""
    odds = torch.empty_like(labels)
    for fold in range(FOLDS):
        out = folds == fold
        weight, bias = logistic_fit(values[~out], labels[~out], penalty)
        odds[out] = values[out] @ weight + bias
    return quality(odds, labels)["log_loss"]
