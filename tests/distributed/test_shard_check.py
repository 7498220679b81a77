"""Shards whose bytes changed but still decode are noticed while a run reads them, once a node."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.remote.cache import Cache
from data_tools.remote.settings import CacheSettings
from pretrain.stream.transform import ImageSettings
from remote_servers import HURRIED, http_server
from stream_corpora import stream_of, write_corpus

SETTINGS = {"seed": 3, "global_batch": 16, "window": 4, "image": ImageSettings(16), "node_ranks": range(1)}


def alter(tar):
    """A bit of a caption flips; it still is one."""
    data = tar.read_bytes()
    at = data.index(b"two ") + 1
    tar.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def read_all(corpus, journal, max_bad_ratio, writable=True):
    """Batches until every shard was looked at, and some of the next epoch."""
    with stream_of(corpus, **SETTINGS, max_bad_ratio=max_bad_ratio, changed_shards=journal) as stream:
        batches = iter(stream.iterate(0))
        until = time.monotonic() + 60
        while stream._check.process.is_alive():
            assert time.monotonic() < until
            assert not next(batches).bad
        assert stream._check.process.exitcode == 0
        for _ in range(3):
            next(batches)
        with contextlib.nullcontext() if writable else pytest.raises(IsADirectoryError):
            stream.check_writes()


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "shards").mkdir()
    return write_corpus(tmp_path / "shards", [40, 20, 20])


def test_shards_as_recorded_are_told_nothing_of(corpus, tmp_path, capfd):
    read_all(corpus, tmp_path / "changed.jsonl", 0.0)
    assert not (tmp_path / "changed.jsonl").exists()
    assert "changed" not in capfd.readouterr().err


def test_changed_shards_are_told_once_and_end_the_run_where_they_are_many(corpus, tmp_path, capfd):
    tars = [Path(path) for path in corpus.paths]
    alter(tars[1])
    read_all(corpus, tmp_path / "changed.jsonl", 0.25)  # 20 of 80 samples
    now = xxhash.xxh3_128_hexdigest(tars[1].read_bytes())
    (row,) = [json.loads(line) for line in (tmp_path / "changed.jsonl").read_text().splitlines()]
    assert row.pop("step") >= 1
    assert row == {"shard": str(tars[1]), "xxh3_128": now, "expected": corpus.hashes[16:32].hex()}
    warning = capfd.readouterr().err
    assert (
        warning.count(f"warning: content of shard {tars[1]} changed; got xxh3-128 {now}; expected {row['expected']}")
        == 1
    )
    alter(tars[2])
    with pytest.raises(
        UserError, match=r"samples lie in shards that changed: .*; got \d0 of 80 samples; expected at most 0.25"
    ):
        read_all(corpus, tmp_path / "again.jsonl", 0.25)


def test_a_list_that_cannot_be_written_is_told_by_the_stream_and_does_not_break_it(corpus, tmp_path, capfd):
    alter(Path(corpus.paths[1]))
    (tmp_path / "changed.jsonl").mkdir()
    read_all(corpus, tmp_path / "changed.jsonl", 0.5, writable=False)
    assert f"content of shard {corpus.paths[1]} changed" in capfd.readouterr().err


def test_what_the_cache_had_before_is_checked_too(corpus, tmp_path, capfd):
    with http_server() as server:
        server.serve(Path(corpus.paths[0]).parent)
        settings = CacheSettings(str(tmp_path / "cache"), 1 << 30, replace(HURRIED))
        remote = open_corpus([server.url(Path(path).name) for path in corpus.paths], settings)
        cache = Cache(settings)
        os.close(cache.lease(remote.remote(2)).file)
        alter(cache.folder / f"{remote.remote(2).key}.tar")
        read_all(remote, tmp_path / "changed.jsonl", 1.0)
    assert f"content of shard {remote.paths[2]} changed" in capfd.readouterr().err
    assert len((tmp_path / "changed.jsonl").read_text().splitlines()) == 1
