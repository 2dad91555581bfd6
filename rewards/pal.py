"""Preferences of many users as a mixture of a few prototypes (PAL, arXiv 2406.08469), on frozen CLIP features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, one_line
from rewards.clip import CLIPScore
from rewards.weights import find_file, load_tensors, loading

WEIGHTS_FILE = "pal.safetensors"
LARGEST_SCALE = 100.0


def distance_scores(outputs: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    """PAL-A: minus the distance of f(x) (B, D) from each user's ideal point, (B,); 0 is the most there is.

    prototypes: (K, D), f(p_k); weights: (B, K), of each user, adding up to 1.
    """
    return -(outputs - weights @ prototypes).norm(dim=-1)


def angle_scores(outputs: Tensor, points: Tensor, weights: Tensor, log_scale: Tensor) -> Tensor:
    """PAL-B: scaled cosine of f(x) (B, D) and the ideal point of each user for the prompt, (B,).

    points: (B, K, D), g_k(prompt); weights: (B, K); log_scale: scalar, whose exponential counts up to 100.
    """
    ideal = (weights.unsqueeze(-1) * points).sum(dim=1)
    return F.cosine_similarity(outputs, ideal, dim=-1) * log_scale.exp().clamp_max(LARGEST_SCALE)


class PALReward(Reward):
    """How much an image would please the user whom the metadata names by `user_weights`, K numbers adding up to 1.

    Without `user_weights` it is the user between all prototypes. The uncertainty is the spread between the prototypes:
    the std of the scores that users of a single prototype would give. Weights from a safetensors file with

    - `f.0.weight`, `f.0.bias`, `f.2.weight`, `f.2.bias`: Linear-GELU-Linear on the image's embedding, or on image and
      text side by side if it is twice as wide;
    - `prototypes` (K, width of f's input), PAL-A; or `logit_scale` and `g.K.0.weight` and so on for each prototype, with
      the text's embedding as input, PAL-B.
    """

    name = "pal"
    differentiable = True

    def __init__(
        self, path: str, clip: Mapping[str, Any] | None = None, user_weights: Sequence[float] | None = None
    ) -> None:
        """path: the file, or a folder with pal.safetensors; clip: arguments of the reward clip (default: OpenAI's ViT-L-14);
        user_weights: of prompts that name no user.
        """
        self.path, self.user_weights = path, None if user_weights is None else [float(x) for x in user_weights]
        self.clip = CLIPScore(**dict(clip or {}))
        self.networks: nn.ModuleDict | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load CLIP in `dtype` and the rest in float32. Raises RewardError if a file is missing or does not fit."""
        self.clip.name = self.name
        self.clip.setup(device, dtype)
        with loading(self.name):
            file = find_file(self.path, WEIGHTS_FILE, "where the preferences were fitted")
            tensors = load_tensors(file)
            width = self.clip.embed_texts(["a"]).shape[1]
            try:
                self._build(tensors, width)
            except (KeyError, RuntimeError) as error:
                raise RewardError(f"{file} holds no PAL model of {width} CLIP features: {one_line(error)}") from error
            if self.user_weights is not None and self._mixtures([{"user_weights": self.user_weights}]).isnan().any():
                raise RewardError(f"user_weights must be {self.prototypes} numbers of 0 or more that add up to 1")
        assert self.networks is not None
        self._precision = torch.promote_types(dtype, torch.float32)
        self.networks.to(device, self._precision).eval().requires_grad_(False)
        self._device = torch.device(device)

    def enable_checkpointing(self) -> None:
        self.clip.enable_checkpointing()

    def score(self, batch: RewardBatch) -> RewardOutput:
        if self.networks is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        weights = self._mixtures(batch.metadata).to(self._device, self._precision)
        pure = torch.eye(self.prototypes, device=self._device, dtype=self._precision)
        score_of = self._scorer(batch)
        each = torch.stack([score_of(row.expand(len(batch), -1)) for row in pure], dim=1)
        parts = {f"prototype_{k}": each[:, k].float() for k in range(self.prototypes)}
        spread = each.detach().std(dim=1, correction=0).float()
        return RewardOutput(score_of(weights).float(), parts, uncertainty=spread)

    def _scorer(self, batch: RewardBatch) -> Any:
        """Scores (B,) of the batch as a function of weights (B, K)."""
        networks = self.networks
        assert networks is not None
        image, text = self.clip.embed_images(batch.images), self.clip.embed_texts(batch.prompts)
        outputs = networks["f"](torch.cat([image, text], dim=-1) if self._joint else image)
        if self._points is not None:
            ideals = networks["f"](self._points.to(outputs))
            return lambda weights: distance_scores(outputs, ideals, weights)
        points = torch.stack([networks[f"g{k}"](text) for k in range(self.prototypes)], dim=1)
        return lambda weights: angle_scores(outputs, points, weights, self._log_scale.to(outputs))

    def _build(self, tensors: Mapping[str, Tensor], width: int) -> None:
        """Networks and constants from the file's tensors. Raises: KeyError, RuntimeError, RewardError."""
        first = tensors["f.0.weight"]
        if first.shape[1] not in (width, 2 * width):
            raise RewardError(f"f takes {first.shape[1]} features, CLIP gives {width}")
        self._joint = first.shape[1] == 2 * width
        networks = {"f": _mlp(tensors, "f.")}
        self._points = tensors.get("prototypes")
        if self._points is not None:
            if self._points.ndim != 2 or self._points.shape[1] != first.shape[1]:
                raise RewardError(f"prototypes must be of shape (K, {first.shape[1]}), got {tuple(self._points.shape)}")
            self.prototypes = len(self._points)
        else:
            self._log_scale = tensors["logit_scale"]
            numbers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("g.")})
            if not numbers or numbers != list(range(len(numbers))):
                raise RewardError(f"there must be networks g.0, g.1, ... for the prototypes, found {numbers}")
            networks |= {f"g{k}": _mlp(tensors, f"g.{k}.") for k in numbers}
            self.prototypes = len(numbers)
        self.networks = nn.ModuleDict(networks)

    def _mixtures(self, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """(B, K): of each sample's user; NaN for weights that cannot be those of a user."""
        rows = []
        for entry in metadata:
            given = entry.get("user_weights", self.user_weights)
            if given is None:
                rows.append([1 / self.prototypes] * self.prototypes)
            elif _mixture(given, self.prototypes):
                rows.append([float(x) for x in given])
            else:
                rows.append([float("nan")] * self.prototypes)
        return torch.tensor(rows)


def _mixture(given: Any, count: int) -> bool:
    """Whether `given` is a list of `count` numbers of 0 or more that add up to 1."""
    if not isinstance(given, list | tuple) or len(given) != count:
        return False
    numbers = [x for x in given if isinstance(x, int | float) and x >= 0]
    return len(numbers) == count and abs(sum(numbers) - 1) < 1e-3


def _mlp(tensors: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    """Linear-GELU-Linear of the tensors `prefix`0.weight and so on. Raises: KeyError, RuntimeError if they do not fit."""
    first, second = tensors[f"{prefix}0.weight"], tensors[f"{prefix}2.weight"]
    network = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0]), nn.GELU(), nn.Linear(second.shape[1], second.shape[0])
    )
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    network.load_state_dict(state)
    return network
