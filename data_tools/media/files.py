"""Reading a file that somebody else wrote: regular files only, and never more of one than was looked for."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from data_tools.media.bad import BadSampleError

MISSING = -1
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe may have taken the file's place
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def regular_size(path: str | Path) -> int:
    """The size of a regular file, in bytes; nothing is opened.

    Raises BadSampleError `unreadable_file` for a pipe, a device, a socket and a folder: opening one may block, or act.
    OSError where there is nothing.
    """
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    found = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "something else")
    raise BadSampleError("unreadable_file", f"{found}, not a regular file")


def read_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file, whose size is looked at before the first is read.

    Raises BadSampleError: `unreadable_file`, or `too_large` above `limit` bytes. OSError as opening raises it.
    """
    regular_size(path)
    with open(os.open(path, _FLAGS), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise BadSampleError("too_large", f"{size} bytes, the limit is {limit}")
        return file.read(size)


def look(path: str | Path, count: int) -> tuple[int, bytes]:
    """The size of a file, MISSING without one, and its first `count` bytes; b"" of what is no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return MISSING, b""
    start = b""
    if stat.S_ISREG(status.st_mode):
        with suppress(OSError), open(os.open(path, _FLAGS), "rb", buffering=0) as file:
            start = file.read(count) or b""
    return status.st_size, start
