"""Parts that keep their weights: LiT, arXiv 2111.07991."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pretrain.towers.parts import tower_of


def lock(model: nn.Module, parts: Collection[str]) -> None:
    """Stop parts, as `tower_of` names them, from learning."""
    for name, parameter in model.named_parameters():
        if tower_of(name) in parts:
            parameter.requires_grad_(False)
