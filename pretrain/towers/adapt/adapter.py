"""What an adapter is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]


class Adapter(Protocol):
    """A change of a built model, before it gets weights from elsewhere and before an engine is built around it.

    One of the settings' map `adapters` is made `Class(settings, seed)`. What it adds to the model learns, has names of
    its own in the state dict, and leaves those of all other parameters as they were.
    """

    def apply(self, model: nn.Module) -> None:
        """Change `model`, a dual encoder or a classifier around one. Raises UserError where it cannot be changed so."""

    def added(self, name: str) -> bool:
        """Whether it added the parameter that has `name` in the state dict."""
        return False

    def merged(self, state: Tensors) -> Tensors:
        """The state dict of a plain model that computes what the adapted one with `state` does. Raises UserError where
        `state` is not of such a one."""
        return state
