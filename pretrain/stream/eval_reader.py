"""The evaluation reader: every sample once, in corpus order, with equal padded batches on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_tools.corpus import Corpus, Sample, ShardReader
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import DEFAULT_FIELDS, Fields, fitting, lacks_label
from pretrain.stream.fields.field import Field, Inputs, Tokenize
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.label import PADDING, Label
from pretrain.stream.fields.text import Text
from pretrain.stream.samples import Samples, check_first_shard, modules_of, padding_of, pinned, read_sample
from pretrain.stream.workers import BatchIterator

if TYPE_CHECKING:  # it imports open_clip, which loader processes of images do without
    from pretrain.towers.spec import ModelSpec


@dataclass(frozen=True)
class EvalBatch:
    """n samples and all m of their texts. Padding has position, text_image and class -1, black pixels, key ""."""

    inputs: Inputs  # rows of each field, [n, ...], of a text [m, ...]: m >= 1, one of no word where there is none
    positions: torch.Tensor  # int64 [n], place of each sample in the corpus
    text_image: torch.Tensor  # int64 [m], position of each text's sample
    captions: list[str]  # [m]
    identity: dict[str, torch.Tensor]  # of each field int64 [n] or [m], equal where two rows hold the same
    keys: list[str]  # [n]

    def pin_memory(self) -> EvalBatch:
        """The same batch with its inputs in page-locked memory; the loader calls it."""
        return replace(self, inputs={name: pinned(rows) for name, rows in self.inputs.items()})


class EvalReader:
    """Iterates over this rank's EvalBatches; may be iterated again. Rank r has the r-th contiguous part of the corpus.

    Every rank has as many batches, with as many samples in each, as the others: the end of the last parts is padding.

    Args:
        fields: what is read of each sample, see `eval_fields`; texts are the field `text`.
        batch: samples per batch.
        workers: loader processes; 0 reads in this one.

    Raises:
        UserError: no sample of the first shard has what the fields need; when iterated: an unreadable sample, which is
            never substituted here.
    """

    def __init__(
        self,
        corpus: Corpus,
        fields: Mapping[str, Field],
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        self.fields = fields
        check_first_shard(corpus, fields)
        share = -(-corpus.num_samples // world_size)
        self._build = _EvalBuilder(ShardReader(corpus), fields, batch, rank * share, share)
        self._batches, self._workers = -(-share // batch), workers

    @property
    def labelled(self) -> bool:
        """Whether labels are read."""
        return "label" in self.fields

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[EvalBatch]:
        pin = torch.cuda.is_available()
        with BatchIterator(self._build, range(len(self)), self._workers, pin_memory=pin) as batches:
            yield from batches
        self._build.reader.close()


def eval_fields(
    corpus: Corpus, spec: ModelSpec, tokenize: Tokenize | None = None, mapping: Fields = DEFAULT_FIELDS
) -> dict[str, Field]:
    """Images as the architecture takes them, with `tokenize` the captions too, and labels where the first sample has
    one.

    Args:
        tokenize: list of m texts -> int64 [m, context], picklable.
        mapping: where images and captions are; lines of a txt are captions also where the corpus's layout says so.
    """
    mapping = fitting(mapping, corpus)
    fields: dict[str, Field] = {"image": Image(image_settings(spec), mapping)}
    if tokenize is not None:
        fields["text"] = Text(tokenize, mapping)
    return fields | labels_of(corpus)


def labels_of(corpus: Corpus) -> dict[str, Field]:
    """The field `label` where the first sample of the corpus has one. Raises UserError where it cannot be read."""
    with ShardReader(corpus) as reader:
        unlabelled = lacks_label(_read(reader, 0, 0))
    return {} if unlabelled else {"label": Label(len(corpus.classes))}


@dataclass
class _EvalBuilder:
    """Builds the batches of positions first .. first + share."""

    reader: ShardReader
    fields: Mapping[str, Field]
    batch: int
    first: int
    share: int

    @property
    def modules(self) -> list[str]:
        """What the fork server imports for it."""
        return modules_of(self.fields)

    @cached_property
    def _padding(self) -> Inputs:
        return padding_of(self.fields)

    def __call__(self, number: int) -> EvalBatch:
        start = self.first + number * self.batch
        positions = np.arange(start, min(start + self.batch, self.first + self.share))
        positions[positions >= self.reader.corpus.num_samples] = PADDING
        samples, keys = Samples(self.fields, len(positions), self._padding), [""] * len(positions)
        for row, position in enumerate(positions.tolist()):
            if position != PADDING:
                keys[row] = self._load(position, row, samples)
        inputs, identity = samples.finish()
        texts = samples.texts("text") if "text" in self.fields else []
        captions = [text for own in texts for text in own] or [""]
        owners = [at for at, own in zip(positions.tolist(), texts, strict=False) for _ in own] or [PADDING]
        return EvalBatch(inputs, torch.from_numpy(positions), torch.tensor(owners), captions, identity, keys)

    def _load(self, position: int, row: int, samples: Samples) -> str:
        shard, index = self.reader.corpus.locate(position)
        sample = _read(self.reader, shard, index)
        try:
            samples.put(row, sample, self.fields)
        except BadSampleError as error:
            raise _unreadable(self.reader.corpus, shard, sample.key, error) from error
        return sample.key


def _read(reader: ShardReader, shard: int, index: int) -> Sample:
    try:
        return read_sample(reader, shard, index)
    except BadSampleError as error:
        raise _unreadable(reader.corpus, shard, f"number {index}", error) from error


def _unreadable(corpus: Corpus, shard: int, key: str, error: BadSampleError) -> UserError:
    return UserError(
        f"cannot evaluate on sample {key} of {corpus.paths[shard]}",
        got=f"{error.kind}: {error.reason}",
        remedy="evaluation leaves out no sample: repair the shard or take the sample out",
    )
