"""Credit: turn the scores of finished images into one reward per (sample, step).

Every rule is a pure function that returns step rewards of shape (N, S), N samples by S trained steps in sampling
order; `align.advantages.group_advantages` normalises each step column on its own, so all rules share what follows.
"""

from torch import Tensor


def terminal(scores: Tensor, num_steps: int) -> Tensor:
    """Give every trained step the score of the final image (Flow-GRPO, arXiv 2505.05470).

    Args:
        scores: (N,) reward of each finished image; NaN marks a missing score and stays NaN.
        num_steps: number S >= 1 of trained steps.

    Returns:
        (N, S) step rewards, every column equal to `scores`.

    Raises:
        ValueError: if `scores` is not one-dimensional or `num_steps` < 1.
    """
    if scores.ndim != 1:
        raise ValueError(f"credit: scores must have shape (N,), got {tuple(scores.shape)}")
    if num_steps < 1:
        raise ValueError(f"credit: num_steps must be at least 1, got {num_steps}")
    return scores.unsqueeze(1).repeat(1, num_steps)
