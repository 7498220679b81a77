"""An exponential moving average of the fp32 masters, at any ZeRO stage: each rank averages what it keeps of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from pretrain.engine.fragments import EMA, Fragment, local_fragments, saved_parameters
from pretrain.engine.zero import Zero
from pretrain.process.collectives import gather
from pretrain.process.runtime import Runtime


class Ema:
    """The moving average of the parameters that learn, after `updates` updates.

    `values` holds the part of it that this rank keeps: flat tensors by parameter name. Early on the decay is smaller,
    (1 + updates) / (10 + updates), so that the random first weights do not stay in the average.
    """

    def __init__(self, zero: Zero, decay: float, runtime: Runtime):
        self.updates = 0
        self._decay, self._zero, self._runtime = decay, zero, runtime
        self.values: dict[str, torch.Tensor] = {}
        self._masters = self._weights()  # updates change them in place
        self.values = {name: weight.clone() for name, weight in self._masters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of an update that was just made. Needs no collective."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        if self.values:  # a rank may keep nothing
            torch._foreach_lerp_(list(self.values.values()), list(self._masters.values()), 1 - decay)

    @torch.no_grad()
    def gathered(self) -> dict[str, torch.Tensor]:
        """The averages of all ranks, whole, by parameter name, on the CPU, with the weights of what does not learn. All
        ranks must call it."""
        mine = list(self._fragments())
        pieces = gather([(f.name, f.shape, f.start, f.numel) for f in mine])
        shapes = {name: shape for of_rank in pieces for name, shape, *_ in of_rank}
        whole = {name: torch.empty(shape) for name, shape in shapes.items()}
        for owner, of_rank in enumerate(pieces):
            flat = torch.empty(sum(numel for *_, numel in of_rank), device=self._runtime.device)
            if owner == self._runtime.rank and mine:
                torch.cat([f.values.get(EMA, f.values["weight"]).to(flat.device) for f in mine], out=flat)
            if self._runtime.world_size > 1:
                dist.broadcast(flat, owner)
            parts = flat.cpu().split([numel for *_, numel in of_rank])
            for (name, _, start, numel), part in zip(of_rank, parts, strict=True):
                whole[name].view(-1)[start : start + numel] = part
        return whole

    def _weights(self) -> dict[str, torch.Tensor]:
        learning = {name for name, parameter in saved_parameters(self._zero.module) if parameter.requires_grad}
        return {f.name: f.values["weight"].detach() for f in self._fragments() if f.name in learning}

    def _fragments(self) -> Iterator[Fragment]:
        return local_fragments(self._zero, self._runtime.rank, self._runtime.world_size, self.values)
