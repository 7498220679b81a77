"""Samples taken out of a packed folder, for good: the shards that hold them are exchanged for others without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.build.accounts import SCHEMA, SKIPPED, read_account, to_json, write_account
from data_tools.corpus import Corpus, ShardReader, open_corpus
from data_tools.format.manifest import FILE_NAME, ShardRecord, read_manifest
from data_tools.format.writer import write_shard
from data_tools.rewrite.swap import Exchange

DELETED = "deleted"


def deletion(folder: Path, corpus: Corpus, rows: list[np.ndarray]) -> Exchange:
    """`rows` of each shard of the corpus that the folder holds, to be taken out."""
    names = [Path(path).stem for path in corpus.paths]
    changes = {name: found.tolist() for name, found in zip(names, rows, strict=True) if len(found)}
    return Exchange(folder, "deleting", changes, _without_rows)


def deleted_before(folder: Path, ids: list[str]) -> int:
    """How many of these keys or ids name samples that were taken out of the folder."""
    wanted, found = set(ids), set[str]()
    for shard in read_manifest(folder / FILE_NAME).shards:
        rows = _account(folder / f"{shard.name}.tar") if DELETED in shard.skipped else ()
        found |= {name for row in rows if row["error_class"] == DELETED for name in (row["id"], row["key"])}
    return len(wanted & found)


def _without_rows(folder: Path, old: str, new: str, digest: str, rows: list[int]) -> ShardRecord:
    """Commit tar, then index, then account of the new shard."""
    tar = folder / f"{old}.tar"
    with ShardReader(open_corpus(tar)) as reader:
        gone = {reader.key(0, row) for row in rows}
        index = write_shard(folder / f"{new}.tar", _kept(reader, rows))
    account = [_emptied(row) if row["key"] in gone else row for row in _account(tar)]
    record = ShardRecord(new, index.num_samples, index.tar_bytes, index.tar_hash.hex())
    return write_account(folder, record, digest, account)


def _kept(reader: ShardReader, rows: list[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
    for row in np.setdiff1d(np.arange(reader.index(0).num_samples), rows).tolist():
        sample = reader.read(0, row)
        yield sample.key, sample.members


def _account(tar: Path) -> list[dict]:
    return read_account(tar.with_suffix(".parquet"), SCHEMA.names).to_pylist()


def _emptied(row: dict) -> dict:
    """A row of which nothing but what it was is left."""
    told = {name: row[name] for name in ("id", "key", "source")}
    left = {"status": SKIPPED, "error_class": DELETED, "error": "taken out by delete", "metadata": to_json({})}
    return {**dict.fromkeys(SCHEMA.names), **told, **left, "captions": []}
