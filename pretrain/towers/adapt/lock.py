"""Parts that keep their weights: LiT, arXiv 2111.07991."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.parts import tower_of


@dataclass(frozen=True)
class Lock(Adapter):
    """Stops parts, as `tower_of` names them, from learning."""

    parts: Collection[str]

    def apply(self, model: nn.Module) -> None:
        """By the names of the parameters."""
        for name, parameter in model.named_parameters():
            if tower_of(name) in self.parts:
                parameter.requires_grad_(False)
