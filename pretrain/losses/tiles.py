"""What the losses share: walking the similarity matrix in tiles, and the collectives around it.

A rank owns the rows of its own images; the columns are the texts of all ranks. Only texts are gathered. Without a
process group (or at world size 1) every collective here is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

TILE_ELEMENTS = 4 * 2**20  # similarities held at once: 16 MiB of fp32, large enough to keep a GEMM busy


def column_tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices over `columns`, each with about TILE_ELEMENTS / `rows` of them."""
    width = max(64, TILE_ELEMENTS // max(rows, 1))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def world() -> tuple[int, int]:
    """(rank, world size) of the default process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """`[b, d]` of every rank, stacked in rank order to `[world * b, d]`. All ranks must call it, with equal `b`."""
    _, size = world()
    if size == 1:
        return local
    out = local.new_empty(size * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(out, local.contiguous())
    return out


def scatter_sum(total: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of `total` `[world * b, d]`, of which a rank gets its own `[b, d]`. All ranks must call it."""
    _, size = world()
    if size == 1:
        return total
    out = total.new_empty(total.shape[0] // size, *total.shape[1:])
    dist.reduce_scatter_tensor(out, total)
    return out


def merge_log_sum_exp(maximum: torch.Tensor, exp_sum: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over ranks `[n]` of partial sums `exp_sum` relative to `maximum`. All ranks must call it."""
    _, size = world()
    if size > 1:
        shared = maximum.clone()
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        exp_sum = exp_sum * (maximum - shared).exp()
        dist.all_reduce(exp_sum)
        maximum = shared
    return maximum + exp_sum.log()
