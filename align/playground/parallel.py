"""Two or more single-thread processes that train one model: on a CPU this beats one process with several threads.

Every collective here is a plain function; with one process they do nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# With glibc's defaults each large tensor is mapped and unmapped anew, and page faults take a third of a step.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": "268435456",
}


def _entry(rank: int, world: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        work(rank, world, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch(work: Callable[..., None], world: int, *args: Any) -> None:
    """Run `work(rank, world, *args)` in `world` new processes of one thread each and wait for them.

    Raises what a process raised.
    """
    for name, value in _MALLOC.items():
        os.environ.setdefault(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    torch.multiprocessing.spawn(_entry, args=(world, port, work, args), nprocs=world, join=True)


def average_gradients(parameters: Iterable[Tensor], world: int) -> None:
    """Replace every gradient by its mean over the processes, in one float32 message."""
    if world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in grads])
    dist.all_reduce(flat)
    flat.div_(world)
    for grad, piece in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(piece.view_as(grad))


def share(tensors: list[Tensor], source: int, world: int) -> None:
    """Overwrite the tensors on every process by those of process `source`."""
    if world == 1 or not tensors:
        return
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.broadcast(flat, source)
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(piece.view_as(tensor))
