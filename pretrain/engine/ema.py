"""An exponential moving average of the fp32 masters, at any ZeRO stage: each rank averages what it keeps of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pretrain.engine.fragments import local_fragments

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine


class Ema:
    """The average after `updates` updates, flat tensors by parameter name; of what learns alone. Needs no collective.

    Early on it forgets faster, by (1 + updates) / (10 + updates), so that the first weights do not stay in it.
    """

    def __init__(self, engine: Engine, decay: float, rank: int, world_size: int):
        self.updates = 0
        self._decay, self._engine, self._place = decay, engine, (rank, world_size)
        self.values = {name: weight.clone() for name, weight in self._weights().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of an update that was just made."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.values.values()), list(self._weights().values()), 1 - decay)

    def _weights(self) -> dict[str, torch.Tensor]:
        learning = {name for name, parameter in self._engine.module.named_parameters() if parameter.requires_grad}
        fragments = local_fragments(self._engine, *self._place)
        return {f.name: f.values["weight"].detach() for f in fragments if f.name in learning}
