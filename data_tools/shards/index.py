"""The binary side-car of a tar: where every sample and every member lies, so that reading needs no walk.

Layout, little-endian:
    magic 8s | version u32 | bytes of the extension table u32 | samples n u64 | members m u64 | tar bytes u64
    | xxh3-128 of the tar 16s | xxh3-64 of all that follows u64
    | offset u64[n+1] | key hash u64[n] | first member u64[n+1]
    | (extension number, offset from the sample's start, bytes) u32[m, 3] | extensions, newline between
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.shards.commit import atomic_write
from data_tools.shards.tar import Entry, TarDamageError, split_name, walk

MAGIC = b"DSTRMIDX"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ16sQ")
HEADER_BYTES = _HEADER.size
_HASH_CHUNK = 1 << 22
_MAX_SPAN = 1 << 32


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

    def to_bytes(self) -> bytes:
        """The index file: the same for the same tar, whether written along with it or rebuilt by a walk."""
        table = "\n".join(self.extensions).encode()
        arrays = (self.offsets, self.key_hashes, self.first_member, self.members)
        body = b"".join(array.tobytes() for array in arrays) + table
        head = (MAGIC, VERSION, len(table), self.num_samples, len(self.members), self.tar_bytes, self.tar_hash)
        return _HEADER.pack(*head, xxhash.xxh3_64_intdigest(body)) + body


class IndexBuilder:
    """Collects samples in tar order; the writer and the walk both build through it, so their indexes are equal."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._hashes: list[int] = []
        self._first: list[int] = [0]
        self._members: list[tuple[int, int, int]] = []
        self._extensions: dict[str, int] = {}

    def add(self, key: str, start: int, members: list[tuple[str, int, int]]) -> None:
        """A sample at byte `start`, members as (extension, offset from `start`, bytes)."""
        self._offsets.append(start)
        self._hashes.append(key_hash(key))
        for extension, offset, size in members:
            number = self._extensions.setdefault(extension, len(self._extensions))
            self._members.append((number, offset, size))
        self._first.append(len(self._members))

    def finish(self, end: int, tar_bytes: int, tar_hash: bytes) -> Index:
        """`end` is the byte after the last sample."""
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


def build_index(tar: Path) -> Index:
    """Walk and hash a tar; raises TarDamageError where it is damaged or its samples are not contiguous and unique."""
    try:
        size = tar.stat().st_size
        if size == 0:
            raise TarDamageError(tar, 0, "the file is empty")
        with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            builder = IndexBuilder()
            end = _collect(buffer, tar, builder)
            return builder.finish(end, size, hash_file(tar))
    except FileNotFoundError:
        raise UserError(f"missing shard {tar}", remedy="check the path or copy the shard back") from None


def hash_file(path: Path) -> bytes:
    """xxh3-128 of a file."""
    state = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            state.update(chunk)
    return state.digest()


def _collect(buffer: mmap.mmap, tar: Path, builder: IndexBuilder) -> int:
    """Group consecutive entries of equal key into samples; returns where the archive's content ends."""
    seen: set[str] = set()
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    start = 0

    def flush() -> None:
        if key is not None:
            builder.add(key, start, [(extension, data - start, size) for extension, (data, size) in members.items()])

    entries = _Returning(walk(buffer, tar))
    for entry in entries:
        name = split_name(entry.name)
        if name is None:
            continue
        if name[0] != key:
            flush()
            key, start, members = name[0], entry.start, {}
            if key in seen:
                raise TarDamageError(tar, start, f"key {key!r} again after other samples (duplicate or not contiguous)")
            seen.add(key)
        _add_member(members, name[1], entry, start, tar)
    flush()
    return entries.value


class _Returning:
    """Iterates a generator and keeps what it returns."""

    def __init__(self, generator):
        self._generator = generator
        self.value = 0

    def __iter__(self):
        self.value = yield from self._generator


def _add_member(members: dict[str, tuple[int, int]], extension: str, entry: Entry, start: int, tar: Path) -> None:
    if extension in members:
        raise TarDamageError(tar, entry.start, f"member {entry.name!r} twice in one sample")
    if entry.data + entry.size - start >= _MAX_SPAN:
        raise TarDamageError(tar, entry.start, "a sample beyond 4 GiB")
    members[extension] = (entry.data, entry.size)


def write_index(index: Index, path: Path) -> None:
    """Commit an index file."""
    with atomic_write(path) as file:
        file.write(index.to_bytes())


def open_index(path: Path, check: bool = False) -> Index:
    """Map an index file; `check` also hashes its body. Raises UserError when it is not an index of this version."""

    def refuse(what: str, got: object = None, expected: object = None) -> UserError:
        tar = path.with_suffix(".tar")
        return UserError(f"{what} {path}", got=got, expected=expected, remedy=f"run `python -m data_tools index {tar}`")

    try:
        with open(path, "rb") as file:
            buffer: bytes | mmap.mmap = b""
            if path.stat().st_size >= _HEADER.size:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise refuse("missing index") from None
    if len(buffer) < _HEADER.size or buffer[:8] != MAGIC:
        raise refuse("not an index:", repr(bytes(buffer[:8])), repr(MAGIC))
    _, version, table_bytes, n, m, tar_bytes, tar_hash, body_hash = _HEADER.unpack(buffer[: _HEADER.size])
    if version != VERSION:
        raise refuse("index of another version:", version, VERSION)
    size = _HEADER.size + 8 * (3 * n + 2) + 12 * m + table_bytes
    if size != len(buffer):
        raise refuse("index cut or altered:", f"{len(buffer)} bytes", f"{size} bytes")
    if check and xxhash.xxh3_64_intdigest(buffer[_HEADER.size :]) != body_hash:
        raise refuse("index altered (its hash does not match):")
    end = size - table_bytes
    numbers = np.frombuffer(buffer, "<u8", 3 * n + 2, _HEADER.size)
    offsets, key_hashes, first_member = np.split(numbers, [n + 1, 2 * n + 1])
    members = np.frombuffer(buffer, "<u4", 3 * m, end - 12 * m).reshape(m, 3)
    table = bytes(buffer[end:]).decode()
    extensions = tuple(table.split("\n")) if table else ()
    return Index(tar_bytes, tar_hash, offsets, key_hashes, first_member, members, extensions)


def index_header(path: Path) -> tuple[int, int, bytes]:
    """(samples, tar bytes, tar hash) of an index file."""
    index = open_index(path)
    return index.num_samples, index.tar_bytes, index.tar_hash


def parse_header(data: bytes, name: str) -> tuple[int, int, bytes]:
    """The same of the first HEADER_BYTES of an index that lies elsewhere; `name` is for the error."""
    if len(data) < HEADER_BYTES or data[:8] != MAGIC or _HEADER.unpack(data[:HEADER_BYTES])[1] != VERSION:
        remedy = "write it again with `python -m data_tools index`"
        raise UserError(f"not an index of version {VERSION}: {name}", got=repr(data[:12]), remedy=remedy)
    _, _, _, samples, _, tar_bytes, tar_hash, _ = _HEADER.unpack(data[:HEADER_BYTES])
    return samples, tar_bytes, tar_hash
