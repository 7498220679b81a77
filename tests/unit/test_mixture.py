"""Mixtures of sources: quotas without random draws, epochs of each source, and a global batch that changes."""

from __future__ import annotations

import json
import pickle
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from pretrain.config.durations import ENDLESS
from pretrain.stream.loader import StreamSource, source_streams
from pretrain.stream.mixture import Alone, Mixed
from pretrain.stream.order import Order
from pretrain.stream.position import Position, ResumePoint
from pretrain.stream.quotas import PERIOD, Quotas, largest_remainders
from pretrain.stream.transform import ImageSettings
from stream_corpora import characters, stream_of, write_corpus

SIZES = (5000, 700, 90)


def mixture(sizes, weights, global_batch, anchor=None, seed=5, window=50):
    orders = [Order(np.array([size // 2, size - size // 2]), seed, source_streams(size, 16), window) for size in sizes]
    start = anchor or ResumePoint(0, 0, ((0, 0),) * len(sizes))
    if len(sizes) == 1:
        return Alone(orders[0], global_batch, start)
    return Mixed(orders, weights, global_batch, sum(sizes), start)


def names(slots):
    """(source, epoch, shard, index) of each sample."""
    return list(zip(*(column.tolist() for column in slots), strict=True))


@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=6),
    global_batch=st.integers(1, 300),
    step=st.integers(0, 5000),
)
@settings(max_examples=60, deadline=None)
def test_quotas_fill_every_batch_and_keep_to_the_weights(weights, global_batch, step):
    quotas = Quotas(weights, global_batch)
    taken, following = quotas.before(step), quotas.before(step + 1)
    assert (following >= taken).all()
    assert (following - taken).sum() == global_batch
    owed = np.array(weights) / sum(weights) * global_batch * step
    assert np.abs(taken - owed).max() < len(weights) * (1 + step / PERIOD)


def test_shares_are_met_in_the_long_run():
    shares = np.array([0.6001, 0.3998, 0.0001])
    taken = Quotas(shares, 64).before(50 * PERIOD)
    assert np.abs(taken / taken.sum() - shares).max() <= 1 / (PERIOD * 64)
    assert taken[2] > 0


@pytest.mark.parametrize(
    ("owed", "expected"),
    [
        ([1.5, 0.75, 0.75], [1, 1, 1]),
        ([2.2, 2.9, -0.1], [2, 3, 0]),
        ([1.3, 1.3, 1.3, -0.9], [1, 1, 1, 0]),
        ([4.0], [4]),
    ],
)
def test_largest_remainders(owed, expected):
    total = sum(expected)
    assert largest_remainders(np.array(owed), total).tolist() == expected


@given(
    weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    world_size=st.sampled_from([1, 2, 3, 8, 48]),
    step=st.integers(0, 400),
)
@settings(max_examples=40, deadline=None)
def test_every_world_size_makes_the_same_mixed_batches(weights, world_size, step):
    mixed = mixture(SIZES, weights, 48)
    whole = names(mixed.batch(step))
    fresh = pickle.loads(pickle.dumps(mixed))
    assert [name for rank in range(world_size) for name in names(fresh.batch(step, world_size, rank))] == whole
    assert len(whole) == 48


def test_ranks_hold_their_share_of_every_source():
    mixed = mixture((5000, 5000), (3, 1), 64)
    for rank in range(4):
        assert np.bincount(mixed.batch(7, 4, rank).sources).tolist() == [12, 4]


def test_a_source_gives_each_sample_once_in_its_own_epoch():
    mixed = mixture(SIZES, (4, 3, 1), 48)
    seen = [name for step in range(120) for name in names(mixed.batch(step))]
    assert len(set(seen)) == len(seen)
    for source, size in enumerate(SIZES):
        epochs = np.array([epoch for s, epoch, *_ in seen if s == source])
        length = mixed.orders[source].length
        assert size - length < mixed.orders[source].streams
        full = np.bincount(epochs)[:-1]
        assert (full == length).all()
    assert max(epoch for source, epoch, *_ in seen if source == 2) >= 5


@pytest.mark.parametrize("sizes", [(3000,), SIZES])
@pytest.mark.parametrize("resume", [0, 3, 61, 130])
def test_a_run_goes_on_from_its_anchor(sizes, resume):
    weights = [4.0, 3.0, 1.0][: len(sizes)]
    run = mixture(sizes, weights, 48)
    resumed = mixture(sizes, weights, 48, run.anchor_at(resume))
    for step in range(resume, resume + 70, 7):
        assert names(resumed.batch(step)) == names(run.batch(step))
    assert resumed.anchor_at(resume + 70) == run.anchor_at(resume + 70)
    assert resumed.step_at(3.5) == max(resume, run.step_at(3.5))
    with pytest.raises(IndexError, match="before step"):
        resumed.batch(resume - 1)


@pytest.mark.parametrize("before", [16, 32, 64])
@pytest.mark.parametrize("after", [16, 32, 96])
@pytest.mark.parametrize("steps", [1, 9, 17])
def test_the_global_batch_may_change_and_an_epoch_keeps_its_samples(before, after, steps):
    run = mixture((1500,), (1,), before)
    changed = mixture((1500,), (1,), after, run.anchor_at(steps))
    seen = [name for step in range(steps) for name in names(run.batch(step))]
    step = steps
    while changed.anchor_at(step).sources[0][0] == 0:
        seen += names(changed.batch(step))
        step += 1
    assert len(set(seen)) == len(seen)
    assert run.orders[0].length - len(seen) < after
    prefix = Order.take(run.orders[0], 0, 0, len(seen), 0, len(seen))
    assert {(shard, index) for _, _, shard, index in seen} == set(zip(*(part.tolist() for part in prefix), strict=True))
    assert changed.samples_seen(step) == len(seen)
    assert changed.step_at(1) == step
    following = [name for later in range(step, step + changed.steps_per_epoch) for name in names(changed.batch(later))]
    assert {epoch for _, epoch, *_ in following} == {1}
    assert changed.step_at(2) == step + changed.steps_per_epoch


def test_durations_in_samples_count_what_was_seen_before():
    run = mixture((1500,), (1,), 32)
    changed = mixture((1500,), (1,), 64, run.anchor_at(10))
    assert run.step_at_samples(1000) == 32
    assert changed.step_at_samples(1000) == 10 + 11
    assert changed.step_at_samples(5) == 10


def test_a_source_smaller_than_its_part_is_refused():
    with pytest.raises(UserError, match=r"source 1 is smaller than its part.*got a global batch of 64 and 20 samples"):
        mixture((4000, 20), (1, 1), 64)


def stream(folders, **settings):
    sources = [StreamSource(corpus, weight=weight) for corpus, weight in folders]
    image = ImageSettings(16, crop_scale=(0.5, 1.0))
    return stream_of(
        sources, **{"seed": 3, "global_batch": 16, "window": 4, "image": image, "tokenize": characters} | settings
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    return [(write_corpus(folder / "a", [60, 40]), 3.0), (write_corpus(folder / "b", [30]), 1.0)]


def test_the_stream_reads_its_sources_in_their_shares(folders):
    with stream(folders) as mixed:
        lines = mixed.describe()
        batches = list(islice(mixed.iterate(), 10))
    assert "source 1: 30 samples, 25.00% of every global batch" in lines
    paths = [path for corpus, _ in folders for path in corpus.paths]
    for batch in batches:
        slots = mixed.mixture.batch(batch.step)
        assert np.bincount(slots.sources).tolist() == [12, 4]
        assert names(batch.slots) == names(slots)
        numbers = [int(key) for key in batch.keys]
        starts = {0: (0, 60), 1: (0,)}
        expected = [starts[source][shard] + index for source, _, shard, index in names(slots)]
        assert numbers == expected
    assert list(mixed.corpus.paths) == paths
    assert batches[-1].epoch == 1  # 130 samples are an epoch of the run


def test_a_mixed_stream_resumes_at_another_batch_and_weights(folders):
    first = stream(folders)
    position = first.position(5)
    assert len(json.dumps(position.to_dict())) < 1000
    other = [(corpus, 1.0) for corpus, _ in folders]
    resumed = stream(other, global_batch=8)
    resumed.go_on_from(Position.from_dict(json.loads(json.dumps(position.to_dict()))))
    before = {name for step in range(5) for name in names(first.mixture.batch(step))}
    with resumed:
        for batch in islice(resumed.iterate(5), 4):
            slots = resumed.mixture.batch(batch.step)
            assert np.bincount(slots.sources).tolist() == [4, 4]
            assert not before & set(names(slots))
    assert resumed.position(6).samples_seen == 5 * 16 + 8


def test_streams_are_kept_and_must_divide_the_new_batch(folders):
    single = [(folders[0][0], 1.0)]
    position = stream(single).position(2)
    bigger = stream(single, global_batch=32)
    bigger.go_on_from(position)
    assert bigger.position(2).streams == 16
    with pytest.raises(UserError, match="got 24; expected a multiple of 16"):
        stream(single, global_batch=24).go_on_from(position)
    with pytest.raises(UserError, match="another manifest_digest"):
        stream(folders).go_on_from(position)


def test_how_long_a_run_lasts(folders):
    run = stream([(folders[0][0], 1.0)])
    assert run.steps_per_epoch == 6
    durations = {"2 epochs": 12, "0.5 epochs": 3, "100 samples": 7, "96 samples": 6, "5 steps": 5, "forever": ENDLESS}
    assert {text: run.steps_until(text, "x") for text in durations} == durations
