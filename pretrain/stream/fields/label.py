"""The label of a sample: the number of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_tools.corpus import Sample
from data_tools.media.members import label, lacks_label
from pretrain.stream.draw import Draw
from pretrain.stream.fields.field import Shown
from pretrain.towers.cut import Rows

PADDING = -1


@dataclass(frozen=True)
class Label:
    """`class` int64 `[n]`, -1 of padding. `classes`: how many there are, to refuse other numbers; 0: not known."""

    classes: int = 0
    optional: bool = False

    def rows(self, n: int) -> Rows:
        """See `Field`."""
        return {"class": torch.full((n,), PADDING)}

    def train(self, sample: Sample, draw: Draw, out: Rows) -> Shown:
        """See `Field`. Raises BadSampleError `no_label` or `bad_label`."""
        return self.evaluate(sample, out)

    def evaluate(self, sample: Sample, out: Rows) -> Shown:
        """See `Field`. Raises as `train` does."""
        out["class"].fill_(label(sample, self.classes))
        return Shown()

    def finish(self, rows: Rows, shown: Sequence[Shown], micro_batch: int | None) -> Rows:
        """See `Field`."""
        return rows

    def identity(self, rows: Rows, shown: Sequence[Shown]) -> torch.Tensor:
        """The classes themselves."""
        return rows["class"]

    def lacks(self, sample: Sample) -> str | None:
        """See `Field`."""
        return lacks_label(sample)
