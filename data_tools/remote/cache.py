"""Whole shards, brought once to a folder that all processes of a node share, and kept within a byte limit.

There is no daemon: file locks alone keep the processes apart, and the kernel lets them go when a process dies.
- A committed shard is KEY.tar with KEY.idx, checked against its hash before the rename. KEY is the hash and the length:
  the same content is one file, wherever it came from.
- A lease is a shared lock on the open tar. Eviction needs the exclusive one, so it passes over what is in use.
- Who brings or evicts a shard holds KEY.lock; others who want it wait, and find it there.
The folder must be local to the node. In it all lies in a subfolder of the cache's own.
"""

import json
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import xxhash

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write, sync_folder
from data_tools.format.index import Index, hash_file
from data_tools.format.survey import build_index
from data_tools.redaction import redact
from data_tools.remote.awake import Patience
from data_tools.remote.fetch import checked_stat, fetch
from data_tools.remote.http_range import Stat
from data_tools.remote.locks import locked, share
from data_tools.remote.own import commit_file, is_file, open_file, own_folder
from data_tools.remote.retry import RemoteError
from data_tools.remote.settings import CacheSettings, Shard
from data_tools.remote.space import CacheFullError, reserve

_POLL = 0.1
_FETCHES = 2  # one fault on the way may alter bytes; twice the same is the object


class Lease(NamedTuple):
    """An open tar of the cache, which nothing evicts before the descriptor `file` is closed."""

    file: int
    tar: Path


