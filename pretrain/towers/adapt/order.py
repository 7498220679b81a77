"""The one order in which adapters are applied, and merging what they added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from data_tools.errors import UserError
from pretrain.config.check import settings_of
from pretrain.towers.adapt import ADAPTERS, AdaptedConfig, AdapterConfig
from pretrain.towers.adapt.adapter import Adapter, Tensors
from pretrain.towers.adapt.compiling import Compile
from pretrain.towers.adapt.grad_checkpointing import GradCheckpointing
from pretrain.towers.adapt.lock import Lock
from pretrain.towers.adapt.patch_dropout import PatchPhases
from pretrain.towers.adapt.size import SizePhases
from pretrain.towers.parts import towers_of


def adapters_of(config: AdaptedConfig) -> list[Adapter]:
    """The adapters that the settings ask for, in the order in which `adapt` applies them: what the towers take, what of
    them learns, and last how they run."""
    return list(_asked_for(config))


def adapt(model: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Apply all of `adapters` to `model`, once. Raises UserError where it cannot be changed so."""
    for adapter in adapters:
        adapter.apply(model)
    towers_of(model).adapters = list(adapters)


def merge(adapters: Sequence[Adapter], state: Tensors) -> Tensors:
    """The state dict of a plain model, of that of one with `adapters`."""
    for adapter in reversed(adapters):
        state = adapter.merged(state)
    return state


def adapters_in(description: Mapping, where: str) -> list[Adapter]:
    """The adapters that model.json `description` says were added, to merge them; `where`: the file, for messages.

    Raises:
        UserError: what is no adapter.
    """
    found = description.get("adapters", {})
    try:
        settings = {name: settings_of(ADAPTERS, one, f"adapters.{name}.") for name, one in found.items()}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where} describes adapters that are none", got=error, expected=", ".join(ADAPTERS)) from None
    return list(_added(settings, seed=0))


def _added(settings: Mapping[str, AdapterConfig], seed: int) -> Iterator[Adapter]:
    for name, entry in ADAPTERS.items():
        yield from (entry.load()(one, seed) for one in settings.values() if one.type == name)


def _asked_for(config: AdaptedConfig) -> Iterator[Adapter]:
    if config.phases:
        yield SizePhases(config.phases)
        yield PatchPhases(config.phases)
    if config.locked:
        yield Lock(config.locked)
    yield from _added(config.added(), config.seed)
    if config.train.grad_checkpointing:
        yield GradCheckpointing(config.train.grad_checkpointing)
    if config.train.compile:
        yield Compile()
