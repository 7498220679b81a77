"""Crafted and damaged tars, indexes and manifests: one clear line or what is right; never a hang, a crash, much memory.

`DUALSTREAM_FUZZ=200000 pytest tests/unit/test_shards_fuzz.py` looks further than the few thousand mutations of a plain
run. The reference for what a tar holds is Python's tarfile.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.index import HEADER_BYTES, index_path, open_index
from data_tools.format.manifest import Manifest, ShardRecord, write_manifest
from data_tools.format.survey import Survey, survey_tar
from data_tools.format.tar import BLOCK, TarDamageError
from data_tools.format.writer import write_shard

EXAMPLES = int(os.environ.get("DUALSTREAM_FUZZ", "500"))
MEMORY = 32 << 20  # bytes beside the interpreter; the files here have some ten kilobytes
LONGEST = 2000  # characters of a message

pytestmark = pytest.mark.timeout(60 + EXAMPLES // 20)
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def bounded() -> Iterator[None]:
    """Lets UserErrors pass that are one printable line, and asserts that little memory was asked for."""
    message = ""
    tracemalloc.start()
    try:
        yield
    except UserError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message.isprintable()
    assert len(message) < LONGEST
    assert peak < MEMORY, f"{peak} bytes"


# ---- tars -----------------------------------------------------------------------------------------------------------


def tar_bytes(kind: int, prefix: str = "", **options: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, **options) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for key in range(4):
            for extension, data in (("jpg", bytes([key]) * 600), ("txt", b"text")):
                info = tarfile.TarInfo(f"{prefix}{key}.{extension}")
                info.size, info.mtime = len(data), 1234.5
                tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        tar.addfile(link)
    return file.getvalue()


TARS = [
    tar_bytes(tarfile.USTAR_FORMAT),
    tar_bytes(tarfile.USTAR_FORMAT, "p" * 80 + "/" + "q" * 40 + "/"),
    tar_bytes(tarfile.GNU_FORMAT, "l" * 150 + "/"),
    tar_bytes(tarfile.PAX_FORMAT, "l" * 150 + "/"),
    tar_bytes(tarfile.PAX_FORMAT, "\u00e9/", pax_headers={"comment": "of all"}),
]
NUMBERS = [b"-0000001000\0", b"-1", b"+7", b"0x10", b"1_0", b"00000010001", b"77777777777\0", b"\0" * 12, b" " * 12]
NUMBERS += [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\xff" * 11 + b"\x00", b"\x80" + bytes(10) + b"\x07", b"8", b"\t7\n"]
LENGTHS = [b"9" * 5000, b"0" * 5000 + b"27", b"-5", b"0", b"1", b"", b" ", b"+30", b"99", b"\xd9\xa3", b"3_0"]
RECORDS = [b"%s path=x.jpg\n" % length for length in LENGTHS] + [
    b"14 path=x.jpg\n",
    b"13 size=-600\n",
    b"12 size=600\n",
]
RECORDS += [
    b"27 GNU.sparse.name=abcdefgh\n",
    b"13 size=\xd9\xa3\n\n\n",
    b"5 a=\n" * 300,
    b"28 size=99999999999999999999\n",
]
FIELDS = {
    "name": (0, 100),
    "size": (124, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "prefix": (345, 155),
}
TYPES = [b"%c" % kind for kind in b"\0001234567LKxgXSDMVN"]
places = st.integers(0, 40)  # of a block
fields = st.one_of(
    st.tuples(st.just("size"), st.sampled_from(NUMBERS)),
    st.tuples(st.just("type"), st.sampled_from(TYPES)),
    st.tuples(st.sampled_from(sorted(FIELDS)), st.one_of(st.sampled_from(NUMBERS), st.binary())),
)
mutations = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 20_000), st.integers(1, 255)),
    st.tuples(st.just("field"), places, fields),
    st.tuples(st.just("cut"), st.integers(0, 20_000)),
    st.tuples(st.just("zeros"), places, st.integers(1, 3)),
    st.tuples(st.just("move"), places, places),
    st.tuples(st.just("extend"), places, st.tuples(st.sampled_from(b"xgXLK"), st.sampled_from(RECORDS))),
)


def with_checksum(block: bytes) -> bytes:
    """The block with the checksum that POSIX asks for: the sum of its bytes, with blanks in place of the checksum."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def extended_header(kind: int, data: bytes) -> bytes:
    """A header of kind x, g, L or K with its data."""
    info = tarfile.TarInfo("extended")
    info.size, info.type = len(data), bytes([kind])
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def mutate(tar: bytearray, what: str, *how) -> None:
    if what == "flip":
        if how[0] < len(tar):
            tar[how[0]] ^= how[1]
        return
    if what == "cut":
        del tar[how[0] :]
        return
    at = how[0] * BLOCK
    if at + BLOCK > len(tar):
        return
    if what == "field":
        field, value = how[1]
        start, size = FIELDS[field]
        block = bytes(tar[at : at + BLOCK])
        block = block[:start] + value[:size].ljust(size, b"\0") + block[start + size :]
        tar[at : at + BLOCK] = block if field == "checksum" else with_checksum(block)
    elif what == "zeros":
        tar[at : at + how[1] * BLOCK] = bytes(len(tar[at : at + how[1] * BLOCK]))
    elif what == "move":
        tar[how[1] * BLOCK : how[1] * BLOCK] = tar[at : at + BLOCK]
    else:
        tar[at:at] = extended_header(*how[1])


