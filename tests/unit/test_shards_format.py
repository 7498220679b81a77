"""The shard format: bytes, index layout, and reading against Python's tarfile as the reference."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.index import index_path, open_index
from data_tools.format.survey import build_index
from data_tools.format.writer import write_shard

SAMPLES = [
    ("a1", {"txt": b"first", "jpg": b"\xff\xd8" + bytes(700), "json": b"{}"}),
    ("b2", {"jpg": b"", "txt": b"x" * 512}),
    ("c3", {"seg.png": b"dotted extension", "cls": b"7"}),
]


def by_tarfile(path) -> dict[str, dict[str, bytes]]:
    """Samples as WebDataset groups them, read with Python's tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                key = f"{folder}/{key}" if folder else key
                found.setdefault(key, {})[extension.lower()] = tar.extractfile(member).read()
    return found


def test_same_samples_give_the_same_bytes_and_members_are_plain(tmp_path):
    for name in ("one", "two"):
        write_shard(tmp_path / f"{name}.tar", SAMPLES)
    for suffix in ("tar", "idx"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["a1.jpg", "a1.json", "a1.txt"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}
    assert sorted(os.listdir(tmp_path)) == ["one.idx", "one.tar", "two.idx", "two.tar"]


def test_index_file_has_the_documented_layout(tmp_path):
    tar = tmp_path / "s.tar"
    write_shard(tar, SAMPLES)
    data, content = (tmp_path / "s.idx").read_bytes(), tar.read_bytes()
    magic, version, table, n, m, size, digest, body = struct.unpack_from("<8sIIQQQ16sQ", data)
    assert (magic, version, n, m, size) == (b"DSTRMIDX", 1, 3, 7, len(content))
    assert digest == xxhash.xxh3_128_digest(content)
    assert body == xxhash.xxh3_64_intdigest(data[64:])
    offsets = struct.unpack_from("<4Q", data, 64)
    hashes = struct.unpack_from("<3Q", data, 96)
    first = struct.unpack_from("<4Q", data, 120)
    assert hashes == tuple(xxhash.xxh3_64_intdigest(key.encode()) for key, _ in SAMPLES)
    assert first == (0, 3, 5, 7)
    assert content[offsets[1] : offsets[1] + 6] == b"b2.jpg"
    assert not any(content[offsets[3] :])
    extensions = data[len(data) - table :].decode().split("\n")
    for sample, (_, members) in enumerate(SAMPLES):
        for row in range(first[sample], first[sample + 1]):
            extension, at, length = struct.unpack_from("<3I", data, 152 + 12 * row)
            start = offsets[sample] + at
            assert content[start : start + length] == members[extensions[extension]]


def test_reader_returns_what_was_written(tmp_path):
    write_shard(tmp_path / "s.tar", SAMPLES)
    corpus = open_corpus(tmp_path / "s.tar")
    reader = pickle.loads(pickle.dumps(ShardReader(corpus)))
    for place, (key, members) in enumerate(SAMPLES):
        assert reader.read(0, place) == (key, xxhash.xxh3_64_intdigest(key.encode()), members)
        assert reader.sample_id(0, place) == xxhash.xxh3_64_intdigest(key.encode())
    for place in (-1, 3):
        with pytest.raises(IndexError):
            reader.read(0, place)


NAMES = st.text("abcXYZ019_-", min_size=1, max_size=12)
MEMBERS = st.dictionaries(
    st.sampled_from(["jpg", "TXT", "json", "seg.png", "cls"]), st.binary(max_size=1500), min_size=1
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(NAMES, MEMBERS, min_size=1, max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(["", "./", "folder.with.dots/", "x" * 120 + "/", "bücher/"]),
    st.booleans(),
)
def test_reader_agrees_with_tarfile_on_tars_of_other_tools(tmp_path, samples, kind, prefix, with_folder):
    path = tmp_path / "foreign.tar"
    index_path(path).unlink(missing_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        if with_folder:
            folder = tarfile.TarInfo("empty.folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{prefix}{key}.{extension}")
                info.size, info.mtime = len(data), 1234.5
                tar.addfile(info, io.BytesIO(data))
    corpus = open_corpus(path)
    with ShardReader(corpus) as reader:
        found = {sample.key: sample.members for sample in (reader.read(0, i) for i in range(corpus.num_samples))}
    assert found == by_tarfile(path)
    assert list(found) == [prefix + key for key in samples]


def test_webdataset_groups_the_same_samples(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "foreign.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key in ("00/one", "00/two"):
            writer.write({"__key__": key, "JPG": key.encode(), "txt": b"text"})
    theirs = [{k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")} for sample in
              webdataset.WebDataset(str(path), shardshuffle=False)]  # fmt: skip
    with ShardReader(open_corpus(path)) as reader:
        ours = [{"__key__": s.key, **s.members} for s in (reader.read(0, i) for i in range(2))]
    assert ours == theirs


def test_few_files_stay_open_however_many_threads_read(tmp_path):
    for number in range(6):
        write_shard(tmp_path / f"s{number}.tar", SAMPLES)
    corpus = open_corpus(str(tmp_path / "s{0..5}.tar"))
    reader = ShardReader(corpus, max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    faults: list[Exception] = []

    def read_all(seed: int) -> None:
        try:
            for shard in np.random.default_rng(seed).integers(0, 6, 300).tolist():
                assert reader.read(shard, shard % 3)[::2] == SAMPLES[shard % 3]
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 2  # a tar and its mapped index each
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert reader.read(0, 0).key == "a1"


def test_reader_notices_a_tar_that_is_not_the_indexed_one(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    corpus = open_corpus(path)
    content = bytearray(path.read_bytes())
    content[0:2] = b"zz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="sample 0 is not the one in the index at byte 0"):
        ShardReader(corpus).read(0, 0)
    assert ShardReader(corpus).read(0, 1).key == "b2"


def test_writer_refuses_what_would_not_read_back(tmp_path):
    path = tmp_path / "s.tar"
    for samples, fault in (
        ([("b", {"txt": b""}), ("a", {"txt": b""})], "keys must rise"),
        ([("a", {"txt": b""}), ("a", {"txt": b""})], "keys must rise"),
        ([("a.b", {"txt": b""})], "not a WebDataset name"),
        ([("a", {"TXT": b""})], "not a WebDataset name"),
        ([("a" * 200, {"txt": b""})], "key too long"),
    ):
        with pytest.raises(ValueError, match=fault):
            write_shard(path, samples)
    assert os.listdir(tmp_path) == []


def test_index_of_a_written_shard_equals_the_index_of_a_walk(tmp_path):
    path = tmp_path / "s.tar"
    written = write_shard(path, SAMPLES)
    assert written.to_bytes() == build_index(path).to_bytes() == open_index(index_path(path), check=True).to_bytes()
