"""Tars, indexes and manifests that somebody made to go wrong, and files that change under an open reader."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile

import numpy as np
import pytest
import xxhash

from data_tools.__main__ import main
from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.files import FileBytes, opened
from data_tools.format.index import HEADER_BYTES, index_path, open_index
from data_tools.format.manifest import Manifest, ShardRecord, write_manifest
from data_tools.format.survey import build_index, survey_tar
from data_tools.format.tar import BLOCK, TarDamageError, TarLayoutError, walk
from data_tools.format.writer import write_shard
from packing import jpeg

pytestmark = pytest.mark.timeout(60)
SAMPLES = [(f"key{number}", {"jpg": bytes([number]) * 700, "txt": b"text"}) for number in range(6)]


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with this very size field and the checksum that POSIX asks for."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(record: bytes) -> bytes:
    return header("pax", b"%011o" % len(record), b"x") + padded(record)


SOUND = header("z.jpg", b"00000000004") + padded(b"good")
END = bytes(2 * BLOCK)
CRAFTED = {
    "negative size of a name header": header("a", b"-0000001000", b"L"),
    "negative size of a pax header": header("a", b"-0000001000", b"x"),
    "negative size of a link header": header("a", b"-0000001000", b"K"),
    "negative size of a file": header("a.jpg", b"-0000001000"),
    "binary negative size": header("a.jpg", b"\xff" * 12),
    "size with a sign": header("a.jpg", b"+0000000004") + padded(b"data"),
    "size with an underscore": header("a.jpg", b"0000000_004") + padded(b"data"),
    "size beyond the file": header("a.jpg", b"77777777777"),
    "binary size of 2**87": header("a.jpg", b"\x80" + b"\x7f" * 11),
    "name header that claims 8 GiB": header("a", b"77777777777", b"L"),
    "pax length of 5000 digits": pax(b"9" * 5000 + b" path=a.jpg\n"),
    "pax length of 5000 zeros": pax(b"0" * 5000 + b"12 path=a.jpg\n"),
    "pax length 0": pax(b"0 path=a.jpg\n"),
    "pax length beyond its header": pax(b"999 path=a.jpg\n"),
    "pax length that is no number": pax(b"\xb2\xb3 path=a.jpg\n"),
    "negative pax size": pax(b"13 size=-600\n") + header("a.jpg", b"00000000004") + padded(b"data"),
    "pax size of 5000 digits": pax(b"5011 size=" + b"9" * 5000 + b"\n") + header("a.jpg", b"0"),
    "pax header of two MiB": pax(b"%d comment=" % (2 << 20) + b"x" * (2 << 20)),
    "name header without a name": header("a", b"0", b"L") + header("a.jpg", b"0"),
}


@pytest.mark.parametrize("crafted", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_header_is_named_and_the_rest_is_indexed(tmp_path, crafted, capsys):
    path = tmp_path / "s.tar"
    following = header("y.jpg", b"00000000004") + padded(b"next")  # its name stands in the header before it, if any
    path.write_bytes(crafted + following + SOUND + END)
    survey = survey_tar(path)
    nameless = crafted[156:157] in (b"L", b"K", b"x") and b"a.jpg\0" not in crafted
    assert (survey.damages, survey.index.lost, survey.index.num_samples) == (1, 1, 2 if nameless else 3)
    with ShardReader(open_corpus(path)) as reader:
        found = [reader.read(0, place).members for place in range(1, survey.index.num_samples)]
        assert found == ([] if nameless else [{"jpg": b"next"}]) + [{"jpg": b"good"}]
        with pytest.raises(TarDamageError, match="was lost"):
            reader.read(0, 0)
    path.write_bytes(crafted + END)  # nothing is left
    index_path(path).unlink()
    assert main(["index", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.out + printed.err


@pytest.mark.parametrize("crafted", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_header_behind_a_sound_index_is_a_damaged_sample(tmp_path, crafted):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    sound = path.read_bytes()
    corpus = open_corpus(path)
    path.write_bytes((crafted + sound[len(crafted) :])[: len(sound)])
    with ShardReader(corpus) as reader, pytest.raises(TarDamageError):
        reader.read(0, 0)


def test_pax_records_mean_what_tarfile_says(tmp_path):
    """A size in a pax record wins over the header's; an empty tail and other records change nothing."""
    path = tmp_path / "s.tar"
    record = b"12 size=600\n" + b"18 path=dir/a.jpg\n" + b"15 comment=x y\n"
    content = pax(record) + header("short.jpg", b"00000000003") + padded(b"d" * 600) + SOUND + END
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        expected = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}
    assert len(expected["dir/a.jpg"]) == 600
    with ShardReader(open_corpus(path)) as reader:
        samples = [reader.read(0, place) for place in range(2)]
    assert {f"{s.key}.{kind}": data for s in samples for kind, data in s.members.items()} == expected


