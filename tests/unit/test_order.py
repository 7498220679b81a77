"""The order of samples: frozen values, the same at any world size, every sample at most once."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from pretrain.config.batch import check_world_size
from pretrain.stream import order as order_module
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.mixture import Alone
from pretrain.stream.order import ATTEMPTS_IN_WINDOW, Order, canonical_streams, shuffled
from pretrain.stream.position import Position, ResumePoint

COUNTS = np.array([5, 11, 2, 30, 7])


def corpus(draw: np.random.Generator, shards: int) -> np.ndarray:
    return draw.integers(1, 200, shards)


class Epochs:
    """A corpus that is the only source, by (epoch, step)."""

    def __init__(self, counts, seed, global_batch, window, streams=None):
        self.order = Order(counts, seed, streams or canonical_streams(global_batch), window)
        self.mixture = Alone(self.order, global_batch, ResumePoint(0, 0, ((0, 0),)))
        self.steps = self.mixture.steps_per_epoch

    def batch(self, epoch, step, world_size=1, rank=0):
        slots = self.mixture.batch(epoch * self.steps + step, world_size, rank)
        assert not slots.sources.any()
        assert (slots.epochs == epoch).all()
        return slots.shards, slots.indices


def line(batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(shard, index) pairs as one number each."""
    shards, indices = batch
    return shards * 1_000_000 + indices


def test_frozen_permutation():
    assert shuffled(10, 7, 2, 1, 3, 4).tolist() == [8, 7, 1, 9, 2, 5, 3, 0, 6, 4]


def test_frozen_hash():
    assert Draw(7, 2, 0).bits(Purpose.CAPTION) == 17337544884009685000
    assert Draw(7, 2, 2**64 - 1).bits(Purpose.CAPTION) == 1665485951479054106
    assert Draw(1, 0, 5).bits(Purpose.SUBSTITUTE, 3) == 14892249000200408725


def test_frozen_order():
    order = Order(COUNTS, seed=7, streams=8, window=3)
    shards, indices = order.take(1, 32, 16, 0, 16)
    assert shards.tolist() == [3, 3, 3, 3, 1, 1, 1, 1, 4, 4, 0, 0, 3, 3, 3, 3]
    assert indices.tolist() == [19, 21, 25, 27, 1, 3, 7, 8, 2, 1, 0, 1, 0, 2, 7, 6]
    substitutes = [order.substitute(1, 3, 19, attempt) for attempt in (0, 1, 2, 16, 17)]
    assert substitutes == [(3, 21), (3, 21), (3, 21), (1, 7), (3, 5)]


def test_equal_words_fall_back_to_the_stable_sort(monkeypatch):
    words = np.array([3, 1, 3, 1, 3] * 50, dtype=np.uint64)

    class Repeating:
        def __init__(self, **_):
            pass

        def random_raw(self, n):
            return words[:n]

    monkeypatch.setattr(order_module.np.random, "Philox", Repeating)
    assert np.array_equal(shuffled(250, 0, 0, 0), np.argsort(words, kind="stable"))


