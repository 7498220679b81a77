"""Opening files that others wrote: nothing that blocks, nothing larger than is sane, one clear line for each fault."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UserError

READING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # plain opening of a named pipe would wait for ever
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def not_regular(mode: int) -> str | None:
    """What stands in place of a regular file, in words, by its `st_mode`; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a regular file. Raises FileNotFoundError, and UserError for what cannot be read as a file."""
    file = open_regular(path)
    try:
        yield file
    finally:
        os.close(file)


def open_regular(path: Path) -> int:
    """As `opened`; the caller closes the descriptor."""
    try:
        file = os.open(path, READING)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}", got=reason, remedy="check the path and its permissions") from None
    kind = not_regular(os.fstat(file).st_mode)
    if kind:
        os.close(file)
        raise UserError(f"cannot read {path}", got=kind, expected="a file")
    return file


def read_small(path: Path, limit: int) -> bytes:
    """The whole of a file that is to be small. Raises as `opened`, and UserError beyond `limit` bytes."""
    with opened(path) as file:
        size = os.fstat(file).st_size
        if size > limit:
            raise UserError(f"{path} is too large", got=f"{size} bytes", expected=f"at most {limit}")
        return read_span(file, 0, size)


def read_span(file: int, start: int, stop: int) -> bytes:
    """Bytes start .. stop of an open file; fewer where it ends before."""
    parts, at = [], start
    while at < stop and (part := os.pread(file, stop - at, at)):
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class FileBytes:
    """A file as a sequence of bytes, each slice read when it is asked for.

    Of a file that is cut meanwhile the slices come out shorter; touching a memory map of it would kill the process.
    """

    def __init__(self, file: int):
        self._file, self._size = file, os.fstat(file).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: slice) -> bytes:
        start, stop, _ = key.indices(self._size)
        return read_span(self._file, start, stop)
