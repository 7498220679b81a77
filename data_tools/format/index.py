"""The binary side-car of a tar: where every sample and every member lies, so that reading needs no walk.

Layout, little-endian:
    magic 8s | version u32 | bytes of the extension table u32 | samples n u64 | members m u64 | tar bytes u64
    | xxh3-128 of the tar 16s | xxh3-64 of all that follows u64
    | offset u64[n+1] | key hash u64[n] | first member u64[n+1]
    | (extension number, offset from the sample's start, bytes) u32[m, 3] | extensions, newline between
The version is 1, or 2 where the tar is damaged: a sample without members stands then for each that is known to be lost.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write
from data_tools.format.files import opened, read_span
from data_tools.format.tar import BLOCK, MAX_TAR

MAGIC = b"DSTRMIDX"
SOUND, DAMAGED = 1, 2  # versions
_HEADER = struct.Struct("<8sIIQQQ16sQ")
HEADER_BYTES = _HEADER.size
_HASH_CHUNK = 1 << 22
MAX_SPAN = 1 << 32
_MAX_BYTES = 1 << 30  # of an index: more than ten million samples in one tar


class IndexHeader(NamedTuple):
    """What the first bytes of an index say: samples and bytes of the tar, its xxh3-128, whether samples were lost."""

    samples: int
    tar_bytes: int
    tar_hash: bytes
    damaged: bool


@dataclass(frozen=True)
class Index:
    """One tar's index. n samples, m members.

    Shapes: offsets [n+1], key_hashes [n] (xxh3-64 of the key), first_member [n+1] (all uint64), members [m, 3] uint32.
    """

    tar_bytes: int
    tar_hash: bytes
    offsets: np.ndarray
    key_hashes: np.ndarray
    first_member: np.ndarray
    members: np.ndarray
    extensions: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """n, the samples of the tar."""
        return len(self.key_hashes)

    @property
    def nbytes(self) -> int:
        """Memory that its arrays take, roughly."""
        return 24 * self.num_samples + self.members.nbytes

    @property
    def lost(self) -> int:
        """Samples known to be lost, which stand in the index without members."""
        return int(np.count_nonzero(self.first_member[1:] == self.first_member[:-1]))

    def to_bytes(self) -> bytes:
        """The index file: the same for the same tar, whether written along with it or rebuilt by a walk."""
        table = "\n".join(self.extensions).encode("utf-8", "surrogateescape")
        arrays = (self.offsets, self.key_hashes, self.first_member, self.members)
        body = b"".join(array.tobytes() for array in arrays) + table
        version = DAMAGED if self.lost else SOUND
        head = (MAGIC, version, len(table), self.num_samples, len(self.members), self.tar_bytes, self.tar_hash)
        return _HEADER.pack(*head, xxhash.xxh3_64_intdigest(body)) + body


class IndexBuilder:
    """Collects samples in tar order; the writer and the walk both build through it, so their indexes are equal."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._hashes: list[int] = []
        self._first: list[int] = [0]
        self._members: list[tuple[int, int, int]] = []
        self._extensions: dict[str, int] = {}
        self._lost: list[int] = []

    def add(self, key: str, start: int, members: list[tuple[str, int, int]]) -> None:
        """A sample at byte `start`, members as (extension, offset from `start`, bytes)."""
        self._offsets.append(start)
        self._hashes.append(key_hash(key))
        for extension, offset, size in members:
            number = self._extensions.setdefault(extension, len(self._extensions))
            self._members.append((number, offset, size))
        self._first.append(len(self._members))

    def add_lost(self, start: int) -> None:
        """A sample that the tar no longer holds, in whose place byte `start` is."""
        self._lost.append(len(self._offsets))
        self._offsets.append(start)
        self._hashes.append(0)
        self._first.append(len(self._members))

    def finish(self, end: int, tar_bytes: int, tar_hash: bytes) -> Index:
        """`end` is the byte after the last sample."""
        for number in self._lost:  # an id that no key has, and no other tar
            self._hashes[number] = xxhash.xxh3_64_intdigest(
                tar_hash + struct.pack("<QQ", number, self._offsets[number])
            )
        return Index(
            tar_bytes,
            tar_hash,
            np.array([*self._offsets, end], np.uint64),
            np.array(self._hashes, np.uint64),
            np.array(self._first, np.uint64),
            np.array(self._members, np.uint32).reshape(-1, 3),
            tuple(self._extensions),
        )


def key_hash(key: str) -> int:
    """The 64-bit id of a sample."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies: beside it."""
    return tar.with_suffix(".idx")


def hash_file(path: Path) -> bytes:
    """xxh3-128 of a file."""
    state = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            state.update(chunk)
    return state.digest()


