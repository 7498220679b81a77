"""The training stream of one rank: batches from any global step on, the same at any world size and worker count."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path

import torch

from data_tools.corpus import Corpus, ShardReader, join_corpora
from data_tools.errors import UsageError
from data_tools.media.members import DEFAULT_FIELDS, Fields
from pretrain.config.batch import check_world_size
from pretrain.config.durations import parse_duration
from pretrain.config.tree import Phase
from pretrain.stream.bad import BadSample, BadSampleAccount, Quarantine, too_many_bad
from pretrain.stream.batches import Batch, BatchBuilder
from pretrain.stream.fields.field import Field, Inputs
from pretrain.stream.mixture import Alone, Mixed, Mixture
from pretrain.stream.order import Order, canonical_streams
from pretrain.stream.position import Position, ResumePoint
from pretrain.stream.prefetch import NodeShards, Prefetcher
from pretrain.stream.samples import check_first_shard, padding_of
from pretrain.stream.shard_check import ShardCheck
from pretrain.stream.workers import BatchIterator

__all__ = ["BadSample", "Batch", "StreamSettings", "StreamSource", "TrainStream"]

MIN_READS = 1000  # reads (or one epoch, if shorter) over which the ratio of bad samples is judged


@dataclass(frozen=True)
class StreamSource:
    """A source of a mixture: its shards, where its images and captions are and which of several captions a step sees,
    its share of every global batch relative to the other sources', and how often an epoch of the run counts its
    samples."""

    corpus: Corpus
    mapping: Fields = DEFAULT_FIELDS
    choose: str = "random"
    weight: float = 1.0
    repeat: float = 1.0


FieldsOf = Callable[[StreamSource, int], dict[str, Field]]


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What decides a rank's stream beside its sources.

    Args:
        fields: (source, number of the phase) -> what is read of its samples; the number behind the last phase is that
            of the time after it. All sources and phases have the same fields. What is cheap comes first: a sample that
            is bad there costs no more.
        seed: defines, with the corpus, the order, the crops and the choice of captions.
        global_batch: samples of a step over all ranks.
        window: samples per shuffle window of a canonical stream.
        micro_batch: samples that the model sees at a time; None: all of the rank's.
        phases: of the run, with pictures of other sizes.
        workers: loader processes; 0 builds batches in this process.
        max_bad_ratio: share of bad samples above which `too_many_bad` says so.
        quarantine: JSON-lines file that bad samples are appended to.
        node_ranks: the ranks of this node, given to one of them: it fills the shard cache ahead for all. None: readers
            bring remote shards when they need them.
        changed_shards: JSON-lines file of shards whose content is not that of their manifest or index any more; with
            `node_ranks`, each is looked at once. None: none is.
    """

    fields: FieldsOf
    seed: int
    global_batch: int
    window: int
    micro_batch: int | None = None
    phases: Sequence[Phase] = ()
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    max_bad_ratio: float = 0.01
    quarantine: str | Path | None = None
    node_ranks: range | None = None
    changed_shards: str | Path | None = None


