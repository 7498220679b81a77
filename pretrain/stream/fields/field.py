"""What a field is: what of a stored sample a model sees, as rows of tensors, in training and evaluation alike.

It is a small frozen value that goes to the loader processes, without any module of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from data_tools.corpus import Sample
from data_tools.media.members import Fields
from pretrain.stream.draw import Draw
from pretrain.towers.cut import Rows

Inputs = dict[str, Rows]  # by field
Tokenize = Callable[[list[str]], torch.Tensor]  # n texts -> int64 [n, context]

_OF_PART = re.compile(r"part(\d+)\.(.+)")


class Shown(NamedTuple):
    """What of a sample's field is no tensor: its texts, for people and for the tokenizer (one in training, all that
    there are in evaluation), and a hash of what was stored."""

    texts: tuple[str, ...] = ()
    content: int = 0


@dataclass(frozen=True)
class FieldContext:
    """What a field is made of beside its settings, of one source and phase: `Class.of(settings, context)`.

    `name`: the field's own; `mapping`, `choose`: where captions are in the source's samples, and which of several a
    step sees; `text`: the field that reads that caption; `optional`: see `Field`.
    """

    name: str
    mapping: Fields
    choose: str
    text: Field
    optional: bool = False


class Field(Protocol):
    """A member of a sample -> its row of each of the field's tensors. See samples.py, which is what calls it.

    A sample that cannot be used raises BadSampleError, of a kind that begins with `no_` where it lacks the field: of an
    optional one that is no fault.
    """

    @property
    def optional(self) -> bool:
        """Whether a sample may lack it."""

    def rows(self, n: int) -> Rows:
        """The tensors of n samples, as padding has them: the first size is n."""

    def train(self, sample: Sample, draw: Draw, out: Rows) -> Shown:
        """Write one sample's rows as a training step sees it; whatever is random about them comes from `draw`."""

    def evaluate(self, sample: Sample, out: Rows) -> Shown:
        """Write one sample's rows as every evaluation sees it."""

    def finish(self, rows: Rows, shown: Sequence[Shown], micro_batch: int | None) -> Rows:
        """What is done once a batch, for all samples together. In training, rows that belong to one micro-batch alone
        are called `part0.NAME`, `part1.NAME` and so on; in evaluation (None) a sample may have several rows, or none.
        """

    def identity(self, rows: Rows, shown: Sequence[Shown]) -> torch.Tensor:
        """int64, one of each finished row: equal where two samples have the same in this field."""

    def lacks(self, sample: Sample) -> str | None:
        """What a sample lacks that the field needs, with the names looked for; None: nothing. Only whether it is there
        is asked, not what it holds."""


def micro_batches(inputs: Inputs, size: int) -> list[Inputs]:
    """The inputs of `size` samples at a time, views of those of the batch; rows of one micro-batch alone go to it."""
    count = max(len(row) for rows in inputs.values() for name, row in rows.items() if not _OF_PART.fullmatch(name))
    parts: list[Inputs] = [{name: {} for name in inputs} for _ in range(0, count, size)]
    for field, rows in inputs.items():
        for name, row in rows.items():
            match = _OF_PART.fullmatch(name)
            if match:
                parts[int(match[1])][field][match[2]] = row
                continue
            for number, part in enumerate(parts):
                part[field][name] = row[number * size : (number + 1) * size]
    return parts
