"""The cache in one process: what is brought, what is checked, what is evicted, and what it says when it cannot."""

from __future__ import annotations

import fcntl
import os
import pickle
import time
from dataclasses import replace

import pytest

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.remote.cache import Cache
from data_tools.remote.locks import share, try_lock
from data_tools.remote.settings import CacheSettings, Shard, default_settings
from data_tools.remote.space import CacheFullError
from remote_servers import HURRIED, http_server, in_order, write_shards

SIZE = 51_200  # of each tar: four samples of 10,000 bytes with headers and padding, in records of 10,240


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("packed"), 5)


@pytest.fixture
def server(folder):
    with http_server() as server:
        server.serve(folder)
        yield server


@pytest.fixture
def shards(server, folder):
    corpus = open_corpus(folder)
    assert set(corpus.tar_bytes) == {SIZE}
    return [
        Shard(server.url(f"s-{n:03d}.tar"), SIZE, corpus.hashes[16 * n : 16 * n + 16]) for n in range(len(corpus.paths))
    ]


def cache(tmp_path, tars=3.5, **limits):
    return Cache(CacheSettings(str(tmp_path / "cache"), int(tars * SIZE), replace(HURRIED, **limits)))


def leased(cache, shard):
    """Lease and let go."""
    lease = cache.lease(shard)
    data = os.pread(lease.file, SIZE, 0)
    os.close(lease.file)
    return data


def held(cache):
    return sorted(path.name for path in cache.folder.glob("*.tar"))


def used(cache):
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_shard_is_brought_once_and_is_the_same(tmp_path, server, shards, folder):
    ours = cache(tmp_path)
    assert not ours.holds(shards[0])
    for _ in range(3):
        assert leased(ours, shards[0]) == (folder / "s-000.tar").read_bytes()
    assert leased(cache(tmp_path), shards[0])[:1]
    assert ours.holds(shards[0])
    assert len(server.asked(".tar")) == 1
    assert (ours.folder / f"{shards[0].key}.idx").read_bytes() == (folder / "s-000.idx").read_bytes()


def test_same_content_elsewhere_is_the_same_file(tmp_path, server, shards):
    ours = cache(tmp_path)
    leased(ours, shards[0])
    leased(ours, shards[0]._replace(url=shards[0].url + "?signed=again"))
    assert len(server.asked(".tar")) == 1


def test_least_recently_used_goes_first(tmp_path, server, shards):
    ours = cache(tmp_path)
    for number in (0, 1, 2, 0, 3, 4):
        leased(ours, shards[number])
        time.sleep(0.01)
        assert used(ours) <= ours.settings.limit
    assert held(ours) == sorted(f"{shards[n].key}.tar" for n in (0, 3, 4))
    assert {path.suffix for path in ours.folder.iterdir()} == {".tar", ".idx", ".lock"}
    assert len(list(ours.folder.glob("*.idx"))) == 3
    ours.touch(shards[0])
    leased(ours, shards[1])
    assert held(ours) == sorted(f"{shards[n].key}.tar" for n in (0, 1, 4))


def test_shards_in_use_stay(tmp_path, server, shards):
    ours = cache(tmp_path)
    leases = [ours.lease(shard) for shard in shards[:2]]
    for shard in shards[2:]:
        leased(ours, shard)
    assert held(ours) == sorted(f"{shards[n].key}.tar" for n in (0, 1, 4))
    for lease in leases:
        os.close(lease.file)
    leased(ours, shards[2])
    assert ours.holds(shards[4])


def test_full_cache_says_how_large_it_must_be(tmp_path, server, shards):
    ours = cache(tmp_path, tars=2.5)
    leases = [ours.lease(shard) for shard in shards[:2]]
    started = time.monotonic()
    with pytest.raises(
        CacheFullError, match=r"too small; got a limit of .* GiB more; expected at least .* GiB;"
    ) as caught:
        ours.lease(shards[2])
    assert time.monotonic() - started >= HURRIED.space
    needed = float(str(caught.value).split("set data.cache_gib to ")[1].split()[0])
    assert 3 * SIZE <= needed * 2**30 <= 3.2 * SIZE
    assert not list(ours.folder.glob("*.tmp"))
    with pytest.raises(CacheFullError):
        ours.prefetch(shards[3])
    larger = Cache(replace(ours.settings, limit=int(needed * 2**30) + 1000))
    os.close(larger.lease(shards[2]).file)
    for lease in leases:
        os.close(lease.file)
    with pytest.raises(CacheFullError):  # and one that can never fit, at once
        cache(tmp_path / "tiny", tars=0.5, space=1e9).lease(shards[0])


def test_reader_in_need_lets_its_own_shards_go(tmp_path, server, shards):
    ours = cache(tmp_path, tars=1.5)
    leases = [ours.lease(shards[0])]
    os.close(ours.lease(shards[1], lambda: os.close(leases.pop().file) if leases else None).file)
    assert held(ours) == [f"{shards[1].key}.tar"]