class Cache:
    """The cache as one process uses it. It holds no state but the settings."""

    def __init__(self, settings: CacheSettings):
        self.settings, self.folder = settings, own_folder(Path(settings.folder))

    def lease(self, shard: Shard, let_go: Callable[[], object] = lambda: None) -> Lease:
        """The shard, brought if it is not there. `let_go` ends leases of the caller, where room is short.

        Raises UserError: it cannot be read, is not what was expected, or finds no room in time.
        """
        lease = self._take(shard.key)
        if lease is None:
            with self._locked(shard.key, shard.size):
                lease = self._take(shard.key)
                if lease is None:
                    self._bring(shard, (), let_go)
                    lease = self._take(shard.key)  # still under the lock, so nobody evicted it
        if lease is None:
            raise UserError(f"the shard cache {self.folder} loses files", remedy="let nothing else clean it up")
        return lease

    def prefetch(self, shard: Shard, keep: Collection[str] = ()) -> None:
        """Bring a shard unless it is there, evicting none of the keys in `keep`. Raises CacheFullError at once."""
        with self._locked(shard.key, shard.size):
            if not self.holds(shard):
                self._bring(shard, keep, None)

    def holds(self, shard: Shard) -> bool:
        """Whether the shard is there now."""
        return self._holds(shard.key)

    def _holds(self, key: str) -> bool:
        return is_file(self.folder / f"{key}.tar") and is_file(self.folder / f"{key}.idx")

    def touch(self, shard: Shard) -> None:
        """Count the shard, if it is there, as used now."""
        try:
            os.utime(self.folder / f"{shard.key}.tar", follow_symlinks=False)
        except FileNotFoundError:
            return

    def identify(self, url: str) -> tuple[int, Shard]:
        """(samples, shard) of a tar without an index: the first time on a node it is brought whole and walked.

        Of such a tar only length and version are known, so it is remembered by them and its URL.
        """
        limits = self.settings.limits
        found = checked_stat(url, None, limits)
        key = xxhash.xxh3_128_hexdigest(f"{url}\n{found.size}\n{found.version}".encode())
        record = self.folder / f"{key}.json"
        size = found.size or 0
        with self._locked(key, size):
            known = _read_record(record)
            if known is None:
                known = self._walk_new(url, found, key)
                with atomic_write(record) as file:
                    file.write(json.dumps(known).encode())
        samples, digest = known
        return samples, Shard(url, size, bytes.fromhex(digest))

    def _walk_new(self, url: str, found: Stat, key: str) -> tuple[int, str]:
        temporary = self.folder / f"{key}.tmp"
        try:
            self._fetch(url, found, temporary, (), lambda: None)
            if checked_stat(url, found.size, self.settings.limits).version != found.version:
                raise RemoteError(f"{redact(url)} changed while it was read", remedy="start again")
            index = _walk(temporary, url)
            shard = Shard(url, index.tar_bytes, index.tar_hash)
            with self._locked(shard.key, shard.size):
                if not self.holds(shard):
                    self._commit(shard.key, temporary, index, (), lambda: None)
        finally:
            temporary.unlink(missing_ok=True)
        return index.num_samples, index.tar_hash.hex()

    def _take(self, key: str) -> Lease | None:
        tar = self.folder / f"{key}.tar"
        file = share(tar) if self._holds(key) else None
        if file is None:
            return None
        os.utime(file)
        return Lease(file, tar)

    def _locked(self, key: str, size: int):
        """A lock that others wait for as long as bringing the shard, twice at worst, may take."""
        limits = self.settings.limits
        return locked(self.folder / f"{key}.lock", _FETCHES * limits.seconds(size) + limits.space + limits.deadline)

    def _bring(self, shard: Shard, keep: Collection[str], let_go: Callable[[], object] | None) -> None:
        """Fetch, check, commit. The caller holds the lock of the key, so a temporary file there is a dead process's."""
        temporary = self.folder / f"{shard.key}.tmp"
        try:
            found = checked_stat(shard.url, shard.size, self.settings.limits)
            for _ in range(_FETCHES):
                self._fetch(shard.url, found, temporary, keep, let_go)
                digest = hash_file(temporary)
                if digest == shard.hash:
                    self._commit(shard.key, temporary, _walk(temporary, shard.url), keep, let_go)
                    return
            raise RemoteError(
                f"content of shard {redact(shard.url)} changed",
                got=f"xxh3-128 {digest.hex()}",
                expected=f"{shard.hash.hex()}, as in its manifest or index",
                remedy="upload the shard again, or its manifest or index if the shard is right",
            )
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, url: str, found: Stat, temporary: Path, keep: Collection[str], let_go) -> None:
        file = self._reserve(temporary, found.size or 0, keep, let_go)
        try:
            fetch(url, found, file, self.settings.limits)
            os.fsync(file)
        finally:
            os.close(file)

    def _commit(self, key: str, temporary: Path, index: Index, keep: Collection[str], let_go) -> None:
        """The index first: a tar that is there is whole and has its index."""
        path = self.folder / f"{key}.idx"
        body = index.to_bytes()
        scratch = self.folder / f"{key}.new"
        try:
            with open(self._reserve(scratch, len(body), {*keep, key}, let_go), "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            commit_file(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        commit_file(temporary, path.with_suffix(".tar"))
        sync_folder(self.folder)

    def _reserve(self, path: Path, size: int, keep: Collection[str], let_go: Callable[[], object] | None) -> int:
        """A new file with room for `size` bytes; with `let_go` it is waited for, because others' leases are short."""
        patience, pause = Patience(self.settings.limits.space), 0.0
        while True:
            try:
                return reserve(self.folder, self.settings.limit, path, size, keep)
            except CacheFullError:
                if let_go is None or size > self.settings.limit or not patience.lasts():
                    raise
            let_go()
            time.sleep(pause)
            pause = _POLL


def _read_record(record: Path) -> tuple[int, str] | None:
    """(samples, xxh3-128 in hex) of a tar that was identified before; None where that is not known."""
    try:
        with open(open_file(record, os.O_RDONLY), "rb") as file:
            samples, digest = json.loads(file.read(1024))
        known = isinstance(samples, int) and samples >= 0 and len(bytes.fromhex(digest)) == 16
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    return (samples, digest) if known else None


def _walk(tar: Path, url: str) -> Index:
    """The index of a fetched tar; faults name the URL, not the temporary file."""
    try:
        return build_index(tar)
    except UserError as error:
        raise UserError(str(error).replace(str(tar), redact(url))) from None
