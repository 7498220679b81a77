"""Collectives of values on the host: a sum, everybody's value, one fault for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from data_tools.errors import UserError

T = TypeVar("T")

_control: dist.ProcessGroup | None = None  # beside nccl: agreement over gloo does not wait for the device


def use(group: dist.ProcessGroup) -> None:
    """Agree over `group` from now on, not over the default one."""
    global _control
    _control = group


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum over ranks of each value, on every rank. All ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_control)
    return total.tolist()


def gather(value: object) -> list:
    """`value` of every rank, in rank order, on every rank. All ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def raise_on_all_ranks(action: Callable[[], T], what: str) -> T:
    """Run `action` on this rank; if it raised OSError or UserError on any, raise on all. All ranks must call it.

    Without it the ranks that succeeded would wait for ever in their next collective.
    """
    value, fault = None, None
    try:
        value = action()
    except (OSError, UserError) as error:
        fault = f"{type(error).__name__}: {error}" if isinstance(error, OSError) else error
    faults = {rank: text for rank, text in enumerate(gather(fault)) if text is not None}
    if faults:
        rank, text = next(iter(faults.items()))
        raise UserError(
            f"{what} failed on rank {rank}" + (f" and {len(faults) - 1} more" if len(faults) > 1 else ""), got=text
        )
    return cast("T", value)
