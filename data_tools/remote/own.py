"""The cache's own folder: which files there are the cache's, and how they are opened without following a link.

The folder that a user names may be in use for other things, and others may be able to write there.
"""

import os
import re
import stat
from pathlib import Path

from data_tools.errors import UserError

SPACE_LOCK = "space.lock"
_SUBFOLDER = ("dualstream", "shards")
_NAME = re.compile(r"[0-9a-f]{32}(?:-[0-9a-f]{1,16})?\.(?:tar|idx|tmp|new|lock|json)")


def own_folder(folder: Path) -> Path:
    """Make the subfolder of `folder` that holds all the cache's files. Raises UserError where it cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _SUBFOLDER:
            folder = folder / name
            folder.mkdir(exist_ok=True)
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise UserError(
                    f"cannot use the shard cache {folder}",
                    got="a link",
                    expected="a folder of its own",
                    remedy="set data.cache_dir to a folder on the disk that it points to, and remove the link",
                )
    except OSError as error:
        remedy = "set data.cache_dir to a folder on a local disk"
        raise UserError(f"cannot make the shard cache {folder}", got=error.strerror, remedy=remedy) from None
    return folder


def own_files(folder: Path) -> dict[str, os.stat_result]:
    """The cache's files in its folder, by name: those it could have named, no links, no folders, no devices."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _NAME.fullmatch(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # committed or given up meanwhile
                continue
            if stat.S_ISREG(status.st_mode):
                found[entry.name] = status
    return found


def is_file(path: Path) -> bool:
    """Whether a file is there itself, and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a file in the cache's folder. Raises FileNotFoundError where nothing is there, UserError where
    something else than a file is."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refusal(path, error.strerror) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _refusal(path, "something else")
    return descriptor


def create_file(path: Path) -> int:
    """A descriptor of a new file in place of whatever has this name, which is the cache's: a link is not followed, and
    another name of the same file keeps what it holds."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _refusal(path, error.strerror) from None
    return open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def commit_file(temporary: Path, path: Path) -> None:
    """Give a whole file its name, in place of a file or a link. Raises UserError where that is a folder."""
    try:
        os.replace(temporary, path)
    except IsADirectoryError as error:
        raise _refusal(path, error.strerror) from None


def _refusal(path: Path, got: str | None) -> UserError:
    return UserError(f"cannot use {path} of the shard cache", got=got, expected="a file", remedy="remove it")
