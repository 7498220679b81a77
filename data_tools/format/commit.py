"""Files that are either whole or absent: temporary file, fsync, rename, fsync of the folder."""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_tools.errors import UserError

_TEMPORARY = re.compile(r"^\.(.+)\.[0-9a-f]{12}\.tmp$")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a temporary file beside `path`; on a clean exit it becomes `path` durably, else it is removed.

    An OSError of the writing names `path`, whatever it knew of the file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)
        raise
    sync_folder(path.parent)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder of shards against a second writer; the kernel lets go of it when this process dies. Raises
    UserError when another holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = "wait for it, or choose another folder"
        raise UserError(f"another command is writing into {folder}", remedy=remedy) from None
    try:
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path, of: str = "") -> int:
    """Delete what killed writers left in `folder` of files whose names end with `of`; the caller keeps live writers of
    such files out."""
    stale = [entry.path for entry in os.scandir(folder) if (m := _TEMPORARY.match(entry.name)) and m[1].endswith(of)]
    for path in stale:
        os.unlink(path)
    return len(stale)