def test_a_global_header_that_names_every_file_is_refused(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "all.jpg"}) as tar:
        for name in ("a.jpg", "b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    with tarfile.open(path) as tar:
        assert [member.name for member in tar] == ["all.jpg", "all.jpg"]
    with pytest.raises(TarLayoutError, match="names every file"):
        build_index(path)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a commit"}) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert build_index(path).num_samples == 1


def rehash(index: bytearray) -> bytes:
    index[56:64] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(index[64:])))
    return bytes(index)


def with_number(index: bytes, at: int, kind: str, value: int) -> bytes:
    changed = bytearray(index)
    struct.pack_into(kind, changed, at, value)
    return rehash(changed)


N, M = len(SAMPLES), 2 * len(SAMPLES)
OFFSETS, FIRST = HEADER_BYTES, HEADER_BYTES + 8 * (2 * N + 1)
MEMBERS = HEADER_BYTES + 8 * (3 * N + 2)
CLAIMS = {
    "offset 2**40": (OFFSETS + 8, "<Q", 1 << 40),
    "offset 2**63": (OFFSETS + 8 * N, "<Q", 1 << 63),
    "offsets that fall": (OFFSETS + 8, "<Q", 0xFFFF),
    "last offset outside the tar": (OFFSETS + 8 * N, "<Q", 1 << 20),
    "first member 2**63": (FIRST + 8, "<Q", 1 << 63),
    "first member beyond": (FIRST + 8 * N, "<Q", M + 1),
    "a sample without members": (FIRST + 8, "<Q", 0),
    "extension that is not there": (MEMBERS, "<I", 7),
    "member before its sample's header": (MEMBERS + 4, "<I", 0),
    "member of 4 GiB": (MEMBERS + 8, "<I", 0xFFFFFFFF),
    "member behind its sample": (MEMBERS + 4, "<I", 1 << 30),
    "2**40 samples": (16, "<Q", 1 << 40),
    "2**64 - 1 samples": (16, "<Q", (1 << 64) - 1),
    "2**60 members": (24, "<Q", 1 << 60),
    "extensions of 4 GiB": (12, "<I", 0xFFFFFFFF),
    "a tar of 2**64 - 1 bytes": (32, "<Q", (1 << 64) - 1),
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_an_index_that_claims_what_cannot_be_is_refused(tmp_path, claim):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    index_path(path).write_bytes(with_number(index_path(path).read_bytes(), *claim))
    with pytest.raises(UserError, match=r"index.*data_tools index"):
        open_index(index_path(path))
    with pytest.raises(UserError, match=r"index.*data_tools index"), ShardReader(open_corpus(path)) as reader:
        reader.read(0, 0)


def test_a_sparse_index_of_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    samples = 1 << 35
    size = 8 * (3 * samples + 2)
    with open(index_path(path), "wb") as file:
        file.write(struct.pack("<8sIIQQQ16sQ", b"DSTRMIDX", 1, 0, samples, 0, 1 << 50, bytes(16), 0))
        file.truncate(HEADER_BYTES + size)
    with pytest.raises(UserError, match="samples with 0 members in a tar of"):
        open_corpus(path)


@pytest.mark.parametrize("name", ["s.tar", "s.idx", "manifest.json"])
def test_pipes_folders_and_links_to_nowhere_are_refused_at_once(tmp_path, name, capsys):
    packed(tmp_path)
    path = tmp_path / name
    source = tmp_path if name == "manifest.json" else tmp_path / "s.tar"
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        if path.exists() or name != "s.idx":  # an index that is not there is made
            with pytest.raises(UserError), ShardReader(open_corpus(source)) as reader:
                reader.read(0, 0)
        for verb in (["verify"], ["index"], ["preview"]):
            rest = [str(tmp_path / "p.html")] if verb == ["preview"] else []
            main([*verb, str(source), *rest])
            printed = capsys.readouterr()
            assert printed.err.count("\n") <= 1
            assert "Traceback" not in printed.out + printed.err


def test_a_sparse_tar_of_a_terabyte_is_not_read(tmp_path, capsys):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    index_path(path).unlink()
    os.truncate(path, 1 << 40)
    for verb in ("index", "verify"):
        assert main([verb, str(path)]) == 1
        assert "bytes that were never written" in capsys.readouterr().out


def test_a_sparse_manifest_of_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="too large; got 1099511627776 bytes"):
        open_corpus(tmp_path)


