"""Which loop a run goes through."""

from __future__ import annotations

from collections.abc import Callable

from align import backprop_loop, control_loop, policy_loop
from align.collect import Report
from align.config import Config
from align.run import Run

Iteration = Callable[[Run, Report], dict[str, float]]


def iteration_of(config: Config) -> Iteration:
    """The function that does one iteration of the run."""
    own = {"reward_gradient": backprop_loop.run_iteration, "condition_consistency": control_loop.run_iteration}
    return own.get(config.objective.type, policy_loop.run_iteration)
