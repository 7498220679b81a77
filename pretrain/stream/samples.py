"""From stored samples to tensors through the fields of a run: the one way of training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch

from data_tools.corpus import Corpus, Sample, ShardReader
from data_tools.errors import UserError
from data_tools.format.tar import TarDamageError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import describe
from pretrain.stream.draw import Draw
from pretrain.stream.fields.field import Field, Inputs, Shown
from pretrain.towers.cut import Rows

_LACKED = "no_"  # how the kind of a BadSampleError begins that says a sample lacks a field


class Samples:
    """n samples on their way into tensors. Of an optional field a row `present`, bool `[n]`, says who has it.

    `padding` is that of the fields, made once for many batches. Nothing is zeroed before it is written.
    """

    def __init__(self, fields: Mapping[str, Field], n: int, padding: Inputs):
        self._fields = fields
        self._padding = padding
        self._rows: Inputs = {
            name: {key: torch.empty((n, *one.shape[1:]), dtype=one.dtype) for key, one in rows.items()}
            for name, rows in self._padding.items()
        }
        self._views = {name: _by_sample(rows, n) for name, rows in self._rows.items()}
        self._shown = {name: [Shown()] * n for name in fields}
        self._empty = set(range(n))  # rows without a sample

    def put(self, row: int, sample: Sample, fields: Mapping[str, Field], draw: Draw | None = None) -> None:
        """Read a sample through `fields` into a row: with `draw` as training sees it, else as evaluation does. Writes
        over what a bad sample has left there. Raises BadSampleError, with the sample's key."""
        for name, field in fields.items():
            out = self._views[name][row]
            if field.optional:
                out["present"].fill_(True)
            try:
                shown = field.evaluate(sample, out) if draw is None else field.train(sample, draw, out)
            except BadSampleError as error:
                if not (field.optional and error.kind.startswith(_LACKED)):
                    error.key = sample.key
                    raise
                self._pad(name, row)
                shown = Shown(() if draw is None else ("",))
            self._shown[name][row] = shown
        self._empty.discard(row)

    def texts(self, field: str) -> list[tuple[str, ...]]:
        """Of each sample the texts that it was shown with in `field`."""
        return [shown.texts for shown in self._shown[field]]

    def finish(self, micro_batch: int | None = None) -> tuple[Inputs, dict[str, torch.Tensor]]:
        """The inputs, for training in micro-batches of so many samples, and each field's identities. Rows without a
        sample are padding."""
        for row in self._empty:
            for name in self._fields:
                self._pad(name, row)
        inputs = {
            name: field.finish(self._rows[name], self._shown[name], micro_batch) for name, field in self._fields.items()
        }
        identity = {name: field.identity(inputs[name], self._shown[name]) for name, field in self._fields.items()}
        return inputs, identity

    def _pad(self, name: str, row: int) -> None:
        for key, padding in self._padding[name].items():
            self._views[name][row][key].copy_(padding[0])


def padding_of(fields: Mapping[str, Field], n: int = 1) -> Inputs:
    """The rows of n samples that are not there."""
    padding = {name: field.rows(n) for name, field in fields.items()}
    for name, field in fields.items():
        if field.optional:
            padding[name]["present"] = torch.zeros(n, dtype=torch.bool)
    return padding


def _by_sample(rows: Rows, n: int) -> list[Rows]:
    """Views of the rows of each of n samples."""
    columns = {name: row.unbind() for name, row in rows.items()}
    return [{name: column[number] for name, column in columns.items()} for number in range(n)]


def pinned(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in page-locked memory."""
    return {name: tensor.pin_memory() for name, tensor in tensors.items()}


def modules_of(fields: Mapping[str, Field]) -> list[str]:
    """The modules that a loader process needs for `fields`, as far as they are not this package's."""
    tokenizers = [getattr(field, "tokenize", None) for field in fields.values()]
    return sorted({tokenize.__module__ for tokenize in tokenizers if tokenize is not None} - {"__main__"})


def check_first_shard(corpus: Corpus, fields: Mapping[str, Field]) -> None:
    """Raises UserError, with the keys that there are, where no sample of the first shard has what `fields` need."""
    with ShardReader(corpus) as reader:
        try:
            sample = read_sample(reader, 0, 0)
        except BadSampleError:
            return
        refuse_foreign_shard(reader, 0, sample, fields)


def refuse_foreign_shard(reader: ShardReader, shard: int, sample: Sample, fields: Mapping[str, Field]) -> None:
    """Raises UserError, with the keys that there are, where no sample of the shard has what `fields` need. The corpus
    is then of another kind, and substitutes would only hide it. `sample` is one of the shard."""
    missing = _missing(sample, fields)
    if missing is None:
        return
    count = int(reader.corpus.counts[shard])
    if any(_missing(other, fields) is None for other in _readable(reader, shard, count)):
        return
    raise UserError(
        f"no sample of {reader.corpus.paths[shard]} has the expected {missing}",
        got=describe(sample),
        remedy="name the members with data.train.N.image and data.train.N.captions, or pack the corpus with "
        "`python -m data_tools pack`",
    )


def _missing(sample: Sample, fields: Mapping[str, Field]) -> str | None:
    return next(filter(None, (field.lacks(sample) for field in fields.values() if not field.optional)), None)


def _readable(reader: ShardReader, shard: int, count: int) -> Iterator[Sample]:
    for index in range(count):
        with suppress(BadSampleError):
            yield read_sample(reader, shard, index)


def read_sample(reader: ShardReader, shard: int, index: int) -> Sample:
    """Raises BadSampleError `damaged`; and UserError for a shard that is gone, changed or out of reach, because a
    substitute would hide that and differ between ranks."""
    try:
        return reader.read(shard, index)
    except TarDamageError as error:
        raise BadSampleError("damaged", str(error)) from error
    except OSError as error:
        raise UserError(
            f"cannot read shard {reader.corpus.paths[shard]}", got=error.strerror, remedy="check the disk or mount"
        ) from error
