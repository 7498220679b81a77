"""timm's Muon, orthogonalising in the number format that this device multiplies fast."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timm.optim import muon as library


class Muon(library.Muon):
    """timm's products are in bf16 wherever it runs and whatever the gradients are in; a processor without units for it
    takes some ten times as long for them. `dtype`: what they are in here."""

    def __init__(self, groups: list[dict], dtype: torch.dtype, **settings):
        super().__init__(groups, **settings)
        self._dtype = dtype

    def step(self, closure: Callable | None = None):
        """An update; timm has no parameter for the format, so its function stands aside for the time."""
        plain = library.zeropower_via_newtonschulz
        library.zeropower_via_newtonschulz = functools.partial(plain, dtype=self._dtype)
        try:
            return super().step(closure)
        finally:
            library.zeropower_via_newtonschulz = plain
