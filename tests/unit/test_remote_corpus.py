"""Corpora of remote shards: the same content as the local copy, with few requests, and nothing secret in sight."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.manifest import Manifest, ShardRecord, write_manifest
from data_tools.format.tar import TarDamageError
from data_tools.index import run as index_verb
from data_tools.remote.settings import CacheSettings
from packing import ROOT
from remote_servers import HURRIED, http_server, s3_server, upload, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("packed"), 3)


@pytest.fixture
def server(folder):
    with http_server() as server:
        server.serve(folder, "set/")
        yield server


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as url:
        yield url


@pytest.fixture
def settings(tmp_path):
    return CacheSettings(str(tmp_path / "cache"), 1 << 24, HURRIED)


def samples(corpus):
    with ShardReader(corpus) as reader:
        return [reader.read(shard, index) for shard, n in enumerate(corpus.counts) for index in range(n)]


def test_every_source_is_the_local_corpus(server, folder, settings):
    local = open_corpus(folder)
    base = server.url("set")
    for source, classes, requests in (
        (base, ("cat", "dog"), {"manifest.json"}),
        (f"{base}/", ("cat", "dog"), {"manifest.json"}),
        (f"{base}/manifest.json", ("cat", "dog"), {"manifest.json"}),
        (f"{base}/s-{{000..002}}.tar", (), {"s-000.idx", "s-001.idx", "s-002.idx"}),
        ([f"{base}/s-{n:03d}.tar" for n in range(3)], (), {"s-000.idx", "s-001.idx", "s-002.idx"}),
    ):
        server.requests.clear()
        corpus = open_corpus(source, settings)
        assert {os.path.basename(path) for path, *_ in server.requests} == requests
        assert corpus.digest == local.digest
        assert corpus.hashes == local.hashes
        assert tuple(corpus.counts) == tuple(local.counts)
        assert corpus.paths == corpus.urls == tuple(f"{base}/s-{n:03d}.tar" for n in range(3))
        assert corpus.classes == classes
        assert corpus.cache == settings
    assert samples(corpus) == samples(local)
    assert local.cache is None
    assert local.remote(0) is None


def test_local_and_remote_shards_mix(server, folder, settings):
    corpus = open_corpus([folder / "s-000.tar", server.url("set/s-{001,002}.tar")], settings)
    assert corpus.digest == open_corpus(folder).digest
    assert corpus.remote(0) is None
    assert corpus.remote(1).hash == open_corpus(folder).hashes[16:32]
    assert samples(corpus) == samples(open_corpus(folder))


def test_tars_without_index_are_walked_in_the_cache(server, folder, settings, capsys):
    server.files = {name: data for name, data in server.files.items() if name.endswith(".tar")}
    for _ in range(2):
        corpus = open_corpus(server.url("set/s-{000..002}.tar"), settings)
        assert corpus.digest == open_corpus(folder).digest
    assert samples(corpus) == samples(open_corpus(folder))
    assert sum(len(server.asked(f"s-{n:03d}.tar")) for n in range(3)) == 3
    assert "3 remote tars without an index are read whole" in capsys.readouterr().err


def test_a_damaged_remote_tar_names_what_it_lost_with_an_index_and_without(server, folder, settings):
    server.files = {name: data for name, data in server.files.items() if name.endswith("s-001.tar")}
    (name, data), *_ = server.files.items()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[2].offset
    server.files[name] = data[:at] + b"?" + data[at + 1 :]
    url = server.url("set/s-001.tar")
    for _ in range(2):  # walked, and remembered
        corpus = open_corpus(url, settings)
        assert corpus.damaged == (f"{url} is damaged: at least 1 of 4 samples were lost before it was indexed",)
    server.files[name.replace(".tar", ".idx")] = next(Path(settings.folder).rglob("*.idx")).read_bytes()
    corpus = open_corpus(url, settings)
    assert corpus.damaged == (f"{url} is damaged: samples were lost before it was indexed",)
    with ShardReader(corpus) as reader, pytest.raises(TarDamageError, match="was lost"):
        [reader.read(0, place) for place in range(4)]


def test_readers_hold_few_remote_shards(server, folder, settings, monkeypatch):
    monkeypatch.setattr("data_tools.corpus.reader.REMOTE_OPEN", 2)
    corpus = open_corpus(server.url("set"), replace(settings, limit=int(2.2 * 51_200)))
    expected = samples(open_corpus(folder))
    with ShardReader(corpus) as reader:
        for _ in range(2):
            assert [reader.read(n, 0) for n in range(3)] == expected[::4]
        assert len(reader._opened) <= 2


def test_pickled_readers_carry_no_connection(server, settings):
    corpus = open_corpus(server.url("set"), settings)
    with ShardReader(corpus) as reader:
        reader.read(0, 0)
        data = pickle.dumps(reader)
    assert b"fsspec" not in data
    assert b"aiohttp" not in data
    assert pickle.loads(data).read(0, 0) == reader.read(0, 0)


def test_importing_starts_no_event_loop():
    """What the fork server preloads: a loop there would be copied into every worker, without its thread."""
    code = (
        "import threading, pretrain.stream.loader, data_tools.remote.cache, data_tools.remote.store, sys\n"
        "print([thread.name for thread in threading.enumerate()])\n"
        "print('fsspec.asyn' in sys.modules and sys.modules['fsspec.asyn'].loop)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "['MainThread']", done.stderr
    assert done.stdout.split("\n")[1] in ("False", "[None]")


def test_credentials_are_used_but_not_shown(server, folder, settings):
    secret = server.url("set", "user:pass-word@") + "?token=se-cret"
    corpus = open_corpus(secret, settings)
    assert corpus.urls[0] == server.url("set/s-000.tar", "user:pass-word@") + "?token=se-cret"
    assert corpus.paths[0] == f"http://***@127.0.0.1:{server.server_port}/set/s-000.tar?***"
    assert corpus.digest == open_corpus(folder).digest
    del server.files["/set/s-001.tar"]
    with ShardReader(corpus) as reader:
        reader.read(0, 0)
        with pytest.raises(UserError, match=r"no such object: .*s-001\.tar") as caught:
            reader.read(1, 0)
    assert "se-cret" not in str(caught.value)
    assert "pass-word" not in str(caught.value)
    for name in ("none", "set/s-{0..9.tar", "set/s-009.tar"):
        source = server.url(name, "user:pass-word@") + "?token=se-cret"
        with pytest.raises(UserError) as caught:
            open_corpus(source, settings)
        assert "se-cret" not in str(caught.value)
        assert "pass-word" not in str(caught.value)


def test_bad_remote_sources_are_named(server, settings, folder):
    server.files |= {
        "/bad/manifest.json": b"<html>",
        "/bad/s.tar": b"",
        "/bad/s.idx": b"not an index",
        "/empty/s.tar": bytes(10_240),
        "/other/s.tar": b"",
        "/other/s.idx": bytes(100),
    }
    for source, message in (
        ("none", r"no manifest\.json in http://.*/none; remedy"),
        ("bad", r"unreadable manifest http://.*/bad/manifest\.json"),
        ("bad/s.tar", r"http://.*/bad/s\.idx is too short"),
        ("other/s.tar", r"not an index: http://.*/other/s\.idx"),
        ("set/s-009.tar", r"no such object: http://.*/set/s-009\.tar"),
        ("set/s-{0..9.tar", "bad brace pattern"),
        ("empty/s.tar", r"no samples in http://.*/empty/s\.tar"),
    ):
        with pytest.raises(UserError, match=message):
            open_corpus(server.url(source), settings)


START = """
import json, pathlib, pickle, re, sys, time
from data_tools.corpus import open_corpus
from pretrain.stream.mixture import Alone
from pretrain.stream.order import Order
from pretrain.stream.position import ResumePoint
began = time.process_time()
corpus = open_corpus(sys.argv[1])
order = Order(corpus.counts, 7, 64, 16384)
slots = Alone(order, 32768, ResumePoint(0, 0, ((0, 0),))).batch(17_000, 64, 5)
seconds = time.process_time() - began
# Not getrusage, which counts what the process that forked this one held.
peak = int(re.search(r"VmHWM:\\s+([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
last = corpus.remote(99_999).hash.hex()
print(json.dumps([corpus.num_samples, len(slots.shards), seconds, peak, len(pickle.dumps(corpus)), last]))
"""


def test_a_billion_samples_start_quickly_and_small(server, tmp_path, repo_root):
    """A fresh process: the manifest of 100,000 shards, then the samples of a rank in the middle of an epoch."""
    records = tuple(ShardRecord(f"s-{n:06d}", 10_000, 300_000_000, f"{n:032x}") for n in range(100_000))
    write_manifest(Manifest({}, "digest", {}, records, (), {}), tmp_path)
    server.serve(tmp_path, "many/")
    done = subprocess.run(
        [sys.executable, "-c", START, server.url("many")], cwd=repo_root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    samples, batch, seconds, peak, pickled, last = json.loads(done.stdout)
    assert (samples, batch, last) == (1_000_000_000, 512, f"{99_999:032x}")
    assert seconds < 2  # of CPU, half of it when nothing else runs: a busy machine stretches it
    assert peak < 300  # MiB
    assert pickled < 12 << 20  # what a loader process is sent
    assert len(server.asked("manifest.json")) <= 2


def test_s3_folder_and_tars(bucket, folder, settings):
    upload(folder, "whole")
    corpus = open_corpus(f"{bucket}/whole", settings)
    assert corpus.digest == open_corpus(folder).digest
    assert samples(corpus) == samples(open_corpus(folder))
    with pytest.raises(UserError, match=r"no manifest\.json in s3://.*/nothing"):
        open_corpus(f"{bucket}/nothing", settings)


def test_index_verb_writes_beside_remote_tars(bucket, folder, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tars = tmp_path / "tars"
    tars.mkdir()
    for n in range(2):
        shutil.copy(folder / f"s-{n:03d}.tar", tars)
    (tars / "s-002.tar").write_bytes((folder / "s-002.tar").read_bytes()[:7000])
    upload(tars, "foreign")
    pattern = f"{bucket}/foreign/s-{{000..002}}.tar"
    with pytest.raises(UserError, match="1 of 3 tars have no index"):
        index_verb(arguments(pattern))
    printed = capsys.readouterr().out
    assert "indexed 2 of 3 tars, 8 samples" in printed
    assert "damaged tar s3://corpora/foreign/s-002.tar" in printed
    monkeypatch.setattr("data_tools.remote.cache.Cache.identify", lambda *_: pytest.fail("no index was found"))
    corpus = open_corpus(f"{bucket}/foreign/s-{{000..001}}.tar", settings)
    assert corpus.digest == open_corpus([folder / "s-000.tar", folder / "s-001.tar"]).digest


def arguments(pattern):
    from argparse import Namespace

    return Namespace(tars=[pattern], workers=1)
