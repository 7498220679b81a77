"""Samples named by a file: their keys, their ids in the account, or a field of their json, such as DataComp's uid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.columns.column import WEIGHT, read_column
from data_tools.corpus import Corpus, Sample, ShardReader, open_corpus
from data_tools.errors import UserError, shown
from data_tools.format.files import read_small
from data_tools.format.index import index_path, key_hash, open_index
from data_tools.format.tar import TarDamageError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import found_at
from data_tools.parallel import run_tasks
from data_tools.progress import Progress

_MAX_BYTES = 4 << 30
_NPY = b"\x93NUMPY"
_ADVANCE_EVERY = 256
_SHOWN = 5


def read_ids(path: Path) -> list[str]:
    """The ids of a file, in its order, each once: a line each, or a NumPy array of texts or of DataComp's pairs of
    unsigned 64-bit halves, which are a uid in hex.

    Raises UserError for a file that is missing, empty or neither.
    """
    try:
        data = read_small(path, _MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"no file of ids: {path}") from None
    ids = _from_array(path) if data.startswith(_NPY) else _from_lines(path, data)
    found = list(dict.fromkeys(ids))
    if not found:
        raise UserError(f"no ids in {path}", expected="one a line")
    return found


def _from_lines(path: Path, data: bytes) -> Iterable[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text", got=error, expected="UTF-8, one id a line, or a .npy") from None
    return filter(None, map(str.strip, text.splitlines()))


def _from_array(path: Path) -> Iterable[str]:
    expected = "one dimension of texts, or of pairs of 64-bit numbers (u8,u8)"
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"cannot read {path}", got=error, expected=expected) from None
    halves = [array[name] for name in array.dtype.names or ()]
    if array.ndim == 1 and len(halves) == 2 and all(half.dtype == np.uint64 for half in halves):
        return (f"{high:016x}{low:016x}" for high, low in zip(*(half.tolist() for half in halves), strict=True))
    if array.ndim != 1 or array.dtype.kind != "U":
        raise UserError(f"{path} holds no ids", got=f"{array.ndim} dimensions of {array.dtype}", expected=expected)
    return array.tolist()


@dataclass(frozen=True)
class Named:
    """Which samples ids name: rows by shard, int64 rising; and the ids that name none."""

    rows: list[np.ndarray]
    missing: list[str]


@dataclass(frozen=True)
class _Task:
    number: int
    tar: str
    hashes: np.ndarray  # of the keys that are looked for; empty where a field is
    ids: frozenset[str]
    field: str | None


def find_named(corpus: Corpus, ids: list[str], field: str | None, workers: int) -> Named:
    """The samples whose key is among `ids`, or whose id in the account of a pack is, of which the key is a hash; with
    `field` those whose json has one of them there.

    A key is looked up in the index, and compared where its hash is found. For a field every sample is read.
    """
    wanted = frozenset(ids)
    keys = [] if field else [*ids, *map(packed_key, ids)]
    hashes = np.unique(np.array([key_hash(key) for key in keys], np.uint64))
    tasks = [_Task(number, path, hashes, wanted, field) for number, path in enumerate(corpus.paths)]
    rows: list[np.ndarray] = [np.empty(0, np.int64)] * len(tasks)
    seen: set[str] = set()
    with Progress("looking", corpus.num_samples if field else len(tasks), "samples" if field else "shards") as progress:
        for number, found, names in run_tasks(_look, tasks, workers, progress):
            rows[number] = found
            seen |= names
    return Named(rows, [one for one in ids if one not in seen])


def say_named(ids: list[str], named: Named) -> None:
    """Print how many of the ids name samples, and the first of those that do not."""
    print(f"{len(ids) - len(named.missing)} of {len(ids)} ids name {sum(map(len, named.rows))} samples")
    if named.missing:
        listed = ", ".join(shown(one, 60) for one in named.missing[:_SHOWN])
        more = len(named.missing) - _SHOWN
        print(f"without a sample: {listed}{f' and {more} more' if more > 0 else ''}")


def packed_key(identity: str) -> str:
    """The key under which `pack` stores the sample of an id."""
    return xxhash.xxh3_128_hexdigest(identity.encode())


def _look(task: _Task, advance: Callable[[int], None]) -> tuple[int, np.ndarray, set[str]]:
    """The number of the shard, its rows that are named, and the ids that name them."""
    rows, names = [], set[str]()
    packed = {} if task.field else {packed_key(one): one for one in task.ids}
    with ShardReader(open_corpus(task.tar)) as reader:
        for row in _candidates(task):
            name = _name(reader, row, task.field)
            name = packed.get(name, name)
            if name in task.ids:
                rows.append(row)
                names.add(name)
            if task.field and row % _ADVANCE_EVERY == _ADVANCE_EVERY - 1:
                advance(_ADVANCE_EVERY)
    if not task.field:
        advance(1)
    return task.number, np.array(rows, np.int64), names


def _candidates(task: _Task) -> Iterable[int]:
    index = open_index(index_path(Path(task.tar)))
    if task.field:
        return range(index.num_samples)
    return np.flatnonzero(np.isin(index.key_hashes, task.hashes)).tolist()


def _name(reader: ShardReader, row: int, field: str | None) -> str:
    """What an id would have to be to name the sample; "" of one that was lost."""
    try:
        return reader.key(0, row) if field is None else value_at(reader.read(0, row), field)
    except (TarDamageError, BadSampleError):
        return ""


def value_at(sample: Sample, field: str) -> str:
    """What stands at a field of the json, "" for nothing, or for what is neither a text nor a whole number. Raises
    BadSampleError for a json that cannot be read."""
    found = found_at(sample, f"json:{field}")
    return str(found) if isinstance(found, (str, int)) else ""


def weighted(corpus: Corpus, column: str) -> list[np.ndarray]:
    """The rows of each shard whose `sample_weight` in a column is not 0. Raises UserError where a shard has no such
    column."""
    rows = []
    for shard, path in enumerate(corpus.paths):
        ids = open_index(index_path(Path(path))).key_hashes
        weights = read_column(Path(path), column, corpus.tar_hash(shard), [WEIGHT], ids)[WEIGHT]
        rows.append(np.flatnonzero(weights.fill_null(1.0).to_numpy() != 0))
    return rows
