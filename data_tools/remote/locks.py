"""File locks that the kernel lets go when their holder dies."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UserError
from data_tools.remote.awake import Patience
from data_tools.remote.own import open_file

_POLL = 0.02


def try_lock(path: Path, create: bool = True) -> int | None:
    """A descriptor that holds the file exclusively; None where another process, or another descriptor, has it.

    Raises FileNotFoundError without `create`. Closing the descriptor lets go.
    """
    while True:
        descriptor = open_file(path, os.O_RDWR | (os.O_CREAT if create else 0))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _names(path, descriptor):
            return descriptor
        os.close(descriptor)


def share(path: Path) -> int | None:
    """A descriptor, open for reading, that keeps the file from being locked exclusively; None where it is gone."""
    try:
        descriptor = open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for an eviction at most, which then has removed the file
    if _names(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file, waiting for it. Raises UserError where another process keeps it longer than `seconds`."""
    patience = Patience(seconds)
    while (descriptor := try_lock(path)) is None:
        if not patience.lasts():
            remedy = "look for a stopped process that uses this cache (its id stands in /proc/locks)"
            raise UserError(f"another process has held {path} for {seconds:.0f} s", remedy=remedy)
        time.sleep(_POLL)
    try:
        yield
    finally:
        os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    """Whether `path` still is the open file: between open and lock it may have been removed."""
    try:
        found, opened = os.lstat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)
