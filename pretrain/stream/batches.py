"""Building a training batch, in the loader processes: order -> read -> decode, crop, caption or label -> tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from data_tools.errors import UserError
from data_tools.shards import Sample, ShardReader
from data_tools.shards.tar import TarDamageError
from pretrain.stream.bad import BadSample, BadSampleError
from pretrain.stream.members import Target, image_bytes, label, training_caption
from pretrain.stream.order import Order
from pretrain.stream.transform import ImageTransform

Tokenize = Callable[[list[str]], torch.Tensor]

SUBSTITUTE_ATTEMPTS = 64


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch; b = global batch / world size.

    `captions` are the texts before tokenisation, [] for labels.
    """

    step: int  # global step, from 0
    epoch: int
    images: torch.Tensor  # uint8 [b, 3, size, size]
    texts: torch.Tensor | None  # int64 [b, context]
    labels: torch.Tensor | None  # int64 [b]
    ids: np.ndarray  # uint64 [b]
    keys: list[str]
    captions: list[str]
    bad: list[BadSample] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory; the loader calls it."""
        tensors = {name: getattr(self, name) for name in ("images", "texts", "labels")}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items() if tensor is not None})


class _Row(NamedTuple):
    id: int
    key: str
    caption: str
    label: int


@dataclass
class BatchBuilder:
    """Builds rank `rank`'s batch of any global step: a function of (corpus, settings, step) alone."""

    reader: ShardReader
    order: Order
    transform: ImageTransform
    tokenize: Tokenize | None
    target: Target
    global_batch: int
    rank: int
    world_size: int

    def __call__(self, step: int) -> Batch:
        """Raises UserError for a shard that is gone or changed, and where no substitute of a bad sample can be read."""
        epoch, step_in_epoch = divmod(step, self.order.steps_per_epoch(self.global_batch))
        shards, indices = self.order.batch(epoch, step_in_epoch, self.global_batch, self.world_size, self.rank)
        size = self.transform.settings.size
        images = torch.empty((len(shards), 3, size, size), dtype=torch.uint8)
        rows: list[_Row] = []
        bad: list[BadSample] = []
        with _one_thread():
            for picture, shard, index in zip(images.numpy(), shards.tolist(), indices.tolist(), strict=True):
                try:
                    rows.append(self._load(epoch, shard, index, picture))
                except BadSampleError as error:
                    bad.append(self._describe(shard, index, error))
                    rows.append(self._load_substitute(epoch, shard, index, picture))
        captions = [row.caption for row in rows] if self.target == "caption" else []
        return Batch(
            step=step,
            epoch=epoch,
            images=images,
            texts=self.tokenize(captions) if captions and self.tokenize else None,
            labels=torch.tensor([row.label for row in rows]) if self.target == "label" else None,
            ids=np.array([row.id for row in rows], dtype=np.uint64),
            keys=[row.key for row in rows],
            captions=captions,
            bad=bad,
        )

    def _load(self, epoch: int, shard: int, index: int, picture: np.ndarray) -> _Row:
        """Fills `picture`, uint8 [3, size, size]. Raises BadSampleError, its `key` set once the sample was read."""
        sample = read_sample(self.reader, shard, index)
        try:
            caption, number = "", -1
            if self.target == "caption":
                caption = training_caption(sample, self.order.seed, epoch)
            else:
                number = label(sample, len(self.reader.corpus.classes))
            pixels = self.transform.train(image_bytes(sample), self.order.seed, epoch, sample.id)
            picture[:] = pixels.transpose(2, 0, 1)
        except BadSampleError as error:
            error.key = sample.key
            raise
        return _Row(sample.id, sample.key, caption, number)

    def _load_substitute(self, epoch: int, shard: int, index: int, picture: np.ndarray) -> _Row:
        for attempt in range(SUBSTITUTE_ATTEMPTS):
            try:
                return self._load(epoch, *self.order.substitute(epoch, shard, index, attempt), picture)
            except BadSampleError as error:
                reason = error.reason
        raise UserError(
            f"no readable sample found in place of sample {index} of {self.reader.corpus.paths[shard]}",
            got=f"{SUBSTITUTE_ATTEMPTS} bad ones, the last: {reason}",
            remedy="run `python -m data_tools verify` on the shards",
        )

    def _describe(self, shard: int, index: int, error: BadSampleError) -> BadSample:
        return BadSample(self.reader.corpus.paths[shard], index, error.key, error.kind, error.reason)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One picture is too little work for several threads; in a loader process there is one anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
