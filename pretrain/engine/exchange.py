"""Inputs of rows that other ranks hold: what an objective has mined in the global batch comes to the rank that asks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pretrain.towers.cut import Rows, uncut


def exchange(rows: Rows, numbers: torch.Tensor, device: torch.device) -> Rows:
    """Rows `numbers`, int64 `[n]`, of the global batch: rank r holds those from r * b, b = this rank's, in `rows`.

    They lie where `rows` do. `device`: where the process group communicates. All ranks must call it, with equal `b`
    and the same names; `numbers` may differ in count.
    """
    kept = uncut(rows)
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return {name: value[numbers.to(value.device)] for name, value in kept.items()}
    local = len(next(iter(kept.values())))
    numbers = numbers.to(device)
    order = torch.argsort(numbers, stable=True)  # by owner, for rows of an owner stand together
    wanted = torch.bincount(numbers // local, minlength=size)
    asked = _all_to_all(wanted, [1] * size, [1] * size)
    to_get, to_give = wanted.tolist(), asked.tolist()
    given = _all_to_all(numbers[order] % local, to_get, to_give)
    back = torch.argsort(order)
    return {
        name: _all_to_all(value[given.to(value.device)].to(device), to_give, to_get)[back].to(value.device)
        for name, value in kept.items()
    }


def _all_to_all(values: torch.Tensor, give: list[int], take: list[int]) -> torch.Tensor:
    """`give[r]` rows of `values` to each rank r, and the `take[r]` that come from it, in rank order."""
    out = values.new_empty(sum(take), *values.shape[1:])
    dist.all_to_all_single(out, values.contiguous(), take, give)
    return out
