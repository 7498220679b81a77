"""Buffers of towers and heads. A checkpoint holds parameters alone, so what else these remember must follow from their
architecture."""

from __future__ import annotations

import torch
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.files import few


def make_tables_non_persistent(module: nn.Module, name: str, remedy: str = "use a ViT or ConvNeXt") -> tuple[str, ...]:
    """Take the tables of whole numbers (positions, indices), which are built with the module, out of its state; returns
    their keys, under which exports have them all the same. `name`: what it is, for messages.

    Raises:
        UserError: a buffer of other numbers that belongs to the state: a run could not be resumed.
    """
    tables, others = [], []
    for path, part in module.named_modules():
        for own, buffer in part._buffers.items():
            if buffer is None or own in part._non_persistent_buffers_set:
                continue
            key = f"{path}.{own}" if path else own
            if buffer.is_floating_point() or buffer.is_complex():
                others.append(key)
                continue
            part._non_persistent_buffers_set.add(own)
            tables.append(key)
    if others:
        raise UserError(
            f"{name} keeps numbers that are no parameters",
            got=few(others),
            expected="one whose checkpoint is its parameters",
            remedy=remedy,
        )
    return tuple(tables)


def take_tables(clip: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Take the tables of whole numbers that `clip` builds itself out of native `state`, weights of `source`: older
    files have them. Raises UserError where they are not `clip`'s own."""
    tables = {key: buffer for key, buffer in clip.named_buffers() if not buffer.is_floating_point()}
    odd = [key for key in tables if key in state and not torch.equal(state.pop(key).cpu(), tables[key].cpu())]
    if odd:
        raise UserError(f"the weights of {source} belong to other tables than the model's", got=few(odd))
