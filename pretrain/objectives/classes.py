"""Cross-entropy of class scores: what fine-tuning minimises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.objectives import ClassesConfig
from pretrain.objectives.objective import Inputs

_ABSENT = -100  # a class that cross-entropy leaves out


class Classes:
    """The objective of the field `label`, whose rows have a `class`, and of the head `classes`, which gives scores
    `[n, classes]`."""

    wants = frozenset({"classes"})

    def __init__(self, settings: ClassesConfig):
        self.settings = settings

    def count(self, inputs: Inputs) -> torch.Tensor | int:
        """Samples that have a label: see `PerSample`."""
        rows = inputs["label"]
        return rows["present"].sum() if "present" in rows else len(rows["class"])

    def loss(self, outputs: Mapping[str, Any], inputs: Inputs) -> torch.Tensor:
        """See `PerSample`."""
        rows, scores = inputs["label"], outputs["local"]["classes"]
        wanted = rows["class"]
        if "present" in rows:
            wanted = torch.where(rows["present"], wanted, _ABSENT)
        return F.cross_entropy(scores, wanted, reduction="sum", ignore_index=_ABSENT)
