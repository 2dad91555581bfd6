"""Which of the two loops a run goes through."""

from __future__ import annotations

from collections.abc import Callable

from align import backprop_loop, policy_loop
from align.collect import Report
from align.config import Config
from align.run import Run

Iteration = Callable[[Run, Report], dict[str, float]]


def iteration_of(config: Config) -> Iteration:
    """The function that does one iteration of the run."""
    return backprop_loop.run_iteration if config.objective.type == "reward_gradient" else policy_loop.run_iteration
