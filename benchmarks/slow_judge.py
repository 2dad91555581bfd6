"""A stand-in for a judge behind a network: the exact verifier of the playground, which takes its time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from align.playground.verifier import VerifierReward
from rewards.base import RewardBatch

_VERIFIER = VerifierReward()


def judge(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], seconds: float = 0.02) -> Tensor:
    """Graded scores (B,), `seconds` later for each image."""
    time.sleep(seconds * len(images))
    return _VERIFIER.score(RewardBatch(images, prompts, metadata, torch.zeros(len(images)))).scores
