"""Random access to samples: one `pread` of the whole sample, whose place the index in memory knows."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

from data_tools.corpus.corpus import Corpus
from data_tools.errors import UserError
from data_tools.format.files import open_regular, read_span
from data_tools.format.index import Index, index_path, key_hash, open_index
from data_tools.format.tar import TarDamageError, first_name, split_name
from data_tools.remote.cache import Cache

REMOTE_OPEN = 8
_INDEX_BYTES = 64 << 20  # of the indexes of open shards, which are held in memory
_MAX_SAMPLE = 1 << 30  # bytes that are read at once
_HEADERS = 2048  # in which a name mostly stands, a long one too


class Sample(NamedTuple):
    """A sample as stored: `id` is the xxh3-64 of `key`; `members` maps an extension without dot to bytes."""

    key: str
    id: int
    members: dict[str, bytes]


class _OpenShard:
    """One open tar with its index; its last user closes it, so eviction never takes a file from a reading thread.

    Args:
        path: how errors name the shard.
        tar: where it lies.
        file: the descriptor that leases it, of a shard in the cache; this object closes it.
    """

    def __init__(self, path: str, tar: Path, samples: int, tar_bytes: int, file: int | None = None):
        self.path = path
        if file is not None:
            self.file = file
        self.index = open_index(index_path(tar))
        if file is None:
            try:
                self.file = open_regular(tar)
            except FileNotFoundError:
                raise UserError(f"missing shard {path}", remedy="copy the shard back") from None
        size = os.fstat(self.file).st_size
        remedy = f"run `python -m data_tools verify {path}`"
        if size > tar_bytes or self.index.tar_bytes != tar_bytes:
            got = f"tar of {size} bytes, index of a tar of {self.index.tar_bytes} bytes"
            raise UserError(f"shard {path} changed", got=got, expected=f"{tar_bytes} bytes", remedy=remedy)
        if self.index.num_samples != samples:
            got = f"{self.index.num_samples} samples in the index"
            raise UserError(f"shard {path} changed", got=got, expected=f"{samples} samples", remedy=remedy)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


def read_sample(file: int, path: str, table: Index, index: int) -> Sample:
    """Read sample `index` of the tar open as descriptor `file`; raises TarDamageError where it is not as indexed."""
    if not 0 <= index < table.num_samples:
        raise IndexError(f"sample {index} of {table.num_samples} in {path}")
    start, extensions = table.offsets.item(index), table.extensions
    rows = table.members[table.first_member.item(index) : table.first_member.item(index + 1)].tolist()
    if not rows:
        raise TarDamageError(path, start, f"sample {index} was lost before the tar was indexed,")
    length = max(at + size for _, at, size in rows)
    if length > _MAX_SAMPLE:
        raise TarDamageError(path, start, f"a sample of {length} bytes (at most {_MAX_SAMPLE} are read)")
    data = read_span(file, start, start + length)
    if len(data) != length:
        raise TarDamageError(path, start + len(data), "the file ends inside a sample")
    key = _key(data)
    number = table.key_hashes.item(index)
    if key is None or key_hash(key) != number:
        raise TarDamageError(path, start, f"sample {index} is not the one in the index")
    return Sample(key, number, {extensions[e]: data[at : at + size] for e, at, size in rows})


class ShardReader:
    """Reads samples of a corpus by (shard, index in shard).

    Opens shards on first use and keeps at most `max_open` of them; safe to share between threads; pickles as the corpus
    alone, so each worker process opens its own files. Of remote shards, which the cache cannot evict while they are
    open, it keeps at most REMOTE_OPEN.
    """

    def __init__(self, corpus: Corpus, max_open: int = 64):
        self.corpus = corpus
        self.max_open = max_open
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._cache: Cache | None = None

    def __reduce__(self):
        return ShardReader, (self.corpus, self.max_open)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all open files; the reader can be used again."""
        with self._lock:
            self._opened.clear()

    def sample_id(self, shard: int, index: int) -> int:
        """The 64-bit id of a sample, without touching the tar."""
        return self._open(shard).index.key_hashes.item(index)

    def index(self, shard: int) -> Index:
        """The index of a shard."""
        return self._open(shard).index

    def key(self, shard: int, index: int) -> str:
        """The key of a sample, mostly by its first header alone. Raises as `read`."""
        opened = self._open(shard)
        start = opened.index.offsets.item(index)
        key = _key(read_span(opened.file, start, min(start + _HEADERS, opened.index.offsets.item(index + 1))))
        if key is None or key_hash(key) != opened.index.key_hashes.item(index):
            return self.read(shard, index).key
        return key

    def read(self, shard: int, index: int) -> Sample:
        """All members of a sample. Raises UserError when the tar is short or does not match its index."""
        opened = self._open(shard)
        return read_sample(opened.file, opened.path, opened.index, index)

    def _open(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._opened.get(shard)
            if opened is None:
                limit = self.max_open if self.corpus.cache is None else min(self.max_open, REMOTE_OPEN)
                while self._opened and (len(self._opened) >= limit or self._held() > _INDEX_BYTES):
                    self._opened.popitem(last=False)
                opened = self._opened[shard] = self._open_anew(shard)
            else:
                self._opened.move_to_end(shard)
            return opened

    def _held(self) -> int:
        return sum(opened.index.nbytes for opened in self._opened.values())

    def _open_anew(self, shard: int) -> _OpenShard:
        corpus = self.corpus
        path, samples, size = corpus.paths[shard], int(corpus.counts[shard]), corpus.tar_bytes[shard]
        remote = corpus.remote(shard)
        if remote is None or corpus.cache is None:
            return _OpenShard(path, Path(path), samples, size)
        if self._cache is None:
            self._cache = Cache(corpus.cache)
        lease = self._cache.lease(remote, self._opened.clear)
        return _OpenShard(path, lease.tar, samples, size, lease.file)


def _key(data: bytes) -> str | None:
    try:
        name = split_name(first_name(data))
    except UserError:  # anything may stand where a sample is due
        return None
    return name[0] if name else None
