"""What a head is."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from pretrain.towers.model import Inputs, Outputs


class Head(nn.Module):
    """A module on the outputs of the encoders, made `Class(settings, model)`, which may ask `model` for its sizes.

    It runs on every micro-batch of every rank, whatever is there to be read, because under ZeRO-3 all ranks must gather
    alike; masks decide what counts. It has no persistent buffers, and draws nothing.
    """

    reads: ClassVar[frozenset[str]] = frozenset()  # fields whose tokens it needs, `outputs["local"]["tokens"]`
    gives_rows: ClassVar[bool] = False  # its result `[n, d]` is rows of the name that it has
    remarks: tuple[str, ...] = ()  # for the user, said at the start

    def forward(self, outputs: Outputs, inputs: Inputs) -> Any:
        """Of one micro-batch: rows `[n, d]` where it gives these, else what its objective reads."""
        raise NotImplementedError