def by_tarfile(data: bytes) -> dict[str, bytes] | None:
    """The regular files of a tar; None where tarfile refuses it."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), errorlevel=2) as tar:
            members = list(islice(tar, len(data) // BLOCK))  # it walks in circles where a size is negative
            return {member.name: tar.extractfile(member).read() for member in members if member.isreg()}
    except (tarfile.TarError, ValueError, OverflowError, EOFError, OSError):
        return None


@fuzzed
@given(st.sampled_from(TARS), st.lists(mutations, min_size=1, max_size=3))
def test_any_tar_is_surveyed_or_refused_in_one_line(tmp_path, tar, changes):
    path = tmp_path / "fuzzed.tar"
    content = bytearray(tar)
    for change in changes:
        mutate(content, *change)
    path.write_bytes(content)
    with bounded():
        survey = survey_tar(path)
        index_path(path).write_bytes(survey.index.to_bytes())
        assert open_index(index_path(path), check=True).to_bytes() == survey.index.to_bytes()
        check_samples(path, survey, bytes(content))


def check_samples(path, survey: Survey, content: bytes) -> None:
    if not survey.index.num_samples:
        return
    found, lost = {}, 0
    with ShardReader(open_corpus(path)) as reader:
        for place in range(survey.index.num_samples):
            try:
                sample = reader.read(0, place)
            except TarDamageError:
                lost += 1
                continue
            found |= {f"{sample.key}.{extension}": data for extension, data in sample.members.items()}
    assert lost == survey.index.lost
    assert (lost > 0) == (survey.damages > 0)
    theirs = None if survey.damages else by_tarfile(content)
    if theirs is not None:
        lower = {name.lower(): data for name, data in theirs.items()}
        assert {name.lower(): data for name, data in found.items()}.items() <= lower.items()


# ---- indexes --------------------------------------------------------------------------------------------------------

WORDS = [0, 1, 2, 511, 512, 2**16, 2**31, 2**32 - 1, 2**32, 2**40, 2**50, 2**62, 2**63, 2**64 - 1]
index_changes = st.one_of(
    st.tuples(st.just("header"), st.sampled_from(range(8, 64, 4)), st.sampled_from(WORDS)),
    st.tuples(st.just("word"), st.integers(0, 80), st.sampled_from(WORDS)),
    st.tuples(st.just("flip"), st.integers(0, 400), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 400)),
    st.tuples(st.just("grow"), st.integers(1, 5000)),
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    samples = [(f"k{number}", {"jpg": bytes([number]) * 700, "txt": b"text"}) for number in range(4)]
    record = write_shard(folder / "s.tar", samples)
    shards = (ShardRecord("s", record.num_samples, record.tar_bytes, record.tar_hash.hex()),)
    write_manifest(Manifest({}, "digest", {}, shards, ("a", "b"), {"samples": 4}), folder)
    return folder / "s.tar", index_path(folder / "s.tar").read_bytes(), (folder / "manifest.json").read_bytes()


def change_index(index: bytearray, what: str, at: int, value: int = 0) -> None:
    if what == "cut":
        del index[at:]
    elif what == "grow":
        index.extend(bytes(at))
    elif what == "flip":
        if at < len(index):
            index[at] ^= value
    else:
        at = at if what == "header" else HEADER_BYTES + 4 * at
        width = 4 if what == "header" and at < 16 else 8
        if at + width <= len(index):
            index[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")


@fuzzed
@given(st.lists(index_changes, min_size=1, max_size=3), st.booleans())
def test_any_index_is_read_or_refused_in_one_line(shard, changes, hashed):
    tar, sound, _ = shard
    index = bytearray(sound)
    for change in changes:
        change_index(index, *change)
    if hashed:
        index[56:64] = xxhash.xxh3_64_digest(bytes(index[64:]))[::-1]
    index_path(tar).write_bytes(index)
    for source in (tar, tar.parent):
        with bounded():
            read_all(source)
    index_path(tar).write_bytes(sound)


def read_all(source) -> None:
    corpus = open_corpus(source)
    assert all(os.path.dirname(path) == str(tar_folder(source)) for path in corpus.paths)
    assert corpus.num_samples > 0
    with ShardReader(corpus) as reader:
        for place in range(min(int(corpus.counts[0]), 8)):
            with suppress(TarDamageError):
                sample = reader.read(0, place)
                assert sum(map(len, sample.members.values())) < MEMORY


def tar_folder(source):
    return source if source.is_dir() else source.parent


# ---- manifests ------------------------------------------------------------------------------------------------------

VALUES = [-1, 0, 1, 1.5, 1e300, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**100, True, None]
VALUES += ["", "x", "../s", "/s", "a/s", "..", ".", "s\0", "s\n", "\ud800", "s" * 100_000, "C:\\s", "0" * 32]
VALUES += [[], {}, [[]], {"a": {}}, [1], ["a", 1]]
FIELD_NAMES = ["format", "version", "config", "config_digest", "schema", "shards", "classes", "totals"]
SHARD_FIELDS = ["name", "samples", "bytes", "xxh3_128", "rows", "skipped", "parquet_xxh3_128", "unknown"]


@st.composite
def manifest_changes(draw):
    """(where in the manifest, new value); the value `KeyError` takes the field away."""
    value = draw(st.sampled_from([*VALUES, KeyError]))
    if draw(st.booleans()):
        return ("shards", 0, draw(st.sampled_from(SHARD_FIELDS))), value
    return (draw(st.sampled_from(FIELD_NAMES)),), value


def change_manifest(content: dict, where: tuple, value: object) -> None:
    for name in where[:-1]:
        try:
            content = content[name]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(content, dict):
        content[where[-1]] = copy.deepcopy(value) if value is not KeyError else None
        if value is KeyError:
            del content[where[-1]]


@fuzzed
@given(
    st.lists(manifest_changes(), min_size=1, max_size=2), st.integers(1, 3), st.integers(0, 2000), st.integers(0, 255)
)
def test_any_manifest_is_read_or_refused_in_one_line(shard, changes, copies, at, byte):
    tar, _, sound = shard
    content = json.loads(sound)
    for change in changes:
        change_manifest(content, *change)
    if isinstance(content.get("shards"), list):
        content["shards"] *= copies
    data = bytearray(json.dumps(content).encode())
    if byte and at < len(data):
        data[at] = byte
    (tar.parent / "manifest.json").write_bytes(data)
    with bounded():
        read_all(tar.parent)
    (tar.parent / "manifest.json").write_bytes(sound)


def test_numbers_of_headers_are_those_of_tarfile():
    from data_tools.format.tar import _number

    for field in [*NUMBERS, b"0000017\0", b"  644 \0", b"0000644 ", b"17\0garbage"]:
        try:
            theirs = tarfile.nti(field)
        except tarfile.HeaderError:
            theirs = None
        ours = _number(field)
        assert ours is None or ours == theirs, field
        assert ours is None or ours >= 0
    assert [_number(b"0000017\0"), _number(b"  644 \0"), _number(b"\x80" + bytes(10) + b"\x07")] == [15, 420, 7]
