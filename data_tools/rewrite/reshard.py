"""A corpus cut anew into shards, of all its samples or of those chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.build.accounts import write_account
from data_tools.build.run import Build
from data_tools.corpus import Corpus, ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.manifest import ShardRecord
from data_tools.format.tar import TarDamageError, member_header
from data_tools.format.writer import write_shard
from data_tools.media.members import Fields
from data_tools.rewrite.samples import account_of, lost, other_key

_LAYOUT = 1  # raised when the same settings and input come to mean other bytes
_LONGEST = "x" * 16  # an extension, for the question whether a key fits into a header
_ADVANCE_EVERY = 32


@dataclass(frozen=True)
class Cut:
    """How samples are cut into shards."""

    name: str
    samples_per_shard: int
    shard_bytes: int | None


@dataclass(frozen=True)
class Piece:
    """Samples of one shard: rows, int64 rising, and which of them cannot keep their key, bool."""

    tar: str
    rows: np.ndarray
    renamed: np.ndarray


@dataclass(frozen=True)
class _Task:
    folder: Path
    name: str
    pieces: tuple[Piece, ...]
    fields: Fields
    digest: str


@dataclass(frozen=True)
class Plan:
    """What is to be made, how many samples it takes, and how many of them get another key, since an earlier one has
    theirs."""

    build: Build
    samples: int
    renamed: int


def plan_reshard(corpus: Corpus, chosen: list[np.ndarray] | None, cut: Cut, fields: Fields, folder: Path) -> Plan:
    """Consecutive samples of the corpus, in its order, make a shard; within it they are sorted by key, as every shard
    is. `chosen`: the rows of each shard to take; None: all."""
    rows = chosen or [np.arange(count, dtype=np.int64) for count in corpus.counts.tolist()]
    edges = np.cumsum([0, *map(len, rows)])
    if not edges[-1]:
        raise UserError("no sample is chosen", got=f"0 of {corpus.num_samples}")
    hashes, sizes = _looked_up(corpus, rows)
    renamed = _repeated(hashes)
    starts = _starts(sizes, cut)
    names = [f"{cut.name}-{number:06d}" for number in range(len(starts))]
    config = {
        "verb": "reshard",
        "layout": _LAYOUT,
        "name": cut.name,
        "samples_per_shard": cut.samples_per_shard,
        "shard_bytes": cut.shard_bytes,
        "input": corpus.digest,
        "samples": int(edges[-1]),
    }
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
    for piece in rows:
        digest.update(piece.astype("<i8").tobytes())
    stops = [*starts[1:], int(edges[-1])]

    def task(number: int) -> _Task:
        first, last = starts[number], stops[number]
        shards = range(int(np.searchsorted(edges, first, "right")) - 1, int(np.searchsorted(edges, last)))
        pieces = (_piece(corpus, rows, renamed, edges, shard, first, last) for shard in shards)
        return _Task(folder, names[number], tuple(filter(None, pieces)), fields, digest.hexdigest())

    counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
    build = Build("resharding", config, digest.hexdigest(), names, counts, task, make_shard, corpus.classes)
    return Plan(build, int(edges[-1]), int(renamed.sum()))


def _piece(
    corpus: Corpus, rows: list[np.ndarray], renamed: np.ndarray, edges: np.ndarray, shard: int, first: int, last: int
) -> Piece | None:
    """What the samples `first` to `last` of those chosen take of a shard; None: nothing."""
    start, stop = max(first, int(edges[shard])), min(last, int(edges[shard + 1]))
    if start >= stop:
        return None
    return Piece(corpus.urls[shard], rows[shard][start - edges[shard] : stop - edges[shard]], renamed[start:stop])


def _looked_up(corpus: Corpus, rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of all that is chosen the hashes of keys, uint64 [n], and the bytes in the tar, int64 [n]."""
    hashes, sizes = [], []
    with ShardReader(corpus) as reader:
        for shard, chosen in enumerate(rows):
            index = reader.index(shard)
            hashes.append(index.key_hashes[chosen])
            sizes.append(np.diff(index.offsets.astype(np.int64))[chosen])
    return np.concatenate(hashes), np.concatenate(sizes)


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Which keys an earlier sample has, bool [n]."""
    order = np.argsort(hashes, kind="stable")
    found = np.zeros(len(hashes), bool)
    found[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return found


def _starts(sizes: np.ndarray, cut: Cut) -> list[int]:
    """The first sample of each shard."""
    ends, starts, at = np.cumsum(sizes), list[int](), 0
    while at < len(sizes):
        starts.append(at)
        limit = at + cut.samples_per_shard
        if cut.shard_bytes:
            before = int(ends[at - 1]) if at else 0
            limit = min(limit, max(at + 1, int(np.searchsorted(ends, before + cut.shard_bytes, "right"))))
        at = limit
    return starts


def make_shard(task: _Task, advance: Callable[[int], None]) -> ShardRecord:
    """Commit tar, then index, then account."""
    rows: list[dict] = []
    with ShardReader(open_corpus([piece.tar for piece in task.pieces])) as reader:
        index = write_shard(task.folder / f"{task.name}.tar", _samples(task, reader, rows, advance))
    record = ShardRecord(task.name, index.num_samples, index.tar_bytes, index.tar_hash.hex())
    return write_account(task.folder, record, task.digest, rows)


def _samples(
    task: _Task, reader: ShardReader, accounts: list[dict], advance: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    waiting = 0
    for key, shard, row in sorted(_keys(task, reader, accounts)):
        sample = reader.read(shard, row)
        accounts += account_of(sample, key, task.pieces[shard].tar, task.fields)
        yield key, sample.members
        waiting += 1
        if waiting == _ADVANCE_EVERY:
            advance(waiting)
            waiting = 0
    advance(waiting)


def _keys(task: _Task, reader: ShardReader, accounts: list[dict]) -> Iterator[tuple[str, int, int]]:
    """(key to be, number of the piece, row) of each sample; what a damaged tar has lost is accounted for."""
    for number, piece in enumerate(task.pieces):
        for row, renamed in zip(piece.rows.tolist(), piece.renamed.tolist(), strict=True):
            try:
                key = reader.key(number, row)
            except TarDamageError as error:
                accounts.append(lost(piece.tar, row, str(error)))
                continue
            if renamed or not _fits(key):
                key = other_key(reader.corpus.tar_hash(number), row)
            yield key, number, row


def _fits(key: str) -> bool:
    try:
        member_header(f"{key}.{_LONGEST}", 0)
    except ValueError:
        return False
    return True
