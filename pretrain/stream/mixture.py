"""Which samples make up global batch t: a pure function of the sources, their weights, the global batch and t.

Every source has an order of its own (order.py) and gives each global batch a quota. No random number decides a quota:
it is the largest-remainder share of what the source is owed, and what rounding leaves is carried to the next step.
World size occurs only in the last line, where a rank takes its contiguous slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_tools.errors import UserError
from pretrain.config.batch import check_world_size
from pretrain.stream.order import Order
from pretrain.stream.position import Anchor

PERIOD = 1024  # steps after which quotas repeat: realised shares are exact to 1 / (PERIOD * global batch)


class Slots(NamedTuple):
    """The places of a batch's samples, int64 [b] each; see `Place`."""

    sources: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    indices: np.ndarray


class Place(NamedTuple):
    """One sample of a batch: source, epoch of that source, shard within the source, index in the shard."""

    source: int
    epoch: int
    shard: int
    index: int


class Quotas:
    """Samples of each source in every step.

    Args:
        weights: positive, of any sum.
        global_batch: the sum of a step's quotas.
    """

    def __init__(self, weights: Sequence[float], global_batch: int):
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        taken = np.zeros((PERIOD + 1, len(shares)), dtype=np.int64)
        steps = PERIOD if len(shares) > 1 else 0
        for step in range(steps):
            owed = shares * global_batch * (step + 1) - taken[step]
            taken[step + 1] = taken[step] + largest_remainders(owed, global_batch)
        if len(shares) == 1:
            taken[:, 0] = np.arange(PERIOD + 1) * global_batch
        self._taken = taken

    def before(self, step: int) -> np.ndarray:
        """Samples that each source gave in steps 0 .. step - 1, int64 [sources]."""
        periods, rest = divmod(step, PERIOD)
        return periods * self._taken[PERIOD] + self._taken[rest]


