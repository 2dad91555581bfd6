"""Early stop: the run ends when a reward that is only watched has fallen, and its best weights are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.errors import UserError
from align.schema import nearest
from align.weights import WeightAverage
from rewards.registry import RewardConfig

if TYPE_CHECKING:  # it composes what stands here
    from align.config import EvalConfig


@dataclass
class EarlyStopConfig:
    """When a run ends before `train.iterations`. The adapter is then that of the best evaluation, not the last."""

    reward: str | None = None
    """Name of a reward that is not trained (of `eval_rewards`, or of weight 0); the run stops when it falls. null: off."""
    drop: float = 0.01
    """An evaluation is bad if its mean is below the best one so far, the base's included, by more than this fraction of
    the base's absolute mean. The fraction of the base's mean is customary, that it is counted from the best is ours."""
    patience: int = 3
    """Bad evaluations in a row that end the run."""

    def validate(
        self, rewards: Mapping[str, RewardConfig], eval_rewards: Mapping[str, RewardConfig], eval_every: int
    ) -> list[str]:
        """Errors, one line each, without the name of the section. `eval_every`: iterations between evaluations."""
        errors = []
        if self.drop < 0:
            errors.append(f"drop: must not be negative, got {self.drop:g}")
        if self.patience < 1:
            errors.append(f"patience: must be at least 1, got {self.patience}")
        if self.reward is None:
            return errors
        watched = [name for name, reward in rewards.items() if reward.weight == 0] + list(eval_rewards)
        if self.reward not in watched and self.reward in rewards:
            errors.append(
                f"reward: '{self.reward}' is trained, and a reward does not fall when it is itself over-optimised; "
                "watch one of eval_rewards"
            )
        elif self.reward not in watched:
            hint = nearest(self.reward, watched) or f"; not trained here: {', '.join(watched) or 'none'}"
            errors.append(f"reward: no reward '{self.reward}'{hint}")
        if eval_every < 1:
            errors.append("reward: it is watched in the evaluations during the run; set eval.every above 0")
        return errors


@dataclass(frozen=True)
class Verdict:
    """What the evaluations so far say."""

    best: int | None = None
    """Iterations done at the best evaluation, the base's left out; None before there is one."""
    bar: int = 0
    """Iterations done at the highest mean, 0 for the base: what the next evaluation is compared with."""
    bad: int = 0
    """Bad evaluations in a row up to now."""


def judge(means: Sequence[tuple[int, float]], drop: float) -> Verdict:
    """Best evaluation and bad ones in a row of `means`: (iterations done, mean of the watched reward), the base first.

    An evaluation is bad below highest - drop * |base|. One without a score (NaN) neither counts nor ends a row.
    """
    if not means:
        return Verdict()
    (bar, highest), best, bad, best_mean = means[0], None, 0, -math.inf
    margin = drop * abs(highest)
    for iteration, mean in means[1:]:
        if math.isnan(mean):
            continue
        # Counted from the best and not from the base: a reward that has risen and then turns is past its best long
        # before it is back below the base.
        bad = bad + 1 if mean < highest - margin else 0
        # Of equals the later: the watched reward lost nothing, and the trained one had longer.
        if mean >= best_mean:
            best, best_mean = iteration, mean
        if mean >= highest:
            bar, highest = iteration, mean
    return Verdict(best, bar, bad)


class Watch:
    """The watched reward's evaluations in a run, and the weights of the best one."""

    def __init__(
        self, config: EarlyStopConfig, measured: Mapping[str, Any], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """`measured`: what a mean depends on besides the weights, plain data; means that differ in it do not compare."""
        self.config = config
        self.measured = dict(measured)
        self.means: list[tuple[int, float]] = []
        """(iterations done, mean), the base's first."""
        self.weights = WeightAverage(parameters, decay_of=lambda n: 0.0)
        """A copy of the best evaluation's weights, which stand for the live ones inside `applied`."""

    @property
    def verdict(self) -> Verdict:
        """The rule on all evaluations so far. Not stored: with other settings the same evaluations say another thing."""
        return judge(self.means, self.config.drop)

    @property
    def stopped(self) -> bool:
        """Whether the run ends here."""
        return self.verdict.bad >= self.config.patience

    def add(self, iteration: int, mean: float) -> None:
        """Take in the mean of one evaluation of the weights that are live now; keep them if it is the best.

        Raises: UserError if the base has no score.
        """
        if not self.means and math.isnan(mean):
            raise UserError(
                f"early_stop.reward: '{self.config.reward}' has no score for the base's images, so it cannot fall; watch another"
            )
        self.means.append((iteration, mean))
        if self.verdict.best == iteration:
            self.weights.update()

    def reason(self) -> str:
        """Why the run ends here, for a person."""
        verdict = self.verdict
        where = f" at iteration {verdict.bar}" if verdict.bar else ", the base's"
        count = f"{verdict.bad} evaluations" if verdict.bad > 1 else "one evaluation"
        return f"{self.config.reward} was below its best ({dict(self.means)[verdict.bar]:.4g}{where}) for {count}"

    def choice(self) -> str:
        """Why the best evaluation is the best, for a person."""
        means, best = dict(self.means), self.verdict.best
        return f"where {self.config.reward} was highest ({means[best or 0]:.4g}, the base's {means[0]:.4g})"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data for a checkpoint."""
        kept = [] if self.verdict.best is None else self.weights.shadow_params
        return {f"best.{i}": p for i, p in enumerate(kept)}, {"measured": self.measured, "means": self.means}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> bool:
        """Inverse of `state`. False, with nothing taken over, if it was measured in another way."""
        if state["measured"] != self.measured:
            return False
        self.means = [(int(i), math.nan if mean is None else float(mean)) for i, mean in state["means"]]
        if self.verdict.best is not None:
            for i, shadow in enumerate(self.weights.shadow_params):
                shadow.copy_(tensors[f"best.{i}"])
        return True


def make_watch(
    config: EarlyStopConfig,
    evaluation: EvalConfig,
    guidance_scale: float,
    prompts: int,
    parameters: Sequence[torch.nn.Parameter],
) -> Watch | None:
    """The watch of a run that has `prompts` evaluation prompts; None if no reward is watched."""
    if config.reward is None:
        return None
    measured = {
        "reward": config.reward,
        "prompts": min(evaluation.during, prompts),
        "num_steps": evaluation.num_steps,
        "guidance_scale": guidance_scale,
        "seed": evaluation.seed,
    }
    return Watch(config, measured, parameters)
