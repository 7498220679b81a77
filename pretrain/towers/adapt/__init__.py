"""What is done to a model before it trains, and the settings that ask for it. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pretrain.config.tree import Config, Phase


@dataclass(frozen=True)
class AdaptedConfig(Config):
    """The settings of a training whose model is adapted before it (`order.adapters_of`)."""

    @property
    def locked(self) -> Collection[str]:
        """Parts of the model that keep their weights."""
        return ()

    @property
    def phases(self) -> Sequence[Phase]:
        """Cheaper beginnings of the run."""
        return ()