def packed(folder, **changes: object):
    index = write_shard(folder / "s.tar", SAMPLES)
    record = ShardRecord("s", index.num_samples, index.tar_bytes, index.tar_hash.hex(), rows=N)
    totals = {"samples": N, "rows": N, "bytes": index.tar_bytes, "skipped": {}}
    write_manifest(Manifest({}, "digest", {}, (record,), (), totals), folder)
    content = json.loads((folder / "manifest.json").read_text())
    for place, value in changes.items():
        target, _, field = place.rpartition("__")
        (content["shards"][0] if target == "shard" else content["totals"] if target else content)[field] = value
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        *({"shard__name": name} for name in ("../s", "/etc/s", "a/s", "..", ".s", "", "s\0", "a\\s", 7, None, ["s"])),
        *({"shard__samples": count} for count in (-1, 6.0, "6", True, None, 1 << 70, 1e300, [6], 10**9)),
        *({"shard__bytes": count} for count in (-1, 1.5, "9", False, 1 << 63)),
        *({"shard__xxh3_128": text} for text in ("", "0" * 31, "g" * 32, 5, None, "0" * 5000)),
        *({"shard__skipped": value} for value in ([], {"a": -1}, {"a": "b"}, 3)),
        *({"shards": value} for value in ({}, None, [1], "s", [[]], [{}])),
        *({"classes": value} for value in ("abc", [1], {}, None, [["a"]])),
        *({"config_digest": 1}, {"totals": []}, {"schema": "x"}, {"config": 0}),
        {"shard__samples": float("nan")},
        {"shard__bytes": float("inf")},
    ],
    ids=str,
)
def test_a_manifest_that_claims_what_cannot_be_is_refused(tmp_path, change):
    packed(tmp_path)
    assert open_corpus(tmp_path).num_samples == N
    packed(tmp_path, **change)
    with pytest.raises(UserError, match="manifest") as caught:
        open_corpus(tmp_path)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "name", ["config", "config_digest", "schema", "shards", "classes", "totals", "samples", "bytes"]
)
def test_a_manifest_without_a_field_is_refused(tmp_path, name):
    packed(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del (content if name in content else content["shards"][0])[name]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"lacks or misspells a field; got .*{name}"):
        open_corpus(tmp_path)


def test_a_manifest_of_bombs_is_refused(tmp_path):
    for text in ("[" * 200_000, '{"a":' * 100_000, "[" + "[]," * 4_000_000 + "[]]", '{"version": ' + "9" * 5000 + "}"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="manifest"):
            open_corpus(tmp_path)