def write_index(index: Index, path: Path) -> None:
    """Commit an index file."""
    with atomic_write(path) as file:
        file.write(index.to_bytes())


def open_index(path: Path, check: bool = False) -> Index:
    """Read an index file; `check` also hashes its body. Raises UserError when it is missing, not an index of this
    version, or points outside its tar."""
    try:
        with opened(path) as file:
            header, counts = _read_header(path, file)
            body = read_span(file, _HEADER.size, counts.size)
    except FileNotFoundError:
        raise _refusal("missing index", path) from None
    if len(body) != counts.size - _HEADER.size:
        raise _refusal("index cut while it was read:", path)
    if check and xxhash.xxh3_64_intdigest(body) != counts.body_hash:
        raise _refusal("index altered (its hash does not match):", path)
    n, m = header.samples, counts.members
    end = len(body) - counts.table
    numbers = np.frombuffer(body, "<u8", 3 * n + 2)
    offsets, key_hashes, first_member = np.split(numbers, [n + 1, 2 * n + 1])
    members = np.frombuffer(body, "<u4", 3 * m, end - 12 * m).reshape(m, 3)
    table = body[end:].decode("utf-8", "surrogateescape")
    extensions = tuple(table.split("\n")) if table else ()
    index = Index(header.tar_bytes, header.tar_hash, offsets, key_hashes, first_member, members, extensions)
    fault = _fault(index, header.damaged)
    if fault:
        raise _refusal("damaged index", path, fault)
    return index


def index_header(path: Path) -> IndexHeader:
    """The header of an index file, whose size is checked against it. Raises UserError as `open_index`."""
    try:
        with opened(path) as file:
            return _read_header(path, file)[0]
    except FileNotFoundError:
        raise _refusal("missing index", path) from None


def parse_header(data: bytes, name: str) -> IndexHeader:
    """The same of the first HEADER_BYTES of an index that lies elsewhere; `name` is for the error."""
    parsed = _parse(data)
    if isinstance(parsed, str):
        raise UserError(f"not an index: {name}", got=parsed, remedy="write it again with `python -m data_tools index`")
    return parsed[0]


class _Counts(NamedTuple):
    """The rest of a header: bytes of the whole index and of the extension table, members, hash of the body."""

    size: int
    table: int
    members: int
    body_hash: int


def _read_header(path: Path, file: int) -> tuple[IndexHeader, _Counts]:
    parsed = _parse(read_span(file, 0, _HEADER.size))
    if isinstance(parsed, str):
        raise _refusal("not an index:", path, parsed)
    found, expected = os.fstat(file).st_size, parsed[1].size
    if found != expected:
        raise _refusal("index cut or altered:", path, f"{found} bytes", f"{expected} bytes")
    return parsed


def _parse(data: bytes) -> tuple[IndexHeader, _Counts] | str:
    """The header, or what is wrong with it. Counts that the tar cannot hold are refused at once."""
    if len(data) < _HEADER.size or data[:8] != MAGIC:
        return f"a file that begins with {data[:8]!r}"
    _, version, table, n, m, tar_bytes, tar_hash, body_hash = _HEADER.unpack(data[: _HEADER.size])
    if version not in (SOUND, DAMAGED):
        return f"version {version}, which this program does not know"
    size = _HEADER.size + 8 * (3 * n + 2) + 12 * m + table
    if tar_bytes > MAX_TAR or max(n, m) > tar_bytes // BLOCK + 1 or size > _MAX_BYTES:
        return f"{n} samples with {m} members in a tar of {tar_bytes} bytes"
    return IndexHeader(n, tar_bytes, tar_hash, version == DAMAGED), _Counts(size, table, m, body_hash)


def _fault(index: Index, damaged: bool) -> str | None:
    """What in an index does not fit together, so that a reader could go wrong; None: nothing."""
    offsets, first = index.offsets, index.first_member
    if (offsets[1:] < offsets[:-1]).any() or offsets[-1] > index.tar_bytes:
        return "offsets that do not rise, or lie outside the tar"
    if first[0] != 0 or first[-1] != len(index.members) or (first[1:] < first[:-1]).any():
        return "members that belong to no sample"
    counts = (first[1:] - first[:-1]).astype(np.int64)
    if (counts == 0).any() != damaged:
        return "samples without members"
    extension, at, size = index.members.astype(np.int64).T
    spans = np.repeat((offsets[1:] - offsets[:-1]).astype(np.int64), counts)
    if (extension >= len(index.extensions)).any() or (at < BLOCK).any() or (at + size > spans).any():
        return "members outside their sample"
    return None


def _refusal(what: str, path: Path, got: object = None, expected: object = None) -> UserError:
    remedy = f"run `python -m data_tools index {path.with_suffix('.tar')}`"
    return UserError(f"{what} {path}", got=got, expected=expected, remedy=remedy)
