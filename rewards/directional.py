"""A CLIP-type reward asked along a corrected direction: D2-Align (arXiv 2512.24146), differentiable.

A preference model likes some looks whatever the prompt. A single vector b in its text space is found that raises the
score of the base model's images most (`fit_direction`; the generator stays as it is), and the score is then taken with
the text moved along it,

    e_+ = unit(e + b),  e_- = unit(e - b),  g = e_- + omega (e_+ - e_-),  R = <e_image, g>,

so that those looks are in every prompt already and no longer what tells images apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput
from rewards.clip import CLIPScore
from rewards.registry import RewardConfig, build_reward

_PROBES = ["a photo", "a red circle left of two blue stars", "an oil painting of a city at night"]
_SAME = 0.99  # cosine with the stored probes; bfloat16 costs about .001, other weights far more


class DirectionalReward(Reward):
    """Score of `base` with its text moved along a fixed direction; in units of `base`, larger by up to |g|.

    The direction is read from a file that `align fit-direction` wrote, and belongs to the base reward that it was found
    for: with other weights it points nowhere, so it is refused.
    """

    name = "d2align"
    differentiable = True

    def __init__(self, base: Mapping[str, Any], direction: str, omega: float = 1.5, renorm: bool = False) -> None:
        """base: {type, args} of a reward of CLIP type (clip, pickscore, hps, proxy); direction: the file.

        omega: 1.5 was best (2512.24146); 1 is e_+, .5 the plain text, of a smaller norm. renorm: bring g to norm 1 (ours).
        """
        if isinstance(omega, bool) or not isinstance(omega, int | float):
            raise RewardError(f"omega must be a number, got {omega!r}")
        self.base = clip_type(base)
        self.path, self.omega, self.renorm = direction, float(omega), renorm
        self.max_batch = self.base.max_batch
        self.direction: Tensor | None = None

    def setup(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set up the base reward and read the direction. Raises RewardError if it is missing or of another reward."""
        self.base.name = f"{self.name}/base"  # so that its errors name it
        self.base.setup(device, dtype)
        self.direction = load_direction(self.path, self.base).to(device)

    def enable_checkpointing(self) -> None:
        self.base.enable_checkpointing()

    def score(self, batch: RewardBatch) -> RewardOutput:
        if self.direction is None:
            raise RewardError(f"reward '{self.name}' was asked for scores before setup(device, dtype)")
        texts, pictures = self.base.embed_texts(batch.prompts), self.base.embed_images(batch.images)
        guided = guided_text(texts, self.direction.to(texts.dtype), self.omega, self.renorm)
        plain = self.base.output((pictures * texts).sum(-1).float()).scores
        found = self.base.output((pictures * guided).sum(-1).float())
        return RewardOutput(found.scores, components={**found.components, "unguided": plain.detach()})


def clip_type(entry: Mapping[str, Any]) -> CLIPScore:
    """The reward of {type, args}, not set up. Raises RewardError unless it compares an image and a text embedding."""
    unknown = [key for key in entry if key not in ("type", "args")] if isinstance(entry, Mapping) else ["base"]
    if unknown:
        raise RewardError("base must be a reward, as in base: {type: clip, args: {...}}")
    reward = build_reward("base", RewardConfig(type=entry.get("type", ""), args=dict(entry.get("args") or {})))
    if not isinstance(reward, CLIPScore):
        raise RewardError(f"base: '{entry['type']}' is not of CLIP type; use clip, pickscore, hps or proxy")
    return reward


def guided_text(texts: Tensor, direction: Tensor, omega: float, renorm: bool = False) -> Tensor:
    """g (B, D) of text embeddings (B, D) and b (D,): e_- + omega (e_+ - e_-) with e_+- = unit(e +- b) (2512.24146).

    b = 0 gives unit(e) for every omega; -b with omega is b with 1 - omega. Its norm grows with omega unless `renorm`.
    """
    plus, minus = F.normalize(texts + direction, dim=-1), F.normalize(texts - direction, dim=-1)
    guided = minus + omega * (plus - minus)
    return F.normalize(guided, dim=-1) if renorm else guided


def fit_direction(
    pictures: Tensor,
    texts: Tensor,
    *,
    omega: float = 1.5,
    renorm: bool = False,
    norm: float = math.inf,
    steps: int = 2000,
    lr: float = 1e-3,
) -> Tensor:
    """b (D,), |b| <= norm, of the highest mean of <e_image, g> over pairs, from b = 0 by Adam (stage 1 of 2512.24146).

    pictures, texts: (N, D) unit embeddings of images and of their prompts. The gradient needs no network: images are
    embedded once, and every step is over all of them. A limit of the norm is ours. Without one the highest score is
    reached where b outweighs every text, e_+ = -e_- = unit(b): it is then the same for every prompt.
    """
    direction = torch.zeros(texts.shape[1], dtype=texts.dtype, device=texts.device, requires_grad=True)
    optimizer = torch.optim.Adam([direction], lr=lr)
    for _ in range(steps):
        score = (pictures * guided_text(texts, direction, omega, renorm)).sum(-1).mean()
        optimizer.zero_grad()
        (-score).backward()
        optimizer.step()
        with torch.no_grad():
            direction.mul_((norm / direction.norm()).clamp_max(1))
    return direction.detach()


def save_direction(path: Path, direction: Tensor, base: CLIPScore, about: Mapping[str, str]) -> None:
    """Write b with what identifies `base`, which is set up: embeddings of a few fixed texts. `about`: for the reader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    tensors = {"direction": direction.float().cpu().contiguous(), "probes": _probes(base)}
    save_file(tensors, beside, metadata={str(key): str(value) for key, value in about.items()})
    beside.replace(path)


def load_direction(path: str, base: CLIPScore) -> Tensor:
    """b (D,) float32 on the CPU. Raises RewardError unless the file was made for `base`, which is set up."""
    remedy = "make it with `align fit-direction`"
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:
            found = {key: file.get_tensor(key) for key in ("direction", "probes")}
    except (OSError, SafetensorError) as problem:
        raise RewardError(f"reward '{base.name}': direction {path} cannot be read ({problem}): {remedy}") from None
    probes = _probes(base)
    if found["probes"].shape != probes.shape or bool(((found["probes"] * probes).sum(-1) < _SAME).any()):
        raise RewardError(
            f"reward '{base.name}': direction {path} was found for another reward or one of other weights: {remedy}"
        )
    if found["direction"].shape != probes.shape[1:] or not bool(found["direction"].isfinite().all()):
        raise RewardError(f"reward '{base.name}': direction {path} is broken: {remedy}")
    return found["direction"]


def _probes(base: CLIPScore) -> Tensor:
    return base.embed_texts(_PROBES).float().cpu().contiguous()
