"""The playground's *proxy* reward: a small open_clip network trained on its scenes, imperfect as learned rewards are.

The exact verifier is the gold reward. The proxy agrees with it only in part, so a policy can please one and not the
other, which is what a study of over-optimisation needs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rewards.base import RewardError
from rewards.clip import CLIPScore

WEIGHTS = Path(__file__).parent / "proxy_weights"
EMBED_BATCH = 256


class ProxyReward(CLIPScore):
    """CLIPScore of a shipped proxy: the cosine, in [-1, 1], of the image and its own prompt. Differentiable.

    Images of another size than 64x64 are resized and cropped as open_clip does. Any text has a score, also one
    outside the playground's grammar, where it means nothing.
    """

    name = "proxy"
    max_batch = EMBED_BATCH

    def __init__(self, seed: int = 0) -> None:
        """seed: which of the shipped networks; they differ in what they saw and in their first weights."""
        super().__init__(model=str(proxy_folder(seed)))


def proxy_folder(seed: int = 0) -> Path:
    """The folder, in open_clip's format, of a shipped proxy. Raises RewardError where none has this seed."""
    folder = WEIGHTS / f"seed-{seed}"
    if not folder.is_dir():
        shipped = ", ".join(sorted(path.name.removeprefix("seed-") for path in WEIGHTS.glob("seed-*")))
        raise RewardError(
            f"no proxy of seed {seed!r} is shipped (there is: {shipped}); train one with "
            "`python -m align.playground.train_proxy` and name its folder by type clip, args {model: FOLDER}"
        )
    return folder


def load_proxy(seed: int = 0, device: torch.device | str = "cpu") -> ProxyReward:
    """A shipped proxy in float32, ready to score and to embed."""
    proxy = ProxyReward(seed)
    proxy.setup(torch.device(device), torch.float32)
    return proxy


@torch.no_grad()
def embed_images(proxy: CLIPScore, images: Tensor) -> Tensor:
    """Embeddings (N, E) float32 of unit norm, on the network's device, of images (N, 3, H, W) in [0, 1]."""
    return torch.cat([proxy.embed_images(part) for part in images.split(EMBED_BATCH)])
