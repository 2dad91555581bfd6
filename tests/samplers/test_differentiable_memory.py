"""How much the step-by-step adjoint keeps alive: one network call, however many steps it goes back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from samplers.differentiable import Steps, backward_chain, run_chain
from samplers.gradient_plan import GradientPlan
from samplers.grids import linspace_shift_grid


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {s._cdata for s in self._storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            key, size = storage._cdata, storage.nbytes()
            if key in before or key in self.known:
                continue
            self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))
            self.live += size
        self.peak = max(self.peak, self.live)
        return result

    @staticmethod
    def _storages(tree: Any) -> list[torch.UntypedStorage]:
        return [x.untyped_storage() for x in tree_iter(tree) if isinstance(x, Tensor)]

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self.known[key]


class Wide(torch.nn.Module):
    """Eight pointwise layers of 128 channels on states of 2: activations are all of the memory."""

    LAYERS, CHANNELS, SIDE = 8, 128, 16

    def __init__(self) -> None:
        super().__init__()
        widths = [2, *[self.CHANNELS] * self.LAYERS]
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.out = torch.nn.Conv2d(self.CHANNELS, 2, 1)
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)  # as from an earlier micro-batch

    def velocity(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


class Unconditional:
    """No condition at all."""

    def take(self, rows: Tensor) -> Unconditional:
        return self


def peak(work: Callable[[], None]) -> int:
    with LiveBytes() as count:
        work()
    return count.peak


def test_memory_does_not_grow_with_the_number_of_active_steps():
    """K = 1, 4 and 8 of eight steps of four images. One graph of the chain keeps every call's activations."""
    net, rows = Wide(), 4
    x = torch.randn(rows, 2, net.SIDE, net.SIDE)
    steps = Steps(linspace_shift_grid(8, 1.0), "ode", frozenset(), torch.zeros(8, dtype=torch.float64))

    def engine(k: int) -> None:
        active = torch.arange(8).expand(rows, 8) >= 8 - k
        plan = GradientPlan(0, torch.full((rows,), 7), active, torch.ones(rows))
        chain = run_chain(net.velocity, x, Unconditional(), steps, plan, lambda k: x)
        lam = torch.ones_like(chain.final)
        backward_chain(net.velocity, chain, Unconditional(), steps, plan, lam, micro_batch=rows)

    def plain(k: int) -> None:
        state = x
        for step in range(8):
            with torch.set_grad_enabled(step >= 8 - k):
                state = state - 0.125 * net.velocity(state, steps.grid[step].expand(rows), None)
        state.sum().backward()

    one, many = peak(lambda: engine(1)), peak(lambda: engine(8))
    kept = net.LAYERS * net.CHANNELS * net.SIDE**2 * rows * 4  # float32 results of tanh
    assert one > kept  # the count sees what the backward pass needs
    assert many < 1.02 * one
    growth = [peak(lambda k=k: plain(k)) for k in (1, 4, 8)]
    assert growth[1] - growth[0] >= 3 * kept
    assert growth[2] - growth[1] >= 4 * kept
