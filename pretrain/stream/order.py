"""The order of one source's samples: a pure function of (sample counts, seed, epoch, place).

World size, workers, ranks and the global batch do not occur in it. Shards are permuted and their samples seen as one
ring; from a random start it is cut into C canonical streams of equal length (cuts fall inside shards), and each stream
is permuted in windows that are built when first needed. The sequence of an epoch takes one sample of each stream in
turn, so any run of it can be a batch. The start makes each epoch drop and group other samples, even of a single shard.
Fixed canonical streams are MosaicML Streaming's idea; the lazy windows keep start-up independent of the corpus size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_tools.errors import UserError
from pretrain.stream.draw import Draw, Purpose

MAX_STREAMS = 64
ATTEMPTS_IN_WINDOW = 16
_SHARD_TAG, _WINDOW_TAG, _START_TAG = 0, 1, 2
_NOTHING_BUILT = (-1, -1)


def canonical_streams(global_batch: int) -> int:
    """C, the number of canonical streams: it divides the global batch and is kept in the state of a run."""
    return math.gcd(global_batch, MAX_STREAMS)


def shuffled(n: int, seed: int, epoch: int, tag: int, a: int = 0, b: int = 0) -> np.ndarray:
    """A permutation of range(n), int64 [n]: the stable argsort of n raw Philox words.

    Frozen: raw words never change between numpy versions, `Generator.permutation` may. The unstable sort is five times
    as fast, and equals the stable one unless two words are equal.
    """
    bits = _random_words(n, seed, epoch, tag, a, b)
    order = np.argsort(bits)
    ordered = bits[order]
    if n > 1 and (ordered[1:] == ordered[:-1]).any():
        order = np.argsort(bits, kind="stable")
    return order


def _random_words(n: int, seed: int, epoch: int, tag: int, a: int = 0, b: int = 0) -> np.ndarray:
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, tag, a, b], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


@dataclass(frozen=True)
class _Line:
    """The permuted shards of one epoch, laid end to end and closed to a ring. Positions count from `start` on."""

    shards: np.ndarray  # int64 [S], shard at each place of the line
    edges: np.ndarray  # int64 [S + 1], first sample of each place
    start: int

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions -> (shard, index in the shard), each of the positions' shape."""
        samples = (positions + self.start) % self.edges[-1]
        place = np.searchsorted(self.edges, samples, side="right") - 1
        return self.shards[place], samples - self.edges[place]

    def overlapped(self, first: int, count: int) -> np.ndarray:
        """Distinct shards that hold the positions first .. first + count."""
        sample = (first + self.start) % self.edges[-1]
        low, high = np.searchsorted(self.edges, (sample, sample + count - 1), side="right") - 1
        places = np.arange(low, min(high, len(self.shards) - 1) + 1)
        beyond = sample + count - self.edges[-1]  # past the end of the ring
        if beyond > 0:
            places = np.union1d(places, np.arange(np.searchsorted(self.edges, beyond, side="left")))
        return self.shards[places]

    def position(self, shard: int, index: int) -> int:
        """The inverse of `locate`, for one sample."""
        place = np.flatnonzero(self.shards == shard)[0]
        return int((self.edges[place] + index - self.start) % self.edges[-1])


