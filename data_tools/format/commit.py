"""Files that are either whole or absent: temporary file, fsync, rename, fsync of the folder."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{12}\.tmp$")


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


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> int:
    """Delete what killed writers left in `folder`; the caller holds whatever lock keeps live writers out."""
    stale = [entry.path for entry in os.scandir(folder) if _TEMPORARY.match(entry.name)]
    for path in stale:
        os.unlink(path)
    return len(stale)
