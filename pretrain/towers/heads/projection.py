"""A linear map from a field's features to the size of another's: a student is compared with its teacher by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.towers.heads import ProjectionConfig
from pretrain.towers.heads.head import Head
from pretrain.towers.model import Inputs, Model, Outputs


class Projection(Head):
    """Unit-norm rows `[n, size of the field "to"]` of those of the field `of`; these themselves, without a parameter,
    where both have one size."""

    gives_rows = True

    def __init__(self, settings: ProjectionConfig, model: Model):
        super().__init__()
        self.of = settings.of
        sizes = model.size_of(settings.of), model.size_of(settings.to)
        self.linear = nn.Linear(*sizes) if sizes[0] != sizes[1] else None

    def forward(self, outputs: Outputs, inputs: Inputs) -> torch.Tensor:
        """See `Head`."""
        rows = outputs["rows"][self.of]
        if self.linear is None:
            return rows
        with torch.autocast(rows.device.type, enabled=False):
            return F.normalize(self.linear(rows), dim=-1)
