"""Building a training batch, in the loader processes: order -> read -> fields -> tensors."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from data_tools.corpus import ShardReader
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from pretrain.stream.bad import BadSample
from pretrain.stream.draw import Draw
from pretrain.stream.fields.field import Field, Inputs
from pretrain.stream.mixture import Mixture, Place, Places
from pretrain.stream.samples import Samples, modules_of, padding_of, pinned, read_sample, refuse_foreign_shard

SUBSTITUTE_ATTEMPTS = 64
_TELLING = 16  # samples of a shard that tell of its kind where none is as expected; fewer are just bad


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch; b = global batch / world size.

    `captions` are the texts before tokenisation, without the words that were dropped; [] where no text is read.
    """

    step: int  # global step, from 0
    epoch: int  # of the run
    phase: int  # number of model.phases it belongs to; after the last, how many there are
    slots: Places  # where each sample lies, substitutes included; an epoch and an id seed what is random about a sample
    inputs: Inputs  # rows of each field, see `fields`; `micro_batches` cuts them
    ids: np.ndarray  # uint64 [b]
    keys: list[str]
    captions: list[str]
    identity: dict[str, torch.Tensor]  # of each field int64 [b], equal where two samples have the same in it
    bad: list[BadSample] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory; the loader calls it."""
        inputs = {name: pinned(rows) for name, rows in self.inputs.items()}
        return replace(self, inputs=inputs, identity=pinned(self.identity))


class _Taken(NamedTuple):
    place: Place
    id: int
    key: str


@dataclass
class BatchBuilder:
    """Builds rank `rank`'s batch of any global step: a function of (corpus, settings, step) alone.

    `reader` reads the joined shards of all sources; `first_shards` [sources] is where each source's begin; `fields`
    [phases + 1][sources] are those of the run's phases, which end at the steps `ends` [phases]; `micro_batch` is how
    many samples the model sees at a time.
    """

    reader: ShardReader
    mixture: Mixture
    fields: tuple[tuple[Mapping[str, Field], ...], ...]
    first_shards: tuple[int, ...]
    ends: tuple[int, ...]
    micro_batch: int
    rank: int
    world_size: int
    _checked: set[int] = field(default_factory=set)  # shards known to hold what their source's fields need
    _padding: dict[int, Inputs] = field(default_factory=dict)  # by phase

    @property
    def modules(self) -> list[str]:
        """What the fork server imports for it."""
        return modules_of(self.fields[0][0])

    def __call__(self, step: int) -> Batch:
        """Raises UserError for a shard that is gone or changed, for one without a single sample of the expected kind,
        and where no substitute of a bad sample can be read."""
        slots = self.mixture.batch(step, self.world_size, self.rank)
        phase = bisect_right(self.ends, step)
        fields = self.fields[phase]
        if phase not in self._padding:
            self._padding[phase] = padding_of(fields[0])
        samples = Samples(fields[0], len(slots.shards), self._padding[phase])
        rows: list[_Taken] = []
        bad: list[BadSample] = []
        with _one_thread():
            for row, slot in enumerate(zip(*(column.tolist() for column in slots), strict=True)):
                place = Place(*slot)
                try:
                    rows.append(self._load(place, row, samples, fields))
                except BadSampleError as error:
                    bad.append(BadSample.of(error, self._path(place), place.number))
                    rows.append(self._load_substitute(place, row, samples, fields))
        inputs, identity = samples.finish(self.micro_batch)
        return Batch(
            step=step,
            epoch=int(self.mixture.epochs_at(step)),
            phase=phase,
            slots=Places(*np.array([row.place for row in rows]).T),
            inputs=inputs,
            ids=np.array([row.id for row in rows], dtype=np.uint64),
            keys=[row.key for row in rows],
            captions=[text for texts in samples.texts("text") for text in texts] if "text" in inputs else [],
            identity=identity,
            bad=bad,
        )

    def shard(self, place: Place) -> int:
        """The number of a place's shard in the joined corpus."""
        return self.first_shards[place.source] + place.shard

    def _load(self, place: Place, row: int, samples: Samples, fields: tuple[Mapping[str, Field], ...]) -> _Taken:
        """Fills a row of `samples`. Raises BadSampleError, its `key` set once the sample was read."""
        shard, own = self.shard(place), fields[place.source]
        sample = read_sample(self.reader, shard, place.number)
        if shard not in self._checked and self.reader.corpus.counts[shard] >= _TELLING:
            refuse_foreign_shard(self.reader, shard, sample, own)
            self._checked.add(shard)
        samples.put(row, sample, own, Draw(self.mixture.orders[place.source].seed, place.epoch, sample.id))
        return _Taken(place, sample.id, sample.key)

    def _load_substitute(
        self, place: Place, row: int, samples: Samples, fields: tuple[Mapping[str, Field], ...]
    ) -> _Taken:
        order, reason = self.mixture.orders[place.source], ""
        for attempt in range(SUBSTITUTE_ATTEMPTS):
            shard, number = order.substitute(place.epoch, place.shard, place.number, attempt)
            try:
                return self._load(place._replace(shard=shard, number=number), row, samples, fields)
            except BadSampleError as error:
                reason = error.reason
        raise UserError(
            f"no readable sample found in place of sample {place.number} of {self._path(place)}",
            got=f"{SUBSTITUTE_ATTEMPTS} bad ones, the last: {reason}",
            remedy="run `python -m data_tools verify` on the shards",
        )

    def _path(self, place: Place) -> str:
        return self.reader.corpus.paths[self.shard(place)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One picture is too little work for several threads; in a loader process there is one anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
