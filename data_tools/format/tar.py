"""Tar headers: the strict walk that indexing and verifying use, and the header a shard is written with.

Python's `tarfile` takes a damaged header for the end of the archive and stops without a word, so it cannot tell a whole
shard from half of one. The walk here checks every header's checksum and the end of the archive, and names the offset.
"""

import re
import tarfile
from collections.abc import Generator
from typing import NamedTuple, Protocol

from data_tools.errors import UserError, shown

BLOCK = 512
RECORD = tarfile.RECORDSIZE
MAX_TAR = 1 << 50  # bytes; what claims more is no tar
MAX_EXTENDED = 1 << 20  # bytes of a header that extends another; paths and attributes need a few hundred
_ZERO = bytes(BLOCK)
_CHUNK, _FIRST_CHUNK = 1 << 20, 1 << 12
_REGULAR = b"0\0" + b"7"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
_LINKS = b"12"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS, _SPARSE = b"L", b"K", b"x", b"g", b"X", b"S"
EXTENDING = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS)
TYPE_AT = 156  # of a header
MAGIC, _MAGIC_AT = b"ustar", 257
_OCTAL = re.compile(rb" *([0-7]*) *")
_PAX_LENGTH, _PAX_SIZE = re.compile(rb"([0-9]{1,20}) "), re.compile(rb"[0-9]{1,20}")
_SAMPLE_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_SHOWN = 120  # characters of what was found, so that path and place stay in a message
_WEBDATASET_META = re.compile(r"__[^/]*__(/|$)")


