"""The prefetching process: ahead of the reader, within the limit, never needed, never left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.remote.cache import Cache
from data_tools.remote.settings import CacheSettings
from packing import ROOT
from pretrain.stream.prefetch import Prefetcher
from remote_servers import HURRIED, http_server, status, write_shards

SHARDS, SIZE = 12, 51_200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("packed"), SHARDS)


@pytest.fixture
def server(folder):
    with http_server() as server:
        server.serve(folder)
        yield server


def two_shards(step):
    """Step t needs shards t and t + 1; it starts anew after the last."""
    return [step % SHARDS, (step + 1) % SHARDS]


def open_remote(server, tmp_path, tars):
    return open_corpus(server.url(""), CacheSettings(str(tmp_path / "cache"), int(tars * SIZE), HURRIED))


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def held(corpus):
    cache = Cache(corpus.cache)
    return [number for number in range(SHARDS) if cache.holds(corpus.remote(number))]


def times_asked(server):
    return [len(server.asked(f"s-{number:03d}.tar")) for number in range(SHARDS)]


@contextmanager
def prefetching(corpus, first_step=0):
    prefetcher = Prefetcher(corpus, corpus.cache, two_shards, first_step)
    try:
        yield prefetcher
    finally:
        prefetcher.close()
    assert not prefetcher.process.is_alive()


def test_it_goes_ahead_of_the_reader_and_keeps_what_is_needed(server, tmp_path):
    corpus = open_remote(server, tmp_path, tars=5.8)  # of which it fills 90 %: five shards
    with prefetching(corpus) as prefetcher, ShardReader(corpus, max_open=1) as reader:
        for step in range(SHARDS - 4):
            ahead = set(range(step, step + 5))
            wait_for(lambda ahead=ahead: ahead <= set(held(corpus)))
            assert sum(path.stat().st_size for path in Cache(corpus.cache).folder.iterdir()) <= corpus.cache.limit
            assert {reader.read(number, 0).key for number in two_shards(step)} == {f"{step + k:03d}-0" for k in (0, 1)}
            assert max(times_asked(server)) == 1  # nothing was evicted before its use, or fetched twice
            if step < SHARDS - 5:
                prefetcher.advance(step)


def test_the_soonest_come_first(server, tmp_path):
    corpus = open_remote(server, tmp_path, tars=20)
    with prefetching(corpus, first_step=6):
        wait_for(lambda: len(held(corpus)) == SHARDS)
    order = [int(path[3:6]) for path, start, stop in server.requests if path.endswith(".tar") and stop - start > 1]
    assert set(order[:4]) <= {6, 7, 8, 9, 10}  # four at a time


def test_run_goes_on_without_it(server, tmp_path):
    corpus = open_remote(server, tmp_path, tars=5)
    server.always = status(503)
    prefetcher = Prefetcher(corpus, corpus.cache, two_shards, 0)
    wait_for(lambda: len(server.requests) > 8)
    prefetcher.process.kill()
    prefetcher.process.join()
    server.always = None
    with ShardReader(corpus) as reader:
        for number in range(SHARDS):
            assert reader.read(number, 0).key == f"{number:03d}-0"
    prefetcher.advance(3)
    prefetcher.close()


def test_cache_smaller_than_a_step_is_refused(server, tmp_path):
    corpus = open_remote(server, tmp_path, tars=1.5)
    with pytest.raises(UserError, match=r"does not hold the shards of one step.*remedy: raise data\.cache_gib"):
        Prefetcher(corpus, corpus.cache, two_shards, 0)


SCRIPT = """
    import sys, time
    sys.path[:0] = ["tests", "tests/distributed"]
    from data_tools.corpus import open_corpus
    from data_tools.remote.settings import default_settings
    from pretrain.stream.prefetch import Prefetcher
    from test_prefetch import two_shards
    corpus = open_corpus(sys.argv[1], default_settings(sys.argv[2]))
    prefetcher = Prefetcher(corpus, corpus.cache, two_shards, 0)
    print(prefetcher.process.pid, flush=True)
    sys.stdin.readline()
    assert prefetcher.process.is_alive()
"""


def test_it_tells_faults_once_and_ends_with_its_parent(server, tmp_path):
    corpus = open_remote(server, tmp_path, tars=20)
    del server.files["/s-003.tar"]
    for kill in (False, True):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), server.url(""), str(tmp_path / "cache")]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        parent = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        pid = int(parent.stdout.readline())
        assert parent.stderr.readline().startswith("prefetch: no such object: http")
        wait_for(lambda: len(held(corpus)) == SHARDS - 1)
        if kill:
            parent.kill()
        _, errors = parent.communicate("\n", timeout=30)  # the prefetcher would keep the pipes open
        assert parent.returncode == (-signal.SIGKILL if kill else 0), errors
        wait_for(lambda pid=pid: not _command(pid))
        assert errors == ""


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for a process that only waits to be collected
    except OSError:
        return b""
