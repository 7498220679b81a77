"""Reading a file that somebody else wrote: regular files only, and never more of one than was looked for."""

import os
from contextlib import suppress
from pathlib import Path

from data_tools.format.files import READING, not_regular
from data_tools.media.bad import BadSampleError

MISSING = -1


def read_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file, whose size is looked at before the first is read.

    Raises BadSampleError: `unreadable_file` for a folder, a pipe, a socket and a device, which are not even opened, for
    that may block or act; `too_large` above `limit` bytes. OSError as opening raises it.
    """
    kind = not_regular(os.stat(path).st_mode)
    if kind:
        raise BadSampleError("unreadable_file", f"{kind}, not a regular file")
    with open(os.open(path, READING), "rb") as file:
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
    if not_regular(status.st_mode) is None:
        with suppress(OSError), open(os.open(path, READING), "rb", buffering=0) as file:
            start = file.read(count) or b""
    return status.st_size, start