class Buffer(Protocol):
    """Bytes, or a file that is read slice by slice."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice) -> bytes: ...


class Entry(NamedTuple):
    """A file in a tar: where its first header and its data start, its size and its name; of a link only the name."""

    start: int
    data: int
    size: int
    name: str
    is_link: bool = False


class TarDamageError(UserError):
    """A tar that is cut or altered; `offset` is where, in bytes."""

    def __init__(self, path: object, offset: int, what: str):
        self.offset = offset
        self.what = shown(what, _SHOWN)
        super().__init__(f"damaged tar {path}: {self.what} at byte {offset}")


class TarLayoutError(UserError):
    """A sound tar that is not laid out as shards are: its samples are not whole, unique and in one piece."""

    def __init__(self, path: object, offset: int, what: str, remedy: str):
        self.offset = offset
        super().__init__(f"tar {path} cannot be read as a shard", got=f"{what} at byte {offset}", remedy=remedy)


class _Header(NamedTuple):
    kind: bytes
    name: str
    size: int


class _Extended(NamedTuple):
    """What extended headers say of the file behind them; empty where they say nothing."""

    name: str = ""
    size: int | None = None


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


def walk(buffer: Buffer, path: object, offset: int = 0) -> Generator[Entry, None, int]:
    """Yield the files and links of a tar in order; raises TarDamageError at the first byte that is not as it must be.

    Begins at the header at `offset`. Returns (as the generator's value) the offset at which the end-of-archive marker
    starts. Raises TarLayoutError for a tar whose files have no places of their own.
    """
    start, extended = None, _Extended()
    while True:
        block = _block(buffer, offset, path)
        if block == _ZERO:
            if start is not None:
                raise TarDamageError(path, start, "a name header without its file")
            _check_end(buffer, offset, path)
            return offset
        header = _parse(block, offset, path)
        data, extending = offset + BLOCK, header.kind in EXTENDING
        size = header.size
        if extended.size is not None and not extending and header.kind not in _WITHOUT_DATA:
            size = extended.size
        if data + size > len(buffer):
            named = extended.name or header.name
            raise TarDamageError(path, offset, f"the file is cut inside the data of {named!r}, whose header is")
        start = offset if start is None else start
        if extending:
            found = _extension(buffer[data : data + size], header.kind, offset, path)
            if header.kind == _PAX_GLOBAL:
                _check_global(found, offset, path)
                start = start if start < offset else None
            if found.name and extended.name not in ("", found.name):
                raise TarDamageError(path, start or offset, "a name header without its file")
            extended = _Extended(found.name or extended.name, extended.size if found.size is None else found.size)
        else:
            if header.kind in _REGULAR + _LINKS:
                yield Entry(start, data, size, extended.name or header.name, header.kind in _LINKS)
            start, extended = None, _Extended()
        offset = data + size + padding(size)


def first_name(buffer: bytes) -> str:
    """The name of the file that a span cut out of a sound tar starts with."""
    if len(buffer) >= BLOCK and buffer[156] in _REGULAR:
        return _header_name(buffer)
    for entry in walk(buffer, "shard"):
        if not entry.is_link:
            return entry.name
    raise TarDamageError("shard", 0, "no file")


def next_header(buffer: Buffer, offset: int) -> int | None:
    """Where the next sound header at or behind `offset` stands, whatever lies before it; None: nowhere."""
    at, size = offset, _FIRST_CHUNK
    while at < len(buffer):
        chunk = buffer[at : at + size]
        found = chunk.find(MAGIC)
        while found >= 0:
            start = at + found - _MAGIC_AT
            if start >= offset and start % BLOCK == 0 and _is_header(buffer[start : start + BLOCK]):
                return start
            found = chunk.find(MAGIC, found + 1)
        if len(chunk) < size:
            return None
        at += size - len(MAGIC)  # one may lie across the edge
        size = min(2 * size, _CHUNK)
    return None


def _is_header(block: bytes) -> bool:
    try:
        return len(block) == BLOCK and bool(_parse(block, 0, "").name)
    except TarDamageError:
        return False


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
    start, size = offset, _FIRST_CHUNK
    while chunk := buffer[start : start + size]:
        rest = chunk.lstrip(b"\0")
        if rest:
            data = start + len(chunk) - len(rest)
            raise TarDamageError(path, offset, f"zeros where a header is due (data go on at byte {data})")
        start, size = start + size, min(2 * size, _CHUNK)


def _parse(block: bytes, offset: int, path: object) -> _Header:
    if not has_checksum(block):
        raise TarDamageError(path, offset, "a header whose checksum does not match")
    kind, size = block[156:157], _number(block[124:136])
    if kind in _WITHOUT_DATA:
        size = 0
    if size is None:
        raise TarDamageError(path, offset, "a header without a readable size")
    if kind == _SPARSE:
        raise TarDamageError(path, offset, "a sparse file, which shards cannot hold,")
    if kind in EXTENDING and size > MAX_EXTENDED:
        raise TarDamageError(path, offset, f"an extended header of {size} bytes (at most {MAX_EXTENDED} are read)")
    name = _header_name(block)
    if kind == b"\0" and name.endswith("/"):
        kind, size = b"5", 0
    return _Header(kind, name, size)


def has_checksum(block: bytes) -> bool:
    """Whether a block is a whole header: its checksum is that of its unsigned, or as in old tars signed, bytes."""
    stored = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return stored == unsigned or stored == unsigned - 256 * sum(b > 127 for b in block[:148] + block[156:])


def _header_name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    """A field of a header: octal digits up to the first NUL, or GNU's binary number; None: neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = _OCTAL.fullmatch(field.split(b"\0", 1)[0])
    return int(digits[1] or b"0", 8) if digits else None


def _extension(data: bytes, kind: bytes, offset: int, path: object) -> _Extended:
    """What a header before a file says about it."""
    if kind == _LONG_LINK:
        return _Extended()
    if kind == _LONG_NAME:
        long_name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        if not long_name:
            raise TarDamageError(path, offset, "a name header without a name")
        return _Extended(long_name)
    name, size, at = "", None, 0
    while at < len(data) and data[at]:
        length = _PAX_LENGTH.match(data, at)
        end = at + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(data):
            raise TarDamageError(path, offset, "an unreadable extended header")
        keyword, _, value = data[length.end() : end - 1].partition(b"=")
        if keyword == b"size" and not _PAX_SIZE.fullmatch(value):
            raise TarDamageError(path, offset, "an unreadable extended header")
        if keyword == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif keyword == b"size":
            size = int(value)
        elif keyword.startswith(b"GNU.sparse"):
            raise TarDamageError(path, offset, "a sparse file, which shards cannot hold,")
        at = end
    return _Extended(name, size)


def _check_global(found: _Extended, offset: int, path: object) -> None:
    if found != _Extended():
        what = "a global header that names every file of the tar alike"
        raise TarLayoutError(path, offset, what, "unpack it and pack it anew: tar --sort=name -cf NEW.tar -C FOLDER .")
