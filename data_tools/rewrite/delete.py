"""Samples taken out of a packed folder, for good.

A shard that holds some of them is written once more without them, under a name of its own; then the manifest names the
new shards, in one step; then the old files go. So the folder is a whole corpus at any time, the old or the new one, and
the same command goes on where it was killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from data_tools.build.accounts import SCHEMA, SKIPPED, committed_record, read_account, to_json, write_account
from data_tools.corpus import Corpus, ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.commit import remove_temporaries, sync_folder
from data_tools.format.manifest import FILE_NAME, Manifest, ShardRecord, read_manifest, totals_of, write_manifest
from data_tools.format.writer import write_shard
from data_tools.parallel import run_tasks
from data_tools.progress import Progress

DELETED = "deleted"
_REPLACED = "replaced"  # in the manifest's config: shards whose files are to go, where they still lie there
_REVISION = re.compile(r"(.*)-r([0-9]+)")
_ADVANCE_EVERY = 32


@dataclass(frozen=True)
class Deletion:
    """Rows to take out, int64 rising, by the name of the shard."""

    folder: Path
    rows: dict[str, np.ndarray]

    @property
    def new(self) -> dict[str, str]:
        """The name of each shard once it is written anew."""
        return {name: _revised(name) for name in self.rows}


@dataclass(frozen=True)
class _Task:
    folder: Path
    old: str
    new: str
    rows: np.ndarray
    digest: str


def plan_deletion(folder: Path, corpus: Corpus, rows: list[np.ndarray]) -> Deletion:
    """`rows` of each shard of the corpus that the folder holds."""
    names = [Path(path).stem for path in corpus.paths]
    return Deletion(folder, {name: found for name, found in zip(names, rows, strict=True) if len(found)})


def finish(folder: Path, kept: Iterable[str] = ()) -> None:
    """Remove what a killed deletion left: shards that the manifest no longer names, and those that it does not name
    yet but for `kept`. The caller holds the folder."""
    remove_temporaries(folder)
    manifest = read_manifest(folder / FILE_NAME)
    held = {shard.name for shard in manifest.shards}
    for name in {*manifest.config.get(_REPLACED, []), *map(_revised, held)} - held - set(kept):
        _remove(folder, name)
    sync_folder(folder)


def deleted_before(folder: Path, ids: list[str]) -> int:
    """How many of these keys or ids name samples that were taken out of the folder."""
    wanted, found = set(ids), set[str]()
    for shard in read_manifest(folder / FILE_NAME).shards:
        rows = _account(folder / f"{shard.name}.tar") if DELETED in shard.skipped else ()
        found |= {name for row in rows if row["error_class"] == DELETED for name in (row["id"], row["key"])}
    return len(wanted & found)


def delete(deletion: Deletion, workers: int) -> Manifest:
    """Write the shards anew, then the manifest, then remove the old files. The caller holds the folder."""
    folder = deletion.folder
    manifest = read_manifest(folder / FILE_NAME)
    digest = _digest(manifest, deletion)
    new = deletion.new
    finish(folder, new.values())
    records = {name: committed_record(folder, new[name], digest) for name in new}
    tasks = [_Task(folder, name, new[name], deletion.rows[name], digest) for name in new if records[name] is None]
    by_new = {made: name for name, made in new.items()}
    samples = {shard.name: shard.samples for shard in manifest.shards}
    with Progress("rewriting", sum(samples[task.old] for task in tasks), "samples") as progress:
        for record in run_tasks(_rewrite, tasks, workers, progress):
            records[by_new[record.name]] = record
    shards = tuple(records.get(shard.name) or shard for shard in manifest.shards)
    config = {**manifest.config, _REPLACED: sorted(new)}
    changed = replace(
        manifest, config=config, config_digest=digest, shards=shards, totals=totals_of(shards), columns={}
    )
    write_manifest(changed, folder)
    finish(folder)
    return changed


def _digest(manifest: Manifest, deletion: Deletion) -> str:
    """Another than the pack's, which would bring the samples back."""
    digest = xxhash.xxh3_128(manifest.config_digest.encode())
    for name, rows in sorted(deletion.rows.items()):
        digest.update(name.encode())
        digest.update(rows.astype("<i8").tobytes())
    return digest.hexdigest()


def _revised(name: str) -> str:
    """`shard-000003` -> `shard-000003-r1` -> `shard-000003-r2`."""
    found = _REVISION.fullmatch(name)
    return f"{found[1]}-r{int(found[2]) + 1}" if found else f"{name}-r1"


def _remove(folder: Path, name: str) -> None:
    """The files of a shard: tar, index, account, columns. The tar last: by it the others are known to go."""
    suffixes = [".idx", ".parquet", *(path.name.removeprefix(name) for path in folder.glob(f"{name}.*.parquet"))]
    for suffix in (*suffixes, ".tar"):
        (folder / f"{name}{suffix}").unlink(missing_ok=True)


def _rewrite(task: _Task, advance: Callable[[int], None]) -> ShardRecord:
    """Commit tar, then index, then account of the new shard."""
    old = task.folder / f"{task.old}.tar"
    gone: set[str] = set()
    with ShardReader(open_corpus(old)) as reader:
        gone = {reader.key(0, row) for row in task.rows.tolist()}
        index = write_shard(task.folder / f"{task.new}.tar", _kept(reader, task.rows, advance))
    rows = [_without(row) if row["key"] in gone else row for row in _account(old)]
    record = ShardRecord(task.new, index.num_samples, index.tar_bytes, index.tar_hash.hex())
    return write_account(task.folder, record, task.digest, rows)


def _kept(
    reader: ShardReader, rows: np.ndarray, advance: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    count = reader.index(0).num_samples
    for number, row in enumerate(np.setdiff1d(np.arange(count), rows).tolist()):
        sample = reader.read(0, row)
        yield sample.key, sample.members
        if number % _ADVANCE_EVERY == _ADVANCE_EVERY - 1:
            advance(_ADVANCE_EVERY)


def _account(tar: Path) -> list[dict]:
    return read_account(tar.with_suffix(".parquet"), SCHEMA.names).to_pylist()


def _without(row: dict) -> dict:
    """A row of which nothing but what it was is left."""
    told = {name: row[name] for name in ("id", "key", "source")}
    left = {"status": SKIPPED, "error_class": DELETED, "error": "taken out by delete", "metadata": to_json({})}
    return {**dict.fromkeys(SCHEMA.names), **told, **left, "captions": []}


def check_packed(folder: Path) -> None:
    """Raises UserError for what is no packed folder."""
    if not (folder / FILE_NAME).is_file():
        remedy = f"of other tars make one without them: `python -m data_tools reshard {folder} OUTPUT --without FILE`"
        raise UserError(f"no {FILE_NAME} in {folder}", expected="a packed folder", remedy=remedy)