@given(
    seed=st.integers(0, 2**64 - 1),
    shards=st.integers(1, 12),
    factors=st.tuples(st.sampled_from([1, 2, 6, 48, 64, 96, 192]), st.sampled_from([1, 2, 3])),
    window=st.integers(1, 400),
    epoch=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_world_size_makes_the_same_global_batches(seed, shards, factors, window, epoch):
    global_batch = factors[0] * factors[1]
    counts = corpus(np.random.default_rng(seed), shards)
    if counts.sum() < global_batch:
        counts = counts + global_batch
    run = Epochs(counts, seed, global_batch, window)
    resumes = {0, run.steps // 2, run.steps - 1}
    whole = {step: line(run.batch(epoch, step)) for step in resumes}
    for world_size in (w for w in range(1, 193) if global_batch % w == 0):
        for step in resumes:
            fresh = pickle.loads(pickle.dumps(run))  # a resumed process has built nothing
            ranks = [line(fresh.batch(epoch, step, world_size, rank)) for rank in range(world_size)]
            assert {len(rank) for rank in ranks} == {global_batch // world_size}
            assert np.array_equal(np.concatenate(ranks), whole[step])


@given(seed=st.integers(0, 1000), global_batch=st.sampled_from([1, 7, 16, 64, 128, 192]), window=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_an_epoch_holds_each_sample_at_most_once(seed, global_batch, window):
    counts = corpus(np.random.default_rng(seed), 9) + 30
    run = Epochs(counts, seed, global_batch, window)
    for epoch in (0, 1):
        seen = np.concatenate([line(run.batch(epoch, step)) for step in range(run.steps)])
        assert len(np.unique(seen)) == len(seen) == counts.sum() - run.mixture.dropped
        assert len(seen) == run.steps * global_batch
        assert (seen % 1_000_000 < counts[seen // 1_000_000]).all()
    assert 0 <= run.mixture.dropped < global_batch + run.order.streams


def test_the_dropped_tail_and_the_order_change_with_epoch_and_seed():
    def epoch_of(seed, epoch):
        run = Epochs(COUNTS, seed, 16, 3, streams=8)
        return [int(n) for step in range(run.steps) for n in line(run.batch(epoch, step))]

    variants = [epoch_of(7, 0), epoch_of(7, 1), epoch_of(8, 0)]
    assert len({tuple(variant) for variant in variants}) == 3
    assert len({frozenset(variant) for variant in variants}) == 3


def test_no_sample_of_a_single_shard_is_dropped_for_ever():
    run = Epochs(np.array([100]), 0, 64, 4)
    seen = np.concatenate([line(run.batch(epoch, 0)) for epoch in range(30)])
    assert len(np.unique(seen)) == 100


def test_a_batch_takes_part_in_every_stream():
    shards, _ = Epochs(np.full(64, 100), 0, 128, 10).batch(0, 0)
    assert len(np.unique(shards)) == 64


def test_one_shard_serves_many_ranks():
    run = Epochs(np.array([50]), 3, 8, 16)
    ranks = [line(run.batch(0, 1, 4, rank)) for rank in range(4)]
    assert sorted({len(rank) for rank in ranks}) == [2]
    assert len(np.unique(np.concatenate(ranks))) == 8


def test_windows_are_rebuilt_after_going_back():
    order = Order(np.full(10, 100), 5, 8, 16)
    places = [0, 320, 24, 320, 0]
    fresh = [line(Order(np.full(10, 100), 5, 8, 16).take(0, place, 8, 0, 8)) for place in places]
    for place, expected in zip(places, fresh, strict=True):
        assert np.array_equal(line(order.take(0, place, 8, 0, 8)), expected)


@given(cuts=st.lists(st.integers(0, 56), max_size=6), window=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_the_sequence_of_an_epoch_is_the_same_however_it_is_cut(cuts, window):
    order = Order(np.array([20, 37]), 5, 8, window)
    edges = [0, *sorted(cuts), order.length]
    parts = [line(order.take(1, a, b - a, 0, b - a)) for a, b in pairwise(edges)]
    for part, (a, b) in zip(parts, pairwise(edges), strict=True):
        one_by_one = [line(order.take(1, place, 1, 0, 1))[0] for place in range(a, b)]
        assert sorted(part) == sorted(one_by_one)
    assert len(np.unique(np.concatenate(parts))) == order.length == 56


def test_samples_outside_the_sequence_are_refused():
    order = Order(COUNTS, 7, 8, 3)
    with pytest.raises(IndexError):
        order.take(0, order.length - 3, 4, 0, 4)


def test_it_pickles_as_its_settings():
    run = Epochs(COUNTS, 7, 8, 3)
    size = len(pickle.dumps(run.mixture))
    run.batch(0, 0)
    copy = pickle.loads(pickle.dumps(run.mixture))
    assert len(pickle.dumps(run.mixture)) == size
    assert np.array_equal(copy.batch(1).indices, run.mixture.batch(1).indices)


def test_a_global_batch_larger_than_the_corpus_is_refused():
    with pytest.raises(UserError, match=r"larger than the corpus.*got a global batch of 64 and 55 samples"):
        Epochs(COUNTS, 0, 64, 8)
    assert Epochs(COUNTS, 0, 55, 8).steps == 1


def test_a_global_batch_that_the_streams_do_not_divide_is_refused():
    with pytest.raises(UserError, match="got 12; expected a multiple of 8"):
        Epochs(COUNTS, 0, 12, 8, streams=8)


@pytest.mark.parametrize(("world_size", "fitting"), [(5, "4 or 6 ranks"), (13, "12 ranks"), (7, "6 or 12 ranks")])
def test_a_world_size_that_does_not_divide_the_batch_is_refused(world_size, fitting):
    with pytest.raises(UserError, match=f"12 is not divisible.*got {world_size} ranks; expected {fitting}"):
        check_world_size(12, world_size)


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": 2**64}, {"window": 0}])
def test_settings_are_checked(change):
    with pytest.raises(UserError, match=next(iter(change))):
        Order(COUNTS, **{"seed": 0, "streams": 1, "window": 4, **change})


def test_substitutes_stay_in_the_window_and_differ_from_the_bad_sample():
    counts, window = np.full(20, 50), 25
    order = Order(counts, 9, 8, window)
    bad = [(int(s), int(i)) for s, i in zip(*order.take(2, 64, 64, 0, 64), strict=True)]
    members = [line(order.take(2, 8 * step, 8, 0, 8)) for step in range(window)]  # all of the streams' first windows
    first_windows = [set(np.array(members)[:, stream].tolist()) for stream in range(8)]
    for place, (shard, index) in enumerate(bad):
        for attempt in range(ATTEMPTS_IN_WINDOW):
            substitute = order.substitute(2, shard, index, attempt)
            assert substitute != (shard, index)
            assert substitute[0] * 1_000_000 + substitute[1] in first_windows[place // 8]
        beyond = [order.substitute(2, shard, index, ATTEMPTS_IN_WINDOW + k) for k in range(8)]
        assert len({shard for shard, _ in beyond}) > 2
    assert len({order.substitute(2, *bad[0], attempt) for attempt in range(8)}) > 4


def test_a_window_of_one_sample_is_substituted_from_the_corpus():
    order = Order(np.array([8]), 0, 8, 4)
    assert order.substitute(0, 0, 3, 0) != (0, 3)


def test_start_and_lookups_are_fast_at_a_billion_samples():
    counts = np.full(100_000, 10_000)
    started = time.perf_counter()
    Epochs(counts, 1, 64, 262_144).batch(3, 20_000, 8, 5)
    assert time.perf_counter() - started < 1
    run = Epochs(counts, 1, 32_768, 262_144)
    run.batch(0, 0)
    started = time.perf_counter()
    for step in range(1, 9):
        run.batch(0, step)
    assert (time.perf_counter() - started) / (8 * 32_768) < 5e-6


def test_memory_is_bounded_by_the_windows():
    order = Order(np.full(1000, 1000), 1, 64, 1000)
    for step in range(0, 15_000, 500):
        order.take(step % 5, 64 * step, 64, 0, 64)
        assert order._block.nbytes <= 64 * 1000 * 4


def test_a_view_enters_the_hash_only_where_it_is_not_the_first():
    words = np.array([7, 2, 9, Purpose.CROP, 1, 4], dtype="<u8").tobytes()
    assert Draw(7, 2, 9, view=4).bits(Purpose.CROP, 1) == xxhash.xxh3_64_intdigest(words)
    assert Draw(7, 2, 9, view=0).bits(Purpose.CROP, 1) == xxhash.xxh3_64_intdigest(words[:40])


def test_random_pair_is_uniform():
    values = np.array([Draw(0, 0, sample).pair(Purpose.CROP) for sample in range(20_000)])
    assert np.abs(values.mean(0) - 0.5).max() < 0.01
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.03
    assert values.min() >= 0
    assert values.max() < 1


POSITION = Position(
    manifest_digest="a" * 32, seed=2**64 - 1, streams=64, window=2**31 - 1, step=2, samples_seen=7, sources=((3, 5),)
)


def test_position_is_small_json_and_comes_back():
    text = json.dumps(POSITION.to_dict())
    assert len(text) < 1000
    assert Position.from_dict(json.loads(text)) == POSITION


@pytest.mark.parametrize("field", ["manifest_digest", "seed", "window"])
def test_another_order_is_refused_by_name(field):
    other = replace(POSITION, **{field: "b" if field == "manifest_digest" else 1})
    with pytest.raises(UserError, match=f"another {field}; got {getattr(other, field)}; expected"):
        POSITION.check_resumable(other)


def test_progress_is_no_obstacle_to_a_resume():
    POSITION.check_resumable(replace(POSITION, step=0, samples_seen=0, streams=8, sources=((0, 0),)))


@pytest.mark.parametrize("change", [{"version": 1}, {"extra": 1}])
def test_unknown_positions_are_refused(change):
    with pytest.raises(UserError, match="cannot be read"):
        Position.from_dict(POSITION.to_dict() | change)
