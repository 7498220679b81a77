"""The cache touches its own files alone: others' in the same folder, and what links lead to, stay as they are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import product

import pytest

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.remote.cache import Cache
from data_tools.remote.settings import CacheSettings, Shard
from remote_servers import HURRIED, http_server, write_shards

SIZE = 51_200
FOREIGN = (
    *("poetry.lock", "space.lock", "a.tmp", "b.new", "c.idx", "d.tar", "d.idx", "e.json", "photos-000001.tar"),
    *(f"{7:032x}.json.bak", f"{7:032x}.tar.gz", f"{7:031x}-c800.tmp", f"{0xABC:032X}-c800.tmp", f"x{7:032x}-c800.tmp"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("packed"), 4)


@pytest.fixture
def shards(folder):
    hashes = open_corpus(folder).hashes
    with http_server() as server:
        server.serve(folder)
        yield [Shard(server.url(f"s-{n:03d}.tar"), SIZE, hashes[16 * n : 16 * n + 16]) for n in range(4)]


def cache(place):
    """Of a shard and a half, so that the second evicts the first."""
    return Cache(CacheSettings(str(place), int(1.5 * SIZE), replace(HURRIED, space=0.1)))


def use(ours, shards):
    """All that the cache does with files: bring, evict, clean up, identify."""
    for shard in shards:
        lease = ours.lease(shard)
        assert os.pread(lease.file, 1 << 20, 0)[:6]
        os.close(lease.file)
        ours.touch(shard)
    assert ours.identify(shards[0].url) == (4, shards[0])


def test_files_of_others_stay(tmp_path, shards):
    ours = cache(tmp_path)
    places = [tmp_path, tmp_path / "dualstream", ours.folder]
    for place in places:
        for name in FOREIGN:
            (place / name).write_bytes(bytes(3 * SIZE))
            os.utime(place / name, (0, 0))  # used least recently of all
    (ours.folder / "space.lock").unlink()
    for suffix in ("tmp", "idx", "lock", "tar"):  # our names, but no files
        (ours.folder / f"{8:032x}-c800.{suffix}").mkdir()
    use(ours, shards)
    for place in places:
        for name in FOREIGN:
            if (place, name) != (ours.folder, "space.lock"):
                assert (place / name).stat().st_size == 3 * SIZE, (place, name)
    assert len([path for path in ours.folder.iterdir() if path.is_dir()]) == 4


@pytest.mark.parametrize(
    ("link", "suffix"),
    [*product([os.symlink], ["tmp", "new", "idx", "tar", "json"]), *product([os.link], ["tmp", "new", "json"])],
)
def test_what_a_planted_link_leads_to_is_not_written(tmp_path, shards, link, suffix):
    ours, precious = cache(tmp_path / "cache"), tmp_path / "precious"
    precious.write_bytes(b"mine" * 100)
    identified = {"json": _record_key(ours, shards)}
    key = identified.get(suffix, shards[1].key)
    link(precious, ours.folder / f"{key}.{suffix}")
    use(ours, shards)
    lease = ours.lease(shards[1])
    assert os.pread(lease.file, 1 << 20, 0) != precious.read_bytes()
    os.close(lease.file)
    assert precious.read_bytes() == b"mine" * 100


def _record_key(ours, shards):
    ours.identify(shards[0].url)
    record = next(ours.folder.glob("*.json"))
    record.unlink()
    return record.stem


@pytest.mark.parametrize("make", [lambda path: os.symlink("/dev/null", path), os.mkfifo, os.mkdir])
def test_what_is_no_file_ends_the_use_with_its_name(tmp_path, shards, make):
    ours = cache(tmp_path)
    make(ours.folder / f"{shards[0].key}.lock")
    with pytest.raises(
        UserError, match=rf"cannot use .*{shards[0].key}\.lock of the shard cache; got .*; expected a file"
    ):
        ours.lease(shards[0])
    make(ours.folder / f"{shards[1].key}.tar")  # as if it were not there, as long as it can be replaced
    if make is os.mkdir:
        with pytest.raises(UserError, match=rf"{shards[1].key}\.tar of the shard cache; got Is a directory"):
            ours.lease(shards[1])
    else:
        os.close(ours.lease(shards[1]).file)


@pytest.mark.parametrize("name", ["dualstream", "dualstream/shards"])
def test_own_folder_is_no_link(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / name).parent.mkdir(parents=True)
    (tmp_path / "cache" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot use the shard cache .*; got a link; expected a folder of its own"):
        cache(tmp_path / "cache")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")  # what the user names may be one
    assert cache(tmp_path / "linked").folder.is_dir()


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[" * 5000,
        "null",
        "{}",
        '["4", 7]',
        '[4, "zz"]',
        '[-1, "00"]',
        '[4, "00"]',
        "[4.5, null]",
        "\ud800",
        "1e999",
    ],
)
def test_records_are_read_as_untrusted(tmp_path, shards, record):
    ours = cache(tmp_path)
    path = ours.folder / f"{_record_key(ours, shards)}.json"
    path.write_bytes(record.encode("utf-8", "surrogatepass"))
    assert ours.identify(shards[0].url) == (4, shards[0])
    assert json.loads(path.read_text()) == [4, shards[0].hash.hex()]
