"""How ranks and forwards share the global batch."""

from __future__ import annotations

import math

from data_tools.errors import UsageError
from pretrain.config.tree import Config


def local_batch(config: Config, world_size: int) -> int:
    """Pairs per rank and step; raises UsageError where the world size or the micro-batch does not fit."""
    check_world_size(config.train.global_batch, world_size)
    local = config.train.global_batch // world_size
    micro = config.train.micro_batch
    if micro is not None and local % micro:
        raise UsageError(
            "train.micro_batch does not divide the rank's share of the batch",
            got=f"{micro} for {local} pairs",
            expected="a divisor",
            remedy="train.micro_batch=null does it in one forward",
        )
    return local


def check_world_size(global_batch: int, world_size: int) -> None:
    """Raises UsageError where the ranks would hold unequal batches."""
    if global_batch % world_size == 0:
        return
    small = [n for n in range(1, math.isqrt(global_batch) + 1) if global_batch % n == 0]
    fitting = {*small, *(global_batch // n for n in small)}
    below, above = max(n for n in fitting if n < world_size), min((n for n in fitting if n > world_size), default=None)
    raise UsageError(
        f"the global batch {global_batch} is not divisible by the world size",
        got=f"{world_size} ranks",
        expected=f"{below} ranks" if above is None else f"{below} or {above} ranks",
        remedy=f"start with such a number of ranks, or set a global batch that {world_size} divides",
    )