def test_prefetch_keeps_what_is_needed_sooner(tmp_path, server, shards):
    ours = cache(tmp_path)
    keep = [shard.key for shard in shards[:3]]
    for shard in shards[:3]:
        ours.prefetch(shard, keep)
    with pytest.raises(CacheFullError):
        ours.prefetch(shards[3], keep)
    ours.prefetch(shards[3], keep[1:])
    assert held(ours) == sorted(f"{shards[n].key}.tar" for n in (1, 2, 3))
    ours.prefetch(shards[3], keep[1:])
    assert len(server.asked("s-003.tar")) == 1


def altered(handler, content, start, stop):
    in_order(handler, content[:700] + bytes([content[700] ^ 1]) + content[701:], start, stop)


def test_content_is_checked_before_it_counts(tmp_path, server, shards, folder):
    ours = cache(tmp_path)
    server.faults = [in_order, altered]
    assert leased(ours, shards[0]) == (folder / "s-000.tar").read_bytes()
    assert len(server.asked("s-000.tar")) == 2
    server.always = altered
    with pytest.raises(UserError, match=r"content of shard .*s-001\.tar changed; got xxh3-128 \w+; expected \w+"):
        ours.lease(shards[1])
    server.always = None
    with pytest.raises(UserError, match=r"size of shard .*s-001\.tar changed"):
        ours.lease(shards[1]._replace(size=SIZE - 1))
    assert held(ours) == [f"{shards[0].key}.tar"]


def test_leftovers_of_dead_fetchers_are_removed(tmp_path, server, shards):
    ours = cache(tmp_path)
    dead, alive = [f"{number:032x}-c800" for number in range(3)], f"{3:032x}-c800"
    for key, suffix in zip([*dead, *2 * [shards[0].key]], ("tmp", "idx", "lock", "tmp", "idx"), strict=True):
        (ours.folder / f"{key}.{suffix}").write_bytes(bytes(2 * SIZE))
    (ours.folder / f"{alive}.tmp").write_bytes(b"coming")
    with open(ours.folder / f"{alive}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        leased(ours, shards[0])
    names = {path.name for path in ours.folder.iterdir()}
    assert names == {
        f"{alive}.tmp",
        f"{alive}.lock",
        "space.lock",
        *(f"{shards[0].key}.{s}" for s in ("tar", "idx", "lock")),
    }


def test_tar_without_index_is_identified_once(tmp_path, server, shards, folder):
    ours = cache(tmp_path)
    assert ours.identify(shards[2].url) == (4, shards[2])
    assert ours.holds(shards[2])
    assert cache(tmp_path).identify(shards[2].url) == (4, shards[2])
    leased(ours, shards[2])
    assert len(server.asked("s-002.tar")) == 1
    server.files["/s-002.tar"] = (folder / "s-003.tar").read_bytes()  # another version, by its ETag
    assert ours.identify(shards[2].url) == (4, shards[3]._replace(url=shards[2].url))
    server.files["/s-002.tar"] = (folder / "s-003.tar").read_bytes()[:2000]
    with pytest.raises(UserError, match=r"damaged tar http://.*s-002\.tar: the file is cut"):
        ours.identify(shards[2].url)


def test_tar_that_changes_while_it_is_read_is_refused(tmp_path, server, shards, folder):
    def swapping(handler, content, start, stop):
        server.files["/s-002.tar"] = (folder / "s-003.tar").read_bytes()
        in_order(handler, content, start, stop)

    server.faults = [in_order, swapping]
    with pytest.raises(UserError, match=r"s-002\.tar changed while it was read"):
        cache(tmp_path).identify(shards[2].url)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_stopped_fetcher_is_named_not_waited_for_ever(tmp_path, server, shards):
    ours = cache(tmp_path, deadline=0.1, min_rate=1e12)
    with open(ours.folder / f"{shards[0].key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process has held .*; remedy: look for a stopped process"):
            ours.lease(shards[0])


def test_locks_of_removed_files_do_not_count(tmp_path, monkeypatch):
    """Between open and lock another process may evict the shard, and remove both its tar and its lock file."""
    path = tmp_path / "file"

    def removing_first(descriptor, operation, flock=fcntl.flock):
        if path.exists() and path.read_bytes() == b"old":
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr("data_tools.remote.locks.fcntl.flock", removing_first)
    path.write_bytes(b"old")
    descriptor = try_lock(path)
    assert os.path.samestat(os.fstat(descriptor), os.stat(path))
    assert try_lock(path) is None
    os.close(descriptor)
    path.write_bytes(b"old")
    assert share(path) is None


def test_settings_are_plain_values(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_settings() == default_settings(str(tmp_path), 64.0)
    assert Cache(default_settings()).folder == tmp_path / "dualstream" / "shards"
    assert pickle.loads(pickle.dumps(default_settings(gib=0.5))).limit == 2**29
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the shard cache"):
        Cache(default_settings(str(tmp_path / "file" / "cache")))
