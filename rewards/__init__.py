"""How images are judged. Knows nothing of samplers or training."""

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, checked_score, to_uint8
from rewards.combine import combine
from rewards.function import FunctionReward
from rewards.registry import RewardConfig, build_reward, known_rewards, register, validate_rewards

__all__ = [
    "FunctionReward",
    "Reward",
    "RewardBatch",
    "RewardConfig",
    "RewardError",
    "RewardOutput",
    "build_reward",
    "checked_score",
    "combine",
    "known_rewards",
    "register",
    "to_uint8",
    "validate_rewards",
]
