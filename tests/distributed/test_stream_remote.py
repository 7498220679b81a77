"""The training stream over remote shards: the very same batches as over the local copy, and one clear end."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.format.manifest import Manifest, ShardRecord, write_manifest
from data_tools.remote.retry import Limits
from data_tools.remote.settings import CacheSettings
from pretrain.process.runtime import Runtime
from pretrain.stream.transform import ImageSettings
from ranks import run_ranks
from remote_servers import HURRIED, http_server, s3_server, stall, upload
from stream_corpora import characters, pixels, reader_of, stream_of, tokens, write_corpus

COUNTS = [23, 31, 16, 20, 9]
SETTINGS = {
    "seed": 3,
    "global_batch": 16,
    "window": 4,
    "image": ImageSettings(16, crop_scale=(0.5, 1.0)),
    "tokenize": characters,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed folder with a damaged picture."""
    folder = tmp_path_factory.mktemp("shards")
    corpus = write_corpus(folder, COUNTS, {9: {"jpg": b"not a picture"}})
    records = [
        ShardRecord(f"s-{n:06d}", COUNTS[n], corpus.tar_bytes[n], corpus.hashes[16 * n : 16 * n + 16].hex())
        for n in range(len(COUNTS))
    ]
    write_manifest(Manifest({}, "digest", {}, tuple(records), (), {}), folder)
    return folder


@pytest.fixture(params=["http", "s3"])
def url(request, folder):
    if request.param == "http":
        with http_server() as server:
            server.serve(folder, "set/")
            yield server.url("set")
    else:
        with pytest.MonkeyPatch.context() as environment, s3_server(environment) as bucket:
            upload(folder, "stream")
            yield f"{bucket}/stream"


def cache_for(folder, tmp_path, share, limits=HURRIED):
    """A cache for a share of the corpus, which never holds less than what the readers have open."""
    return CacheSettings(str(tmp_path / "cache"), int(share * sum(open_corpus(folder).tar_bytes)), limits)


def batches(corpus, first_step=0, steps=14, **settings):
    with stream_of(corpus, **(SETTINGS | settings)) as stream:
        return list(islice(stream.iterate(first_step), steps)), stream.position(steps)


def assert_same(ours, theirs):
    assert [(batch.step, batch.keys, batch.captions) for batch in ours] == [
        (batch.step, batch.keys, batch.captions) for batch in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(pixels(one), pixels(other))
        assert torch.equal(tokens(one), tokens(other))
        assert np.array_equal(one.ids, other.ids)
        assert [(bad.index, bad.key, bad.kind) for bad in one.bad] == [
            (bad.index, bad.key, bad.kind) for bad in other.bad
        ]


@pytest.mark.parametrize(("workers", "share"), [(0, 0.9), (2, 1.2)])
def test_remote_batches_are_the_local_ones(url, folder, tmp_path, workers, share):
    local, place = batches(open_corpus(folder))
    assert any(batch.bad for batch in local)
    corpus = open_corpus(url, cache_for(folder, tmp_path, share))
    remote, same_place = batches(corpus, workers=workers, node_ranks=range(1) if workers else None)
    assert_same(remote, local)
    assert same_place == place  # so a run may go on from the copy
    assert all(bad.shard.startswith(url) for batch in remote for bad in batch.bad)


def test_remote_evaluation_is_the_local_one(url, folder, tmp_path):
    good = [f"s-{number:06d}.tar" for number in (1, 2)]
    corpora = (
        open_corpus([f"{url}/{name}" for name in good], cache_for(folder, tmp_path, 0.9)),
        open_corpus([folder / name for name in good]),
    )
    remote, local = (list(reader_of(corpus, characters, 8, workers=1)) for corpus in corpora)
    assert [batch.keys for batch in remote] == [batch.keys for batch in local]
    assert all(torch.equal(pixels(one), pixels(other)) for one, other in zip(remote, local, strict=True))


def _rank(rank, world_size, url, settings):
    place = {"rank": rank, "world_size": world_size, "node_ranks": range(world_size) if rank == 0 else None}
    found, _ = batches(open_corpus(url, settings), steps=6, workers=1, **place)
    return [batch.keys for batch in found], [pixels(batch) for batch in found]


def test_ranks_of_a_node_bring_each_shard_once(folder, tmp_path):
    whole, _ = batches(open_corpus(folder), steps=6)
    with http_server() as server:
        server.serve(folder)
        patient = Limits()  # a second attempt at a slow answer would count as a second request
        results = run_ranks(2, _rank, server.url(""), cache_for(folder, tmp_path, 2, patient))
        assert {len(server.asked(f"s-{number:06d}.tar")) for number in range(len(COUNTS))} == {1}
    for step, batch in enumerate(whole):
        assert [key for keys, _ in results for key in keys[step]] == batch.keys
        assert torch.equal(torch.cat([images[step] for _, images in results]), pixels(batch))


def test_nodes_are_told_by_rank_and_local_rank():
    def node(rank, local_rank, local_size, world_size):
        return list(Runtime(rank, world_size, local_rank, torch.device("cpu"), 1, local_size).node_ranks)

    assert node(0, 0, 2, 4) == node(1, 1, 2, 4) == [0, 1]
    assert node(2, 0, 2, 4) == [2, 3]
    assert node(2, 0, 4, 4) == [2, 3]  # a launcher that does not tell the ranks of a node


@pytest.mark.parametrize("workers", [0, 1])
def test_starving_remote_ends_the_run_with_one_line(folder, tmp_path, workers):
    with http_server() as server:
        server.serve(folder)
        settings = replace(cache_for(folder, tmp_path, 0.5), limits=replace(HURRIED, deadline=2.0))
        corpus = open_corpus(server.url(""), settings)
        with stream_of(corpus, **SETTINGS, workers=workers) as stream:
            server.always = stall
            started = time.monotonic()
            with pytest.raises(UserError, match=r"giving up on http.*; got .*; expected .*; remedy: "):
                list(islice(stream.iterate(0), 14))
            assert time.monotonic() - started < 30


def test_step_that_cannot_fit_is_refused_at_the_start(folder, tmp_path):
    with http_server() as server:
        server.serve(folder)
        corpus = open_corpus(server.url(""), cache_for(folder, tmp_path, 0.5))
        with (
            stream_of(corpus, **SETTINGS, node_ranks=range(1)) as stream,
            pytest.raises(UserError, match="does not hold the shards of one step"),
        ):
            stream.iterate(0)
