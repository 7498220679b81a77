"""Room in the cache folder: what it holds, and the eviction of what was used least recently and is not in use.

Files of a shard: KEY.tar and KEY.idx once it is whole, KEY.tmp and KEY.new while they come, and
KEY.lock for who brings or evicts it.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from data_tools.errors import UserError
from data_tools.remote.locks import locked, try_lock
from data_tools.remote.own import SPACE_LOCK, create_file, is_file, own_files

_PARTS = ("tmp", "new", "idx", "lock")
_LOCK_SECONDS = 60.0
_GIB = 1 << 30


class CacheFullError(UserError):
    """There is no room, because all that the cache holds is in use."""

    def __init__(self, folder: Path, limit: int, in_use: int, size: int):
        needed = _gib(in_use + size)
        super().__init__(
            f"the shard cache {folder} is too small",
            got=f"a limit of {_gib(limit)} GiB, {_gib(in_use)} GiB of it in use, and a shard of {_gib(size)} GiB more",
            expected=f"at least {needed} GiB",
            remedy=f"set data.cache_gib to {needed} or more, or data.cache_dir to a folder that no other run uses",
        )


def _gib(size: int) -> str:
    """Rounded up, so that the number can be set as the limit."""
    return f"{-(-size * 1_000_000 // _GIB) / 1_000_000:g}"


def reserve(folder: Path, limit: int, temporary: Path, size: int, keep: Collection[str] = ()) -> int:
    """A descriptor of `temporary`, a new file of `size` bytes, for which others were evicted until the folder holds at
    most `limit` bytes.

    The caller holds the lock of its key; `keep` are keys that must stay. Raises CacheFullError, having evicted nothing
    that was in use.
    """
    with locked(folder / SPACE_LOCK, _LOCK_SECONDS):
        _remove_leftovers(folder)
        files = own_files(folder)
        sizes = {name: status.st_size for name, status in files.items()}
        used = sum(sizes.values()) - sizes.get(temporary.name, 0)
        for key in _least_recent_first(files):
            if used + size <= limit:
                break
            if key not in keep and evict(folder, key):
                used -= sizes[f"{key}.tar"] + sizes.get(f"{key}.idx", 0)
        if used + size > limit:
            raise CacheFullError(folder, limit, used, size)
        file = create_file(temporary)
        try:
            os.truncate(file, size)
        except OSError as error:  # longer than files can be on this disk
            os.close(file)
            remedy = "set data.cache_dir to a folder on another disk"
            raise UserError(f"no file of {size} bytes in {folder}", got=error.strerror, remedy=remedy) from None
        return file


def evict(folder: Path, key: str) -> bool:
    """Remove a shard unless it is in use, or being brought; whether it was removed."""
    lock = try_lock(folder / f"{key}.lock")
    if lock is None:
        return False
    tar = None
    try:
        tar = try_lock(folder / f"{key}.tar", create=False)
        if tar is None:
            return False
        for suffix in (".tar", ".idx", ".lock"):
            (folder / f"{key}{suffix}").unlink(missing_ok=True)
        return True
    except FileNotFoundError:
        return False
    finally:
        for descriptor in (tar, lock):
            if descriptor is not None:
                os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """What killed processes left: files being brought by nobody, indexes without their tar, and locks of neither."""
    names = own_files(folder)
    for name in names:
        key, _, suffix = name.partition(".")
        if suffix not in _PARTS or f"{key}.tar" in names:
            continue
        lock = try_lock(folder / f"{key}.lock")
        if lock is None:
            continue
        if not is_file(folder / f"{key}.tar"):
            _remove(folder / f"{key}.{leftover}" for leftover in _PARTS)
        os.close(lock)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(FileNotFoundError, IsADirectoryError):  # a folder is not the cache's
            path.unlink()


def _least_recent_first(files: Mapping[str, os.stat_result]) -> list[str]:
    """Keys of the shards among `files`."""
    used = [(status.st_mtime_ns, name) for name, status in files.items() if name.endswith(".tar")]
    return [name.removesuffix(".tar") for _, name in sorted(used)]
