"""`data_tools plan-stream`: its figures against what the order really does."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import yaml

from data_tools.__main__ import main
from data_tools.remote.settings import CacheSettings
from pretrain.plan.stream import first_shards, plan_source
from pretrain.stream.loader import StreamSource, make_mixture
from pretrain.stream.mixture import Alone
from pretrain.stream.order import Order
from remote_servers import http_server
from stream_corpora import write_corpus


def walked(order, streams, epoch=0):
    """Shards of every window, by taking all samples."""
    shards, _ = order.take(epoch, 0, order.length, 0, order.length)
    by_stream = shards.reshape(order.streams, -1)[streams]
    return [
        {int(shard) for shard in by_stream[:, k * order.window : (k + 1) * order.window].flatten()}
        for k in range(order.windows)
    ]


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("window", [3, 7, 100])
def test_windows_know_their_shards(epoch, window):
    order = Order(np.random.default_rng(window).integers(1, 30, 15), 4, 8, window)
    for stream in range(8):
        expected = walked(order, [stream], epoch)
        assert [set(order.window_shards(epoch, stream, k).tolist()) for k in range(order.windows)] == expected
        assert set(order.stream_shards(epoch, stream).tolist()) == set().union(*expected)


@pytest.fixture
def remote(tmp_path):
    """A corpus of six shards that says it is remote."""
    corpus = write_corpus(tmp_path, [30, 50, 20, 60, 40, 56])
    urls = tuple(f"https://example.org/{number}.tar" for number in range(6))
    return StreamSource(replace(corpus, urls=urls, cache=CacheSettings("cache", 1 << 30)))


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_disk_and_the_egress_are_what_the_walk_needs(remote, nodes):
    order = make_mixture([remote], 3, 16, 4).orders[0]
    plan = plan_source(remote, order, 16, nodes)
    size = np.array(remote.corpus.tar_bytes)
    live = walked(order, range(16 // nodes))
    assert plan.needed == max(size[list(shards)].sum() for shards in live)
    following = [size[list(a | b)].sum() for a, b in pairwise(live)]
    assert plan.ahead == max(following)
    assert plan.epoch == size[list(set().union(*live))].sum()
    assert plan.needed <= plan.ahead <= plan.epoch


def test_the_first_batch_is_what_a_node_reads_first(remote):
    mixture = make_mixture([remote], 3, 16, 4)
    slots = mixture.batch(0, 4, 0)
    found = first_shards([remote], slots)
    assert found == {(0, shard): remote.corpus.tar_bytes[shard] for shard in set(slots.shards.tolist())}


def test_neighbours_meet_as_often_as_said(remote):
    """Counted over epochs: pairs of neighbours in one batch, against batches of a full permutation."""
    corpus = replace(remote.corpus, counts=np.array([2048, 2048]), tar_bytes=(1, 1))
    source = StreamSource(corpus)
    order = Order(corpus.counts, 3, 16, 32)
    mixture = replace_order(source, order)
    edges, met = np.array([0, 2048]), 0
    epochs = 12
    for step in range(epochs * mixture.steps_per_epoch):
        slots = mixture.batch(step)
        samples = np.sort(edges[slots.shards] + slots.indices)
        met += int((np.diff(samples) == 1).sum())
    full = 64 - 1  # an epoch of full permutation: each of 4096 samples has its neighbour among the 63 others by 63/4096
    said = plan_source(source, order, 64, 1).neighbours
    assert said > 6
    assert met / epochs / full == pytest.approx(said, rel=0.1)


def replace_order(source, order):
    mixture = make_mixture([source], 3, 64, 32)
    return Alone(order, 64, mixture.anchor)


def test_the_verb_prints_a_plan_and_warns_of_a_small_cache(tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    corpus = write_corpus(folder, [30, 50, 20, 60])
    config = {
        "run": {"dir": "run"},
        "data": {"window": 4, "cache_dir": str(tmp_path / "cache")},
        "train": {"global_batch": 16},
    }
    with http_server() as server:
        server.serve(folder)
        config["data"] |= {"train": [{"urls": server.url("s-{000000..000003}.tar")}]}
        config["data"] |= {"cache_dir": str(tmp_path / "cache"), "cache_gib": 1e-5}
        (tmp_path / "remote.yaml").write_text(yaml.safe_dump(config))
        assert main(["plan-stream", "--config", str(tmp_path / "remote.yaml"), "--nodes", "2"]) == 0
        text = capsys.readouterr().out
    assert "too small: shards would be fetched again and again" in text
    assert re.search(r"first batch: +\d shards, .* at 500 MB/s", text)
    assert "over 2 node(s)" in text
    config["data"] |= {"train": [{"urls": corpus.paths[0]}]}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(config))
    assert main(["plan-stream", "--config", str(tmp_path / "local.yaml")]) == 0
    assert "none: all shards are local" in capsys.readouterr().out
    assert main(["plan-stream", "--config", str(tmp_path / "local.yaml"), "--nodes", "3"]) == 2
    assert "16 is not divisible by the world size" in capsys.readouterr().err
