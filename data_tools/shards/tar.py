"""Tar headers: the strict walk that indexing and verifying use, and the header a shard is written with.

Python's `tarfile` takes a damaged header for the end of the archive and stops without a word, so it cannot tell a whole
shard from half of one. The walk here checks every header's checksum and the end of the archive, and names the offset.
"""

import re
import tarfile
from collections.abc import Generator
from typing import NamedTuple, Protocol

from data_tools.errors import UserError

BLOCK = 512
RECORD = tarfile.RECORDSIZE
_ZERO = bytes(BLOCK)
_CHUNK = 1 << 20
_REGULAR = b"0\0" + b"7"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]+)", re.DOTALL)
_WEBDATASET_META = re.compile(r"__[^/]*__(/|$)")


class Buffer(Protocol):
    """Bytes, or a memory map of a tar."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice) -> bytes: ...


class Entry(NamedTuple):
    """A regular file in a tar: where its first header and its data start, its size and its name."""

    start: int
    data: int
    size: int
    name: str


class TarDamageError(UserError):
    """A tar that is cut, altered or not laid out as WebDataset reads it; `offset` is where, in bytes."""

    def __init__(self, path: object, offset: int, what: str):
        super().__init__(f"damaged tar {path}: {what} at byte {offset}")
        self.offset = offset
        self.what = what


class _Header(NamedTuple):
    kind: bytes
    name: str
    size: int


def member_header(name: str, size: int) -> bytes:
    """A USTAR header that depends on nothing but name and size, so that a re-run writes the same bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> int:
    """Zero bytes that follow `size` bytes of data up to the next block."""
    return -size % BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's rule: (key, extension) at the first dot of the base name; None for a name without either."""
    match = _SAMPLE_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match and not _WEBDATASET_META.match(name) else None


def walk(buffer: Buffer, path: object) -> Generator[Entry, None, int]:
    """Yield the regular files of a tar in order; raises TarDamageError at the first byte that is not as it must be.

    Returns (as the generator's value) the offset at which the end-of-archive marker starts.
    """
    offset, start, name = 0, None, None
    while True:
        block = _block(buffer, offset, path)
        if block == _ZERO:
            if start is not None:
                raise TarDamageError(path, start, "a name header without its file")
            _check_end(buffer, offset, path)
            return offset
        header = _parse(block, offset, path)
        data = offset + BLOCK
        following = data + header.size + padding(header.size)
        if following > len(buffer):
            raise TarDamageError(
                path, offset, f"the file is cut inside the data of {name or header.name!r}, whose header is"
            )
        start = offset if start is None else start
        if header.kind in (_LONG_NAME, _PAX):
            name = _extended_name(buffer[data : data + header.size], header.kind, offset, path) or name
        elif header.kind not in (_LONG_LINK, _PAX_GLOBAL):
            if header.kind in _REGULAR:
                yield Entry(start, data, header.size, name or header.name)
            start = name = None
        elif header.kind == _PAX_GLOBAL:
            start = None
        offset = following


def first_name(buffer: bytes) -> str:
    """The name of the file that a span cut out of a sound tar starts with."""
    if buffer[156] in _REGULAR:
        return _header_name(buffer)
    offset, name = 0, None
    while True:
        header = _parse(buffer[offset : offset + BLOCK], offset, "shard")
        if header.kind in _REGULAR:
            return name or header.name
        data = buffer[offset + BLOCK : offset + BLOCK + header.size]
        if header.kind in (_LONG_NAME, _PAX):
            name = _extended_name(data, header.kind, offset, "shard") or name
        offset += BLOCK + header.size + padding(header.size)


def _block(buffer: Buffer, offset: int, path: object) -> bytes:
    block = buffer[offset : offset + BLOCK]
    if len(block) == BLOCK:
        return block
    if not block:
        raise TarDamageError(path, offset, "the file ends without an end-of-archive marker")
    raise TarDamageError(path, offset, "the file is cut inside the header")


def _check_end(buffer: Buffer, offset: int, path: object) -> None:
    if len(buffer) - offset < 2 * BLOCK:
        raise TarDamageError(path, offset, "the end-of-archive marker is cut short")
    for start in range(offset, len(buffer), _CHUNK):
        rest = buffer[start : start + _CHUNK].lstrip(b"\0")
        if rest:
            data = min(start + _CHUNK, len(buffer)) - len(rest)
            raise TarDamageError(path, offset, f"zeros where a header is due (data go on at byte {data})")


def _parse(block: bytes, offset: int, path: object) -> _Header:
    stored = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if stored != unsigned and stored != unsigned - 256 * sum(b > 127 for b in block[:148] + block[156:]):
        raise TarDamageError(path, offset, "a header whose checksum does not match")
    kind, size = block[156:157], _number(block[124:136])
    if size is None:
        raise TarDamageError(path, offset, "a header without a readable size")
    if kind == _SPARSE:
        raise TarDamageError(path, offset, "a sparse file, which shards cannot hold,")
    name = _header_name(block)
    if kind == b"\0" and name.endswith("/"):
        kind = b"5"
    return _Header(kind, name, size if kind in _REGULAR + b"LKxg" else 0)


def _header_name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _extended_name(data: bytes, kind: bytes, offset: int, path: object) -> str | None:
    if kind == _LONG_NAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    name = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise TarDamageError(path, offset, "an unreadable extended header")
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"size" or keyword.startswith(b"GNU.sparse"):
            raise TarDamageError(path, offset, "a sparse file or one beyond 8 GiB, which shards cannot hold,")
        name = value.decode("utf-8", "surrogateescape") if keyword == b"path" else name
        data = data[int(length) :]
    return name
