"""Masked words: what stood where the field `masked_text` hides words (BERT, arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pretrain.objectives import MLMConfig
from pretrain.objectives.objective import Inputs


class MLM:
    """The mean over the hidden words of the global batch of what the head `words` says of each."""

    wants = frozenset({"words"})

    def __init__(self, settings: MLMConfig):
        self.settings = settings

    def count(self, inputs: Inputs) -> torch.Tensor:
        """Hidden words: as many as chance hides, on a rank or on all maybe none. See `PerSample`."""
        return (inputs["masked_text"]["wanted"] >= 0).sum()

    def loss(self, outputs: Mapping[str, Any], inputs: Inputs) -> torch.Tensor:
        """See `PerSample`."""
        return outputs["local"]["words"].sum()
