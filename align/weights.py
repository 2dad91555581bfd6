"""Averaged copies of the trained weights: the evaluation average and the lagging old policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.training_utils import EMAModel


class WeightAverage(EMAModel):
    """diffusers' `EMAModel` whose copy can stand in for the live weights without moving a byte.

    `decay_of(n)` gives the decay of the n-th step (n = 0, 1, ...); by default it is diffusers' min((1+n)/(10+n), decay),
    but 0 (a copy) at n = 0.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        decay: float = 0.9,
        decay_of: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__(parameters, decay=decay)
        self._live = list(parameters)
        self._decay_of = decay_of

    def get_decay(self, optimization_step: int) -> float:
        """Decay used by `step`, which counts from 1."""
        return super().get_decay(optimization_step) if self._decay_of is None else self._decay_of(optimization_step - 1)

    def update(self) -> None:
        """One averaging step towards the live weights; with decay 0 an exact copy (the library's formula would round)."""
        self.step(self._live)
        if self.cur_decay_value == 0.0:
            with torch.no_grad():
                for live, shadow in zip(self._live, self.shadow_params, strict=True):
                    shadow.copy_(live)

    def lags(self) -> bool:
        """Whether the copy differs from the live weights."""
        return not all(torch.equal(a, b) for a, b in zip(self.shadow_params, self._live, strict=True))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network computes with the averaged weights. Never call backward inside on a graph made outside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for live, shadow in zip(self._live, self.shadow_params, strict=True):
            live.data, shadow.data = shadow.data, live.data
