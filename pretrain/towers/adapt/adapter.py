"""What an adapter is."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Adapter(Protocol):
    """A change of a built model, before it gets weights from elsewhere and before an engine is built around it."""

    def apply(self, model: nn.Module) -> None:
        """Change `model`, a dual encoder or a classifier around one. Raises UserError where it cannot be changed so."""
