"""Which settings a continued run must share with its beginning."""

from __future__ import annotations

from omegaconf import OmegaConf

from align.config import Config, to_yaml
from align.schema import flattened

_MAY_CHANGE = (
    "name",
    "output_dir",
    "train.iterations",
    "train.micro_batch",
    "train.rollout_batch",
    "train.async_scoring",
    "train.scoring_timeout",
    "completions.chunk",
    "loss.image_batch",
    "loss.checkpointing",
    "consistency.checkpointing",
    "early_stop",
    "eval",
    "checkpoint",
    "trackers",
    "preset",
)


def changed_keys(before: str, after: str) -> list[str]:
    """Settings, sorted, that differ between two config.yaml texts and that a continued run may not change."""
    texts = (to_yaml(Config()), before, after)
    plain, old, new = (flattened(OmegaConf.to_container(OmegaConf.create(text))) for text in texts)  # type: ignore[arg-type]
    old, new = plain | old, plain | new  # an older version did not know every setting
    differing = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return [k for k in differing if not any(k == m or k.startswith(f"{m}.") for m in _MAY_CHANGE) and not _place(k)]


def _place(key: str) -> bool:
    """Whether a key says where a reward's network rests."""
    room, _, name = key.partition(".")
    return room in ("rewards", "eval_rewards") and name.endswith(".offload")