def largest_remainders(owed: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers >= 0 of sum `total`: each of `owed` rounded down, the largest remainders up; int64, its shape.

    `owed` sums to `total`; entries below 0 (given too much before) count as 0.
    """
    quotas = np.maximum(np.floor(owed), 0).astype(np.int64)
    missing = total - int(quotas.sum())
    ranked = np.argsort(quotas - owed, kind="stable")  # the largest remainder first
    if missing >= 0:
        quotas[ranked[:missing]] += 1
        return quotas
    holders = [source for source in ranked[::-1] if quotas[source] > 0]
    quotas[holders[:-missing]] -= 1
    return quotas


class Mixture:
    """The samples of every global batch; costs O(shards) per epoch and O(window) per window, as its orders do.

    Args:
        orders: one per source.
        weights: share of each source in a global batch, of any sum. One source: its epochs end with a whole batch and
            its tail is dropped. Several: each goes through epochs of its own, whose ends batches may cross.
        epoch_samples: samples that the run's epochs are counted in, where there are several sources.
        anchor: where the run stood when it last changed its global batch, or its start.

    Raises:
        UserError: C does not divide the global batch, or a source is smaller than its part of it.
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[float], global_batch: int, epoch_samples: int, anchor: Anchor
    ):
        self.orders, self.weights, self.global_batch, self.anchor = tuple(orders), tuple(weights), global_batch, anchor
        self._epoch_samples = epoch_samples
        self._quotas = Quotas(weights, global_batch)
        self._check()

    def __reduce__(self) -> tuple:
        return Mixture, (self.orders, self.weights, self.global_batch, self._epoch_samples, self.anchor)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch, the same on every rank."""
        return (self._epoch_samples if len(self.orders) > 1 else self.orders[0].length) // self.global_batch

    @property
    def dropped(self) -> int:
        """Samples of all sources that an epoch leaves out; which ones changes with the epoch."""
        if len(self.orders) > 1:
            return sum(order.num_samples - order.length for order in self.orders)
        return self.orders[0].num_samples - self.steps_per_epoch * self.global_batch

    def batch(self, step: int, world_size: int = 1, rank: int = 0) -> Slots:
        """Rank `rank`'s slice of global batch `step`, global_batch / world_size samples.

        The sources lie evenly spread in the global batch, so that all ranks hold their share of each; within a source
        the samples are in order of its streams, so that a rank reads few shards.
        """
        check_world_size(self.global_batch, world_size)
        quotas = self._quotas.before(step + 1) - self._quotas.before(step)
        sources = np.repeat(np.arange(len(quotas)), quotas)
        places = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        share = self.global_batch // world_size
        mine = np.argsort(places, kind="stable")[rank * share : (rank + 1) * share]
        slots = Slots(sources[mine], *(np.empty(share, dtype=np.int64) for _ in range(3)))
        for source in np.unique(slots.sources).tolist():
            at = np.flatnonzero(slots.sources == source)
            start = int(mine[at[0]] - quotas[:source].sum())
            part = self._take(source, step, int(quotas[source]), start, start + len(at))
            slots.epochs[at], slots.shards[at], slots.indices[at] = part
        return slots

    def anchor_at(self, step: int) -> Anchor:
        """Where the run stands after `step` steps, from which it can go on with another global batch."""
        return Anchor(step, self.samples_seen(step), tuple(self._place(source, step) for source in self._all))

    def samples_seen(self, step: int) -> int:
        """Global samples consumed in `step` steps since the start of the run."""
        return self.anchor.samples_seen + (step - self.anchor.step) * self.global_batch

    def epochs_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        if len(self.orders) > 1:
            return self.samples_seen(step) / self._epoch_samples
        epoch, offset = self._place(0, step)
        return epoch + offset / (self.steps_per_epoch * self.global_batch)

    def step_at(self, epochs: float) -> int:
        """Steps of the run after which `epochs` epochs are done, rounded up."""
        if len(self.orders) > 1:
            return self.step_at_samples(epochs * self._epoch_samples)
        epoch, offset = self.anchor.sources[0]
        ahead = int(epochs) - epoch - 1  # whole epochs between the end of the anchor's and the wanted one
        steps = self._rest_of_epoch() if ahead >= 0 else self.steps_per_epoch - offset // self.global_batch
        part = _ceil(epochs % 1 * self.steps_per_epoch)
        return self.anchor.step + max(0, steps + ahead * self.steps_per_epoch + part)

    def step_at_samples(self, samples: float) -> int:
        """Steps of the run after which `samples` global samples are consumed, rounded up."""
        return self.anchor.step + max(0, _ceil((samples - self.anchor.samples_seen) / self.global_batch))

    def shares(self, step: int) -> np.ndarray:
        """Realised share of each source in the samples of steps 0 .. step - 1 at this global batch, float [sources]."""
        taken = self._quotas.before(max(step, 1))
        return taken / taken.sum()

    @property
    def _all(self) -> range:
        return range(len(self.orders))

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

    def _place(self, source: int, step: int) -> tuple[int, int]:
        """(epoch, samples consumed of it) of a source after `step` steps."""
        epoch, offset = self.anchor.sources[source]
        if step < self.anchor.step:
            raise IndexError(f"step {step} before step {self.anchor.step}, from which this run goes on")
        if len(self.orders) > 1:
            taken = int((self._quotas.before(step) - self._quotas.before(self.anchor.step))[source])
            epochs, rest = divmod(offset + taken, self.orders[source].length)
            return epoch + epochs, rest
        steps = step - self.anchor.step
        if steps < self._rest_of_epoch():
            return epoch, offset + steps * self.global_batch
        epochs, rest = divmod(steps - self._rest_of_epoch(), self.steps_per_epoch)
        return epoch + 1 + epochs, rest * self.global_batch

    def _rest_of_epoch(self) -> int:
        """Whole batches left, at the anchor, in the epoch of a single source."""
        return (self.orders[0].length - self.anchor.sources[0][1]) // self.global_batch

    def _check(self) -> None:
        streams = max(order.streams for order in self.orders)
        if self.global_batch < 1 or self.global_batch % streams:
            raise UserError(
                "the global batch does not fit the canonical streams",
                got=self.global_batch,
                expected=f"a multiple of {streams}",
                remedy="set a multiple, or start a new run",
            )
        for number, order in enumerate(self.orders):
            need = _ceil(self.global_batch * self.weights[number] / sum(self.weights))
            if order.length < need:
                which = "the corpus" if len(self.orders) == 1 else f"source {number}"
                raise UserError(
                    f"the global batch is larger than {which}"
                    if len(self.orders) == 1
                    else f"{which} is smaller than its part of a global batch, which would hold samples twice",
                    got=f"a global batch of {self.global_batch} and {order.num_samples} samples",
                    expected=f"at most {order.num_samples}" if len(self.orders) == 1 else f"{need} samples or more",
                    remedy="lower the global batch or pack more samples",
                )


def _ceil(number: float) -> int:
    """Rounded up, but for what floating point adds to a whole number."""
    return int(np.ceil(round(number, 6)))
