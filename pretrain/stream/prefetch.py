"""Remote shards ahead of their use: one process of a node walks the coming steps and fills the shard cache.

It is a convenience: readers bring by themselves what is not there, so a run outlives it.
"""

import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_tools.corpus import Corpus
from data_tools.errors import UserError, shown
from data_tools.remote.cache import Cache
from data_tools.remote.settings import CacheSettings, Shard
from data_tools.remote.space import CacheFullError
from pretrain.stream.mixture import Mixture
from pretrain.stream.workers import close_at_exit, start_process

ShardsOfStep = Callable[[int], Iterable[int]]

PARALLEL = 4  # shards on their way at a time, each by several connections
MAX_STEPS = 512  # how far ahead it looks at most
_STEPS_PER_LOOK = 32  # so that the first shards are asked for before all steps are known
_SHARE = 0.9  # of the cache's bytes that are filled ahead; the rest is for indexes and for what readers bring
_POLL = 0.2
_TOUCH_EVERY = 5.0
_FORGIVE_AFTER = 30.0  # seconds before a shard that could not be brought is tried again

_GIB = 1 << 30


@dataclass(frozen=True)
class NodeShards:
    """Step -> the shards that `ranks`, those of one node, need in it; `first_shards`: where each source's begin."""

    mixture: Mixture
    first_shards: tuple[int, ...]
    world_size: int
    ranks: range

    def __call__(self, step: int) -> list[int]:
        """Distinct shard numbers, ascending."""
        slots = [self.mixture.batch(step, self.world_size, rank) for rank in self.ranks]
        shards = [np.array(self.first_shards)[slot.sources] + slot.shards for slot in slots]
        return np.unique(np.concatenate(shards)).tolist()


class Prefetcher:
    """Fills the cache from `first_step` on, in a process that ends with `close()` or with this one.

    Args:
        corpus: the shards; local ones are passed over.
        cache: where the remote ones are kept.
        shards_of_step: step -> the distinct shards that this node needs in it; picklable.
        first_step: the step that is read first.

    Raises:
        UserError: the shards of a single step do not fit the cache.
    """

    def __init__(self, corpus: Corpus, cache: CacheSettings, shards_of_step: ShardsOfStep, first_step: int):
        _check_fits(corpus, cache, shards_of_step(first_step))
        self._step = multiprocessing.get_context("forkserver").RawValue("q", first_step)
        self.process = start_process(_prefetch, corpus, cache, shards_of_step, self._step)
        close_at_exit(self)

    def advance(self, step: int) -> None:
        """The batch of `step` was delivered: nothing before the next one is needed."""
        self._step.value = step + 1

    def close(self) -> None:
        """End the process. It may be in the midst of a shard: the cache is made for that. Can be called again."""
        self.process.kill()
        self.process.join()


def _check_fits(corpus: Corpus, cache: CacheSettings, shards: Iterable[int]) -> None:
    needed = sum(corpus.tar_bytes[shard] for shard in set(shards) if corpus.remote(shard))
    if needed > cache.limit:
        raise UserError(
            "the shard cache does not hold the shards of one step",
            got=f"data.cache_gib of {cache.limit / _GIB:.3g}",
            expected=f"at least {needed / _GIB:.3g}, better several times as much",
            remedy="raise data.cache_gib, or pack smaller shards",
        )


class _Walk:
    """The shards that the coming steps need, soonest first, as many as fit."""

    def __init__(self, corpus: Corpus, budget: float, shards_of_step: ShardsOfStep, first_step: int):
        self._corpus, self._budget, self._shards_of_step = corpus, budget, shards_of_step
        self._steps: deque[tuple[int, ...]] = deque()
        self._first = first_step
        self._full = False
        self.shards: dict[int, Shard] = {}

    def move(self, step: int) -> bool:
        """Look ahead from `step` on; whether `shards` may have changed."""
        moved = self._first < step
        while self._first < step:
            self._first += 1
            if self._steps:
                self._steps.popleft()
        if moved:
            self._choose()
        if self._full or len(self._steps) >= MAX_STEPS:
            return moved
        for _ in range(min(_STEPS_PER_LOOK, MAX_STEPS - len(self._steps))):
            self._steps.append(tuple(self._shards_of_step(self._first + len(self._steps))))
        self._choose()
        return True

    def _choose(self) -> None:
        chosen: dict[int, Shard] = {}
        size, self._full = 0, False
        for number in dict.fromkeys(number for step in self._steps for number in step):
            shard = self._corpus.remote(number)
            if shard is None:
                continue
            size += shard.size
            if size > self._budget:
                self._full = True
                break
            chosen[number] = shard
        self.shards = chosen


class _Fetches:
    """The shards that are on their way."""

    def __init__(self, cache: Cache):
        self._cache = cache
        self._pool = ThreadPoolExecutor(PARALLEL)
        self._coming: dict[int, Future] = {}
        self._not_before: dict[int, float] = {}
        self._touched = 0.0

    def start(self, shards: dict[int, Shard]) -> None:
        """Ask for the first of `shards` that are not there, as far as the others leave room for them."""
        for number in [number for number, future in self._coming.items() if future.done()]:
            self._not_before[number] = time.monotonic() + _pause(self._coming.pop(number))
        keep = frozenset(shard.key for shard in shards.values())
        for number, shard in shards.items():
            if len(self._coming) >= PARALLEL:
                return
            due = self._not_before.get(number, 0.0) < time.monotonic()
            if due and number not in self._coming and not self._cache.holds(shard):
                self._coming[number] = self._pool.submit(self._cache.prefetch, shard, keep)

    def touch(self, shards: dict[int, Shard]) -> None:
        """Where a reader makes room, what is needed last goes first."""
        if time.monotonic() - self._touched > _TOUCH_EVERY:
            self._touched = time.monotonic()
            for shard in reversed(shards.values()):
                self._cache.touch(shard)


def _prefetch(corpus: Corpus, settings: CacheSettings, shards_of_step: ShardsOfStep, step) -> None:
    """The process: it never ends by itself."""
    walk = _Walk(corpus, _SHARE * settings.limit, shards_of_step, step.value)
    fetches = _Fetches(Cache(settings))
    while True:
        changed = walk.move(step.value)
        fetches.start(walk.shards)
        if changed:
            fetches.touch(walk.shards)
        else:
            time.sleep(_POLL)


def _pause(future: Future) -> float:
    """Seconds before the same shard may be asked for again; a fault is told, once each time."""
    error = future.exception()
    if error is None:
        return 0.0
    if isinstance(error, CacheFullError):  # readers hold what it should replace
        return _POLL
    text = str(error) if isinstance(error, UserError) else shown(repr(error))
    print(f"prefetch: {text}", file=sys.stderr, flush=True)
    return _FORGIVE_AFTER
