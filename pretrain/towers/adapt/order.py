"""The one order in which adapters are applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from pretrain.towers.adapt import AdaptedConfig
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.adapt.compiling import Compile
from pretrain.towers.adapt.grad_checkpointing import GradCheckpointing
from pretrain.towers.adapt.lock import Lock
from pretrain.towers.adapt.patch_dropout import PatchPhases
from pretrain.towers.adapt.size import SizePhases


def adapters_of(config: AdaptedConfig) -> list[Adapter]:
    """The adapters that the settings ask for, in the order in which `adapt` applies them: what the towers take, what of
    them learns, and last how they run."""
    return list(_asked_for(config))


def adapt(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Apply all of `adapters` to `model`, once. Raises UserError where it cannot be changed so."""
    for adapter in adapters:
        adapter.apply(model)


def _asked_for(config: AdaptedConfig) -> Iterator[Adapter]:
    if config.phases:
        yield SizePhases(config.phases)
        yield PatchPhases(config.phases)
    if config.locked:
        yield Lock(config.locked)
    if config.train.grad_checkpointing:
        yield GradCheckpointing(config.train.grad_checkpointing)
    if config.train.compile:
        yield Compile()