class TrainStream:
    """Batches of one rank. Calls no collective; ranks stay in step because every epoch has the same steps on each.

    Args:
        sources: the sources of a mixture, or the shards of a single one.

    Raises:
        UserError: a batch that does not fit the corpus or the world size, or a source whose first shard lacks what the
            fields need.
    """

    def __init__(self, sources: Corpus | Sequence[StreamSource], settings: StreamSettings):
        self.sources = [StreamSource(sources)] if isinstance(sources, Corpus) else list(sources)
        self.settings = settings
        self.corpus = join_corpora([source.corpus for source in self.sources])
        mixture = self._mixture()
        check_world_size(settings.global_batch, settings.world_size)
        fields = tuple(
            tuple(settings.fields(source, phase) for source in self.sources)
            for phase in range(len(settings.phases) + 1)
        )
        for source, own in zip(self.sources, fields[0], strict=True):
            check_first_shard(source.corpus, own)
        self._build = BatchBuilder(
            reader=ShardReader(self.corpus),
            mixture=mixture,
            fields=fields,
            first_shards=tuple(accumulate((len(s.corpus.paths) for s in self.sources[:-1]), initial=0)),
            ends=(),
            micro_batch=settings.micro_batch or settings.global_batch // settings.world_size,
            rank=settings.rank,
            world_size=settings.world_size,
        )
        self.account = BadSampleAccount()
        self._quarantine = Quarantine(settings.quarantine) if settings.quarantine else None
        self._set(mixture)
        self._source: BatchIterator | None = None
        self._prefetcher: Prefetcher | None = None
        self._check: ShardCheck | None = None

    def _set(self, mixture: Mixture) -> None:
        """Go by this order, and by the steps at which the phases end in it."""
        self._build.mixture = mixture
        begun = mixture.anchor.step  # steps of a resumed run in an order of its past, in which no end can be placed
        phases = self.settings.phases
        ends = [max(begun, self.steps_until(phase.until, "model.phases")) for phase in phases]
        ahead = [end for end in ends if end > begun]
        if ends[len(ends) - len(ahead) :] != sorted(set(ahead)):
            raise UsageError(
                "model.phases do not end one after the other",
                got=", ".join(f"{phase.until} (step {end})" for phase, end in zip(phases, ends, strict=True)),
                remedy="put them in order; `until` counts from the start of the run",
            )
        self._build.ends = tuple(ends)

    def _mixture(self, streams: int | None = None, anchor: ResumePoint | None = None) -> Mixture:
        settings = self.settings
        return make_mixture(self.sources, settings.seed, settings.global_batch, settings.window, streams, anchor)

    @property
    def mixture(self) -> Mixture:
        """Which samples each step takes."""
        return self._build.mixture

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch of the run."""
        return self.mixture.steps_per_epoch

    def describe(self) -> list[str]:
        """What the stream reads, a line each."""
        mixture, shards, batch = self.mixture, len(self.corpus.paths), self.settings.global_batch
        lines = [
            f"data:     {self.corpus.num_samples} samples in {shards} shards, digest {self.corpus.digest}",
            f"epoch:    {self.steps_per_epoch} steps of {batch}, {mixture.dropped} samples left out",
        ]
        shares = [source.weight for source in self.sources]
        for number, source in enumerate(self.sources if len(shares) > 1 else ()):
            share = shares[number] / sum(shares)
            lines.append(f"source {number}: {source.corpus.num_samples} samples, {share:.2%} of every global batch")
        for phase, end, fields in zip(self.settings.phases, self._build.ends, self._build.fields, strict=False):
            dropped = "" if phase.patch_dropout is None else f", {phase.patch_dropout:.0%} of the patches left out"
            size = fields[0]["image"].rows(0)["pixels"].shape[-1]
            lines.append(f"phase:    images of {size} px{dropped}, until step {end}")
        lines += [f"damaged:  {shard}; what it lost is replaced and counted" for shard in self.corpus.damaged]
        return lines

    def rows(self, n: int) -> Inputs:
        """What the model gets of n samples, in an empty form: what stands behind the last phase."""
        return padding_of(self._build.fields[-1][0], n)

    def steps_until(self, duration: str, where: str) -> int:
        """Steps of the run, from its start, after which it has lasted so long; `rules.ENDLESS` for `forever`."""
        number, unit = parse_duration(duration, where)
        if unit == "epochs":
            return self.mixture.step_at(float(number))
        if unit == "samples":
            return self.mixture.step_at_samples(float(number))
        return math.ceil(number)

    def go_on_from(self, position: Position) -> None:
        """Continue a run from its saved position, at this world size and global batch; call it before `iterate`.

        Raises:
            UserError: other shards, seed or window, or a global batch that C does not divide.
        """
        position.check_resumable(self.position(0))
        self._set(self._mixture(position.streams, position.anchor))

    def iterate(self, first_step: int = 0) -> Iterator[Batch]:
        """Batches from global step `first_step` (from 0) on, endlessly over epochs. Loading begins at the call.

        Abandoning the iterator is fine; `close` ends the workers at a known time. One iterator at a time is open: a new
        call closes the one before.
        """
        self.close()
        self.account = BadSampleAccount()
        pin = torch.cuda.is_available()
        self._source = BatchIterator(self._build, count(first_step), self.settings.workers, pin_memory=pin)
        if self.settings.node_ranks is not None:
            self._look_ahead(self.settings.node_ranks, first_step)
        return self._accounted(self._source)

    def _look_ahead(self, ranks: range, first_step: int) -> None:
        """Start what goes through the coming steps once for the node."""
        needed = NodeShards(self.mixture, self._build.first_shards, self._build.world_size, ranks)
        if self.corpus.cache is not None:
            self._prefetcher = Prefetcher(self.corpus, self.corpus.cache, needed, first_step)
        journal = self.settings.changed_shards
        if journal is not None:
            self._check = ShardCheck(self.corpus, needed, first_step, self.settings.max_bad_ratio, journal)

    def _accounted(self, source: BatchIterator) -> Iterator[Batch]:
        with source:
            for batch in source:
                self.account.add(batch.step, len(batch.keys), batch.bad)
                if self._quarantine:
                    self._quarantine.write(batch.step, batch.epoch, batch.bad)
                if self._prefetcher:
                    self._prefetcher.advance(batch.step)
                if self._check:
                    self._check.advance(batch.step)
                yield batch

    def check_writes(self) -> None:
        """Raises OSError where bad samples or changed shards could not be written down."""
        for journal in (self._quarantine, self._check):
            if journal is not None and journal.fault is not None:
                raise journal.fault

    def position(self, step: int) -> Position:
        """The data state after `step` optimizer steps."""
        return Position(
            manifest_digest=self.corpus.digest,
            seed=self.settings.seed,
            streams=max(order.streams for order in self.mixture.orders),
            window=self.settings.window,
            **self.mixture.anchor_at(step)._asdict(),
        )

    def too_many_bad(self, bad: int, read: int) -> bool:
        """Whether more than `max_bad_ratio` of `read` samples, summed over the ranks, are bad."""
        least = min(MIN_READS, self.steps_per_epoch * self.settings.global_batch)
        return too_many_bad(bad, read, self.settings.max_bad_ratio, least)

    def close(self) -> None:
        """End the workers and close the shards."""
        if self._source is not None:
            self._source.close()
        self._source = None
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = None
        if self._check is not None:
            self._check.close()
        self._check = None
        self._build.reader.close()

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def make_mixture(
    sources: Sequence[StreamSource],
    seed: int,
    global_batch: int,
    window: int,
    streams: int | None = None,
    anchor: ResumePoint | None = None,
) -> Mixture:
    """The order of a run over `sources`, from its start or from where it stands, with the C that it began with."""
    streams = streams or canonical_streams(global_batch)
    start = anchor or ResumePoint(0, 0, ((0, 0),) * len(sources))
    if len(sources) == 1:
        return Alone(Order(sources[0].corpus.counts, seed, streams, window), global_batch, start)
    orders = [
        Order(counts, seed, source_streams(int(counts.sum()), streams), window)
        for counts in (source.corpus.counts for source in sources)
    ]
    samples = round(sum(source.repeat * source.corpus.num_samples for source in sources))
    return Mixed(orders, [source.weight for source in sources], global_batch, samples, start)


def source_streams(num_samples: int, streams: int) -> int:
    """C of a source in a mixture: one stream where leaving out up to C - 1 samples of an epoch would be much of it."""
    return streams if num_samples >= streams * streams else 1
