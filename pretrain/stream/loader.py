"""The training stream of one rank: batches from any global step on, the same at any world size and worker count."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import get_args

import torch

from data_tools.errors import UsageError, UserError
from data_tools.shards import Corpus, ShardReader
from pretrain.rules import check_world_size
from pretrain.stream.bad import BadSample, BadSampleAccount, BadSampleError, Quarantine, check_bad_ratio
from pretrain.stream.batches import Batch, BatchBuilder, Tokenize, read_sample
from pretrain.stream.members import Target, missing_member
from pretrain.stream.order import Order, canonical_streams
from pretrain.stream.position import Position
from pretrain.stream.transform import ImageSettings, ImageTransform
from pretrain.stream.workers import BatchIterator

__all__ = ["BadSample", "Batch", "TrainStream"]

MIN_READS = 1000  # reads (or one epoch, if shorter) over which the ratio of bad samples is judged


class TrainStream:
    """Batches of one rank. Calls no collective; ranks stay in step because every epoch has the same steps on each.

    Args:
        corpus: the shards.
        seed: defines, with the corpus, the order, the crops and the choice of captions.
        global_batch: samples of a step over all ranks.
        window: samples per shuffle window of a canonical stream.
        image: picture size and training crop.
        tokenize: list of n texts -> int64 [n, context]; picklable (not a bound method of a model), and not defined in
            the script that runs. None leaves `Batch.texts` None.
        target: `caption` or `label`.
        workers: loader processes; 0 builds batches in this process.
        max_bad_ratio: see `check_bad_ratio`.
        quarantine: JSON-lines file that bad samples are appended to.

    Raises:
        UserError: a batch that does not fit the corpus or the world size, or a corpus whose first sample has no image,
            caption or label.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        global_batch: int,
        window: int,
        image: ImageSettings,
        tokenize: Tokenize | None = None,
        target: Target = "caption",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_bad_ratio: float = 0.01,
        quarantine: str | Path | None = None,
    ):
        if target not in get_args(Target):
            raise UsageError("unknown target", got=target, expected=" or ".join(get_args(Target)))
        self.corpus, self.global_batch, self.workers, self.max_bad_ratio = corpus, global_batch, workers, max_bad_ratio
        self.order = Order(corpus.counts, seed, canonical_streams(global_batch), window)
        self.steps_per_epoch = self.order.steps_per_epoch(global_batch)
        check_world_size(global_batch, world_size)
        check_first_sample(corpus, target)
        self._build = BatchBuilder(
            ShardReader(corpus), self.order, ImageTransform(image), tokenize, target, global_batch, rank, world_size
        )
        self._account = BadSampleAccount()
        self._quarantine = Quarantine(quarantine) if quarantine else None
        self._source: BatchIterator | None = None

    @property
    def dropped(self) -> int:
        """Samples of the corpus that an epoch leaves out; which ones changes with the epoch."""
        return self.order.dropped(self.global_batch)

    @property
    def read_total(self) -> int:
        """Samples that this rank was given."""
        return self._account.read_total

    @property
    def bad_total(self) -> int:
        """Bad samples that were replaced among them."""
        return self._account.bad_total

    def iterate(self, first_step: int = 0) -> Iterator[Batch]:
        """Batches from global step `first_step` (from 0) on, endlessly over epochs. Loading begins at the call.

        Abandoning the iterator is fine; `close` ends the workers at a known time. One iterator at a time is open: a new
        call closes the one before.
        """
        self.close()
        pin = torch.cuda.is_available()
        self._source = BatchIterator(self._build, count(first_step), self.workers, pin_memory=pin)
        return self._accounted(self._source)

    def _accounted(self, source: BatchIterator) -> Iterator[Batch]:
        with source:
            for batch in source:
                self._account.add(len(batch.keys), batch.bad)
                if self._quarantine:
                    self._quarantine.write(batch.step, batch.epoch, batch.bad)
                yield batch

    def position(self, step: int) -> Position:
        """The data state after `step` optimizer steps."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return Position(
            manifest_digest=self.corpus.digest,
            seed=self.order.seed,
            streams=self.order.streams,
            window=self.order.window,
            epoch=epoch,
            samples_in_epoch=step_in_epoch * self.global_batch,
            samples_seen=step * self.global_batch,
        )

    def check_bad_ratio(self, bad: int | None = None, read: int | None = None) -> None:
        """Raises UserError, naming this rank's worst shards, above `max_bad_ratio`.

        Give the counts summed over the ranks, so that all judge alike; by default they are this rank's.
        """
        bad, read = self.bad_total if bad is None else bad, self.read_total if read is None else read
        floor = min(MIN_READS, self.order.samples_per_epoch(self.global_batch))
        check_bad_ratio(bad, read, self.max_bad_ratio, self._account.by_shard, floor)

    def close(self) -> None:
        """End the workers and close the shards."""
        if self._source is not None:
            self._source.close()
        self._source = None
        self._build.reader.close()

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_first_sample(corpus: Corpus, target: Target | None) -> None:
    """Raises UserError, with the members that there are, where the first sample lacks an image or the target.

    The corpus is then of another kind, and substitutes would only hide it.
    """
    with ShardReader(corpus) as reader:
        try:
            sample = read_sample(reader, 0, 0)
        except BadSampleError:
            return
    missing = missing_member(sample, target)
    if missing:
        raise UserError(
            f"sample {sample.key} of {corpus.paths[0]} has no {missing}",
            got=f"members {', '.join(sample.members)}",
            remedy="pack the corpus with `python -m data_tools pack`, or rename the members",
        )
