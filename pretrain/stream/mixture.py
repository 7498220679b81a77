"""Which samples make up global batch t: a pure function of the sources, their weights, the global batch and t.

Every source has an order of its own (order.py) and gives each global batch a quota (quotas.py). World size occurs only
where a rank takes its contiguous slice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_tools.errors import UserError
from pretrain.config.batch import check_world_size
from pretrain.stream.order import Order
from pretrain.stream.position import ResumePoint
from pretrain.stream.quotas import Quotas

_REMEDY = "lower the global batch or pack more samples"


class Places(NamedTuple):
    """The places of a batch's samples, int64 [b] each; see `Place`."""

    sources: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    indices: np.ndarray


class Place(NamedTuple):
    """One sample of a batch: source, epoch of that source, shard within the source, number in the shard."""

    source: int
    epoch: int
    shard: int
    number: int


class Mixture(ABC):
    """The samples of every global batch of one source (`Alone`) or of several (`Mixed`), and where epochs end.

    It costs O(shards) per epoch and O(window) per window, as its orders do.

    Args:
        orders: one per source.
        weights: share of each source in a global batch, of any sum.
        anchor: where the run stood when it last changed its global batch, or its start.

    Raises:
        UserError: C does not divide the global batch, or a source is smaller than its part of it.
    """

    steps_per_epoch: int  # whole global batches, the same on every rank
    dropped: int  # samples of all sources that an epoch leaves out; which ones changes with the epoch

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], global_batch: int, anchor: ResumePoint):
        self.orders, self.weights, self.global_batch, self.anchor = tuple(orders), tuple(weights), global_batch, anchor
        streams = max(order.streams for order in self.orders)
        if global_batch < 1 or global_batch % streams:
            raise UserError(
                "the global batch does not fit the canonical streams",
                got=global_batch,
                expected=f"a multiple of {streams}",
                remedy="set a multiple, or start a new run",
            )

    @abstractmethod
    def epochs_at(self, step: int) -> float:
        """Epochs done after `step` steps."""

    @abstractmethod
    def step_at(self, epochs: float) -> int:
        """Steps of the run after which `epochs` epochs are done, rounded up."""

    @abstractmethod
    def _taken(self, step: int) -> np.ndarray:
        """Samples that each source gives in steps 0 .. step - 1 at this global batch, int64 [sources]."""

    @abstractmethod
    def _reached(self, source: int, step: int) -> tuple[int, int]:
        """What `_place` gives of a step that is not before the anchor's."""

    def batch(self, step: int, world_size: int = 1, rank: int = 0) -> Places:
        """Rank `rank`'s slice of global batch `step`, global_batch / world_size samples.

        The sources lie evenly spread in the global batch, so that all ranks hold their share of each; within a source
        the samples are in order of its streams, so that a rank reads few shards.
        """
        check_world_size(self.global_batch, world_size)
        quotas = self._taken(step + 1) - self._taken(step)
        sources = np.repeat(np.arange(len(quotas)), quotas)
        places = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        share = self.global_batch // world_size
        mine = np.argsort(places, kind="stable")[rank * share : (rank + 1) * share]
        slots = Places(sources[mine], *(np.empty(share, dtype=np.int64) for _ in range(3)))
        for source in np.unique(slots.sources).tolist():
            at = np.flatnonzero(slots.sources == source)
            start = int(mine[at[0]] - quotas[:source].sum())
            part = self._take(source, step, int(quotas[source]), start, start + len(at))
            slots.epochs[at], slots.shards[at], slots.indices[at] = part
        return slots

    def anchor_at(self, step: int) -> ResumePoint:
        """Where the run stands after `step` steps, from which it can go on with another global batch."""
        places = tuple(self._place(source, step) for source in range(len(self.orders)))
        return ResumePoint(step, self.samples_seen(step), places)

    def samples_seen(self, step: int) -> int:
        """Global samples consumed in `step` steps since the start of the run."""
        return self.anchor.samples_seen + (step - self.anchor.step) * self.global_batch

    def step_at_samples(self, samples: float) -> int:
        """Steps of the run after which `samples` global samples are consumed, rounded up."""
        return self.anchor.step + max(0, _ceil((samples - self.anchor.samples_seen) / self.global_batch))

    def shares(self, step: int) -> np.ndarray:
        """Realised share of each source in the samples of steps 0 .. step - 1 at this global batch, float [sources]."""
        taken = self._taken(max(step, 1))
        return taken / taken.sum()

    def _place(self, source: int, step: int) -> tuple[int, int]:
        """(epoch, samples consumed of it) of a source after `step` steps."""
        if step < self.anchor.step:
            raise IndexError(f"step {step} before step {self.anchor.step}, from which this run goes on")
        return self._reached(source, step)

    def _take(self, source: int, step: int, quota: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """(epochs, shards, indices) of samples start .. stop of a source's quota in `step`."""
        order = self.orders[source]
        epoch, first = self._place(source, step)
        parts, done = [], 0
        while done < quota:  # a quota may cross the end of its source's epoch
            count = min(quota - done, order.length - first)
            inside = max(start - done, 0), max(min(stop - done, count), 0)
            if inside[0] < inside[1]:
                shards, indices = order.take(epoch, first, count, *inside)
                parts.append((np.full(len(shards), epoch), shards, indices))
            epoch, first, done = epoch + 1, 0, done + count
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


class Alone(Mixture):
    """A single source: an epoch ends with a whole batch, and its tail is dropped."""

    def __init__(self, order: Order, global_batch: int, anchor: ResumePoint):
        super().__init__([order], [1.0], global_batch, anchor)
        if order.length < global_batch:
            raise UserError(
                "the global batch is larger than the corpus",
                got=f"a global batch of {global_batch} and {order.num_samples} samples",
                expected=f"at most {order.num_samples}",
                remedy=_REMEDY,
            )
        self.steps_per_epoch = order.length // global_batch
        self.dropped = order.num_samples - self.steps_per_epoch * global_batch
        self._epoch, self._consumed = anchor.sources[0]
        self._rest_of_epoch = (order.length - self._consumed) // global_batch  # whole batches left at the anchor

    def __reduce__(self) -> tuple:
        return Alone, (self.orders[0], self.global_batch, self.anchor)

    def epochs_at(self, step: int) -> float:
        """See `Mixture`."""
        epoch, offset = self._place(0, step)
        return epoch + offset / (self.steps_per_epoch * self.global_batch)

    def step_at(self, epochs: float) -> int:
        """See `Mixture`."""
        ahead = int(epochs) - self._epoch - 1  # whole epochs between the end of the anchor's and the wanted one
        steps = self._rest_of_epoch if ahead >= 0 else self.steps_per_epoch - self._consumed // self.global_batch
        part = _ceil(epochs % 1 * self.steps_per_epoch)
        return self.anchor.step + max(0, steps + ahead * self.steps_per_epoch + part)

    def _taken(self, step: int) -> np.ndarray:
        return np.array([step * self.global_batch])

    def _reached(self, source: int, step: int) -> tuple[int, int]:
        steps = step - self.anchor.step
        if steps < self._rest_of_epoch:
            return self._epoch, self._consumed + steps * self.global_batch
        epochs, rest = divmod(steps - self._rest_of_epoch, self.steps_per_epoch)
        return self._epoch + 1 + epochs, rest * self.global_batch


class Mixed(Mixture):
    """Several sources: each goes through epochs of its own, whose ends batches may cross; `epoch_samples` global
    samples are what the run calls an epoch."""

    def __init__(
        self,
        orders: Sequence[Order],
        weights: Sequence[float],
        global_batch: int,
        epoch_samples: int,
        anchor: ResumePoint,
    ):
        super().__init__(orders, weights, global_batch, anchor)
        for number, order in enumerate(self.orders):
            need = _ceil(global_batch * weights[number] / sum(weights))
            if order.length < need:
                raise UserError(
                    f"source {number} is smaller than its part of a global batch, which would hold samples twice",
                    got=f"a global batch of {global_batch} and {order.num_samples} samples",
                    expected=f"{need} samples or more",
                    remedy=_REMEDY,
                )
        self.steps_per_epoch = epoch_samples // global_batch
        self.dropped = sum(order.num_samples - order.length for order in self.orders)
        self._epoch_samples = epoch_samples
        self._quotas = Quotas(weights, global_batch)

    def __reduce__(self) -> tuple:
        return Mixed, (self.orders, self.weights, self.global_batch, self._epoch_samples, self.anchor)

    def epochs_at(self, step: int) -> float:
        """See `Mixture`."""
        return self.samples_seen(step) / self._epoch_samples

    def step_at(self, epochs: float) -> int:
        """See `Mixture`."""
        return self.step_at_samples(epochs * self._epoch_samples)

    def _taken(self, step: int) -> np.ndarray:
        return self._quotas.before(step)

    def _reached(self, source: int, step: int) -> tuple[int, int]:
        epoch, consumed = self.anchor.sources[source]
        taken = int((self._taken(step) - self._taken(self.anchor.step))[source])
        epochs, rest = divmod(consumed + taken, self.orders[source].length)
        return epoch + epochs, rest


def _ceil(number: float) -> int:
    """Rounded up, but for what floating point adds to a whole number."""
    return int(np.ceil(round(number, 6)))
