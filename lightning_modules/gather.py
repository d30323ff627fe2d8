"""Rows of all ranks on every rank, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; gradients of every rank's loss come back to the rank that a row is from.

    Ranks whose losses are means over their own samples, and whose gradients are then averaged, as DDP does, train on
    the mean over all samples.

    Args:
        x: Floating (B, D), with the same B on every rank.

    Returns:
        (W·B, D) of W ranks; `x` itself where there is one rank.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return gathered


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_offset(rows: int) -> int:
    """Place of this rank's first row among the gathered ones, where every rank has `rows` of them."""
    return rows * dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """Ours because torch.distributed.nn.functional.all_gather is deprecated (2.15) and its successor private."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Summed over ranks whole, then cut: gloo has no reduce-scatter, and embeddings are small.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        rows = len(total) // world_size()
        start = rank_offset(rows)
        return total[start : start + rows]