class Order:
    """Which sample stands where. Costs O(shards) per epoch and O(window) per window; pickles without its caches.

    Args:
        counts: int64 [S], samples per shard.
        seed: 0 <= seed < 2**64.
        streams: C, see `canonical_streams`.
        window: samples per shuffle window of one stream.
    """

    def __init__(self, counts: np.ndarray, seed: int, streams: int, window: int):
        if not 0 <= seed < 2**64:
            raise UserError("the seed does not fit", got=seed, expected="0 <= seed < 2**64")
        if not 1 <= window < 2**31:
            raise UserError("the shuffle window does not fit", got=window, expected="1 <= window < 2**31")
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.streams, self.window = seed, streams, window
        self.num_samples = int(self.counts.sum())
        self.stream_length = self.num_samples // streams
        self._line = lru_cache(maxsize=2)(self._build_line)
        self._block_key = _NOTHING_BUILT
        self._block = np.empty((0, 0), dtype=np.int32)
        self._built = np.zeros(0, dtype=bool)

    def __reduce__(self) -> tuple:
        return Order, (self.counts, self.seed, self.streams, self.window)

    @property
    def length(self) -> int:
        """Samples in the sequence of an epoch; fewer than C are left over, other ones in each epoch."""
        return self.streams * self.stream_length

    def take(self, epoch: int, first: int, count: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index in shard), int64 [stop - start] each: the part start .. stop of `count` samples of the sequence
        of `epoch` from its `first` on, after these were put in order of their streams, so that a part needs few shards.
        """
        if not 0 <= first <= first + count <= self.length:
            raise IndexError(f"samples {first} to {first + count} of a sequence of {self.length}")
        numbers = np.arange(first, first + count)
        by_stream = np.argsort((numbers % self.streams).astype(np.uint8), kind="stable")
        places, stream = np.divmod(numbers[by_stream[start:stop]], self.streams)
        return self._line(epoch).locate(self._positions(epoch, stream, places))

    def window_shards(self, epoch: int, stream: int, window: int) -> np.ndarray:
        """Distinct shards that a window of a stream takes its samples from."""
        first = stream * self.stream_length + window * self.window
        return self._line(epoch).overlapped(first, self._window_length(window))

    def stream_shards(self, epoch: int, stream: int) -> np.ndarray:
        """Distinct shards that a whole stream takes its samples from."""
        return self._line(epoch).overlapped(stream * self.stream_length, self.stream_length)

    @property
    def windows(self) -> int:
        """Shuffle windows in a stream."""
        return -(-self.stream_length // self.window)

    def _positions(self, epoch: int, stream: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Line positions [n] of the `place`-th samples of streams, window by window."""
        if not len(place):
            return place
        number, offset = np.divmod(place, self.window)
        positions = stream * self.stream_length + number * self.window
        for window in range(int(number.min()), int(number.max()) + 1):
            mask = number == window
            self._build_window(epoch, window, np.unique(stream[mask]))
            positions[mask] += self._block[stream[mask], offset[mask]]
        return positions

    def _build_window(self, epoch: int, window: int, streams: np.ndarray) -> None:
        """Fills the block [C, n] of the window's permutations for `streams`.

        All streams stand at the same window, so one block is the whole cache, and it bounds the memory to
        4 * C * window bytes. The rows of other ranks' streams are never touched and take none.
        """
        if self._block_key != (epoch, window):
            self._block_key = (epoch, window)
            self._block = np.empty((self.streams, self._window_length(window)), dtype=np.int32)
            self._built = np.zeros(self.streams, dtype=bool)
        for stream in streams[~self._built[streams]].tolist():
            n = self._block.shape[1]
            self._block[stream] = shuffled(n, self.seed, epoch, _WINDOW_TAG, stream, window)
            self._built[stream] = True

    def _window_length(self, window: int) -> int:
        return min(self.window, self.stream_length - window * self.window)

    def _build_line(self, epoch: int) -> _Line:
        shards = shuffled(len(self.counts), self.seed, epoch, _SHARD_TAG)
        start = int(_random_words(1, self.seed, epoch, _START_TAG)[0]) % self.num_samples
        return _Line(shards, np.concatenate([[0], np.cumsum(self.counts[shards])]), start)

    def substitute(self, epoch: int, shard: int, index: int, attempt: int) -> tuple[int, int]:
        """The `attempt`-th (from 0) replacement of a bad sample: (shard, index in shard), equal on all world sizes.

        It comes from the bad sample's own window, so that it is near in the cache; after `ATTEMPTS_IN_WINDOW` attempts,
        or where the window holds nothing else, from the whole corpus.
        """
        line = self._line(epoch)
        position = line.position(shard, index)
        bits = Draw(self.seed, epoch, position).bits(Purpose.SUBSTITUTE, attempt)
        stream, place = divmod(position, self.stream_length)
        window = place // self.window
        first, n = stream * self.stream_length + window * self.window, self._window_length(window)
        if attempt >= ATTEMPTS_IN_WINDOW or n < 2:
            first, n = 0, self.num_samples
        # never the bad sample itself
        replacement = first + (position - first + 1 + bits % max(n - 1, 1)) % n
        shards, indices = line.locate(np.array([replacement]))
        return int(shards[0]), int(indices[0])
