"""Momentum orthogonalised by Newton-Schulz (Muon), its matrix work divided over the processes.

A convolution's kernel (out, in, h, w) counts as the matrix (out, in h w).

The quintic iteration and its coefficients: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices (N, rows, columns) near 1 (to about [0.7, 1.2]); returns bfloat16."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Muon with Nesterov momentum for matrices that every process holds alike.

    The gradients must already be the same everywhere. Each process orthogonalises its share of the matrices, then the
    updates are summed; momenta are kept by all, so a checkpoint of one process serves any number of them.
    """

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, rank: int = 0, world: int = 1) -> None:
        self.parameters, self.momentum, self.world = parameters, momentum, world
        self.buffers = [torch.zeros_like(p) for p in parameters]
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for i, p in enumerate(parameters):
            groups[p.shape].append(i)
        self.mine = [ids[rank::world] for ids in groups.values() if ids[rank::world]]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update by the parameters' `.grad`."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch._foreach_lerp_(self.buffers, grads, 1 - self.momentum)
        flat = torch.zeros(sum(p.numel() for p in self.parameters))
        pieces = flat.split([p.numel() for p in self.parameters])
        updates = [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]
        for ids in self.mine:
            directions = torch.stack([torch.lerp(grads[i], self.buffers[i], self.momentum) for i in ids])
            for i, update in zip(ids, orthogonalise(directions.flatten(2)), strict=True):
                updates[i].copy_(update.view_as(updates[i]))
        if self.world > 1:
            dist.all_reduce(flat)
        for p, update in zip(self.parameters, updates, strict=True):
            p.add_(update, alpha=-lr * max(1.0, p.shape[0] / p[0].numel()) ** 0.5)
