"""What streaming a corpus takes: disk for its shards, bytes from the store, time to start, and how well it shuffles.

All of it follows from the order alone (stream/order.py), so nothing is simulated and no shard is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from data_tools.errors import UsageError
from pretrain.config.batch import check_world_size
from pretrain.config.tree import Config
from pretrain.stream.loader import StreamSource, make_mixture
from pretrain.stream.order import Order
from pretrain.stream.sources import train_sources

_GIB, _MB = 2**30, 10**6


@dataclass(frozen=True)
class SourcePlan:
    """Of one source on one node, in bytes: `needed` at once, `ahead` with the next window on its way, `epoch` in an
    epoch; `neighbours`: how often two neighbours of the corpus meet in a batch, against a full shuffle."""

    needed: int
    ahead: int
    epoch: int
    neighbours: float


def plan_stream(config: Config, nodes: int, bandwidth: float) -> int:
    """Print the plan of a training on `nodes` machines of `bandwidth` MB/s each; returns the exit code."""
    if nodes < 1 or not bandwidth > 0:
        raise UsageError("--nodes and --bandwidth are positive", got=f"{nodes} and {bandwidth:g}")
    check_world_size(config.train.global_batch, nodes)
    sources = train_sources(config.data)
    mixture = make_mixture(sources, config.seed, config.train.global_batch, config.data.window)
    quotas = config.train.global_batch * np.array(mixture.weights) / sum(mixture.weights)
    plans = [plan_source(*source, nodes) for source in zip(sources, mixture.orders, quotas, strict=True)]
    first = first_shards(sources, mixture.batch(0, nodes, 0))
    print(f"corpus:        {sum(source.corpus.num_samples for source in sources)} samples, {_gib(_total(sources))}")
    for number, (plan, order) in enumerate(zip(plans, mixture.orders, strict=True)):
        pool = min(order.streams * order.window, order.num_samples)
        print(
            f"shuffle:       source {number}: batches are drawn from {pool} samples at a time; neighbours meet in one "
            f"{plan.neighbours:.3g} times as often as in a full shuffle"
        )
    if not any(source.corpus.cache for source in sources):
        print("cache:         none: all shards are local")
        return 0
    needed, ahead = sum(plan.needed for plan in plans), sum(plan.ahead for plan in plans)
    print(f"cache:         {_gib(needed)} per node at least, {_gib(ahead)} with the next windows fetched ahead")
    limit = config.data.cache_gib * _GIB
    if limit < ahead:
        verdict = "too small: shards would be fetched again and again" if limit < needed else "enough, but only just"
        print(f"               data.cache_gib={config.data.cache_gib:g} is {verdict}")
    egress = sum(plan.epoch for plan in plans)
    print(f"egress:        {_gib(egress)} per node and epoch, {_gib(egress * nodes)} over {nodes} node(s)")
    seconds = sum(first.values()) / (bandwidth * _MB)
    print(f"first batch:   {len(first)} shards, {_gib(sum(first.values()))}: {seconds:.1f} s at {bandwidth:g} MB/s")
    return 0


def plan_source(source: StreamSource, order: Order, quota: float, nodes: int) -> SourcePlan:
    """What the first of `nodes` needs of a source that gives a global batch `quota` samples; the nodes hold equal parts
    of its streams."""
    size = np.array(source.corpus.tar_bytes)
    streams = range(-(-order.streams // nodes))
    windows = [
        _union([order.window_shards(0, stream, window) for stream in streams]) for window in range(order.windows)
    ]
    following = [np.union1d(*pair) for pair in zip(windows, windows[1:] or windows, strict=False)]
    return SourcePlan(
        needed=max(int(size[shards].sum()) for shards in windows),
        ahead=max(int(size[shards].sum()) for shards in following),
        epoch=int(size[_union([order.stream_shards(0, stream) for stream in streams])].sum()),
        neighbours=_neighbours(order, quota),
    )


def first_shards(sources: Sequence[StreamSource], slots) -> dict[tuple[int, int], int]:
    """(source, shard) -> bytes, of the remote shards that the first step reads on a node."""
    places = sorted(set(zip(slots.sources.tolist(), slots.shards.tolist(), strict=True)))
    remote = [(source, shard) for source, shard in places if sources[source].corpus.remote(shard)]
    return {(source, shard): sources[source].corpus.tar_bytes[shard] for source, shard in remote}


def _neighbours(order: Order, quota: float) -> float:
    """Two of a batch's samples are neighbours by chance: of `quota` among all samples in a full shuffle, here only of
    a stream's part among the samples of its window."""
    part, window = quota / order.streams, min(order.window, order.stream_length)
    return order.num_samples * max(0.0, part - 1) / (window * max(1.0, quota - 1))


def _union(parts: Sequence[np.ndarray]) -> np.ndarray:
    return reduce(np.union1d, parts)


def _total(sources: Sequence[StreamSource]) -> int:
    return sum(sum(source.corpus.tar_bytes) for source in sources)


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"