@pytest.mark.parametrize("change", [{"samples": 7}, {"rows": 0}, {"bytes": 1}, {"skipped": {"a": 1}}], ids=str)
def test_verify_notices_totals_that_are_not_the_sum(tmp_path, change, capsys):
    packed(tmp_path, **{f"totals__{name}": value for name, value in change.items()})
    assert main(["verify", str(tmp_path)]) == 1
    assert f"total of {next(iter(change))} is " in capsys.readouterr().out


def test_a_shard_named_twice_is_refused(tmp_path):
    packed(tmp_path)
    tar = tmp_path / "s.tar"
    os.symlink(tar, tmp_path / "link.tar")
    os.link(tar, tmp_path / "hard.tar")
    for name in ("link", "hard"):
        os.symlink(index_path(tar), tmp_path / f"{name}.idx")
    for twice in ([tar, tar], [tmp_path, tar], [f"{tmp_path}/{{s,s}}.tar"], [tar, tmp_path / "link.tar"]):
        with pytest.raises(UserError, match=r"shard .* is named twice"):
            open_corpus(twice)
    with pytest.raises(UserError, match="the same file as"):
        open_corpus([tar, tmp_path / "hard.tar"])
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"] *= 2
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="lists a shard twice; got s"):
        open_corpus(tmp_path)


def test_files_that_are_cut_under_an_open_reader_do_not_kill(tmp_path):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    with ShardReader(open_corpus(path)) as reader:
        first = reader.read(0, 0)
        os.truncate(index_path(path), 0)
        assert reader.read(0, 0) == first
        assert reader.read(0, 5).key == "key5"
        os.truncate(path, 2000)
        with pytest.raises(TarDamageError, match="ends inside a sample"):
            reader.read(0, 5)
    write_shard(path, [(f"{number:06d}", {"jpg": bytes(5000)}) for number in range(100)])
    with opened(path) as file:
        entries = walk(FileBytes(file), path)
        next(entries)
        os.truncate(path, 8000)
        with pytest.raises(TarDamageError):
            list(entries)


def test_a_sample_that_claims_gigabytes_is_not_read(tmp_path):
    """The tar is sparse: it has the bytes, and nobody wants them in memory."""
    path = tmp_path / "s.tar"
    size = (1 << 31) + 512
    with open(path, "wb") as file:
        file.write(header("a.jpg", b"%011o" % size))
        file.truncate(BLOCK + size)
        file.seek(0, io.SEEK_END)
        file.write(SOUND)
        file.write(END)
    members = np.array([[0, BLOCK, size], [0, BLOCK, 4]], np.uint32)
    offsets, first = np.array([0, BLOCK + size, BLOCK + size + 1024], np.uint64), np.array([0, 1, 2], np.uint64)
    hashes = np.array([xxhash.xxh3_64_intdigest(key) for key in (b"a", b"z")], np.uint64)
    body = b"".join(array.tobytes() for array in (offsets, hashes, first, members)) + b"jpg"
    head = (b"DSTRMIDX", 1, 3, 2, 2, path.stat().st_size, bytes(16), xxhash.xxh3_64_intdigest(body))
    index_path(path).write_bytes(struct.pack("<8sIIQQQ16sQ", *head) + body)
    with ShardReader(open_corpus(path)) as reader:
        with pytest.raises(TarDamageError, match=r"at most \d+ are read"):
            reader.read(0, 0)
        assert reader.read(0, 1).members == {"jpg": b"good"}


def test_names_that_a_terminal_would_obey_are_shown_harmless(tmp_path, capsys):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a\x1b[31m\n.jpg", "b.jpg", "a\x1b[31m\n.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"data"))
    assert main(["index", str(path)]) == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "tar --sort=name" in printed.out
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.\x1b[31m", "a.two\nlines", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg())
            tar.addfile(info, io.BytesIO(jpeg()))
    assert main(["index", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert open_index(index_path(path)).extensions == ("jpg",)
