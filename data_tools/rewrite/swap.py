"""Shards of a packed folder exchanged for others, in one step.

The new ones are written under names of their own; then the manifest names them; then the old files go. So the folder is
a whole corpus at any time, the old or the new one, and the same command goes on where it was killed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from data_tools.build.accounts import committed_record
from data_tools.errors import UserError
from data_tools.format.commit import remove_temporaries, sync_folder
from data_tools.format.manifest import FILE_NAME, Manifest, ShardRecord, read_manifest, totals_of, write_manifest
from data_tools.parallel import run_tasks
from data_tools.progress import Progress

_REPLACED, _PLACE = "replaced", "replaced_go_to"  # in the manifest's config: shards whose files go, and where to
_REVISION = re.compile(r"(.*)-r([0-9]+)")


@dataclass(frozen=True)
class Exchange:
    """What is to be exchanged in `folder`.

    Attributes:
        what: for the progress bar.
        changes: by the name of a shard what follows from the request, from which its new content follows.
        make: (folder, old name, new name, digest, change) -> the committed record of the new shard. It runs in worker
            processes.
        keep_in: a folder within `folder` to which the old files go; None: they are removed.
    """

    folder: Path
    what: str
    changes: Mapping[str, Any]
    make: Callable[[Path, str, str, str, Any], ShardRecord]
    keep_in: str | None = None


@dataclass(frozen=True)
class _Task:
    exchange: Exchange
    old: str
    new: str
    digest: str


def check_packed(folder: Path, remedy: str) -> None:
    """Raises UserError for what is no packed folder."""
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"no {FILE_NAME} in {folder}", expected="a packed folder", remedy=remedy)


def exchange(request: Exchange, workers: int) -> Manifest:
    """Write the new shards, then the manifest, then let the old files go. The caller holds the folder."""
    folder = request.folder
    manifest = read_manifest(folder / FILE_NAME)
    digest = _digest(manifest, request)
    new = {name: _revised(name) for name in request.changes}
    finish(folder, new.values())
    records = {name: committed_record(folder, new[name], digest) for name in new}
    tasks = [_Task(replace(request, changes={name: request.changes[name]}), name, new[name], digest)
             for name in new if records[name] is None]  # fmt: skip
    by_new = {made: name for name, made in new.items()}
    with Progress(request.what, len(tasks), "shards") as progress:
        for record in run_tasks(_make, tasks, workers, progress):
            records[by_new[record.name]] = record
    shards = tuple(records.get(shard.name) or shard for shard in manifest.shards)
    config = {**manifest.config, _REPLACED: sorted(new), _PLACE: request.keep_in}
    totals = totals_of(shards)
    changed = replace(manifest, config=config, config_digest=digest, shards=shards, totals=totals, columns={})
    write_manifest(changed, folder)
    finish(folder)
    return changed


def finish(folder: Path, kept: Iterable[str] = ()) -> None:
    """Let go what a killed exchange left: shards that the manifest no longer names, and those that it does not name yet
    but for `kept`. The caller holds the folder."""
    remove_temporaries(folder)
    manifest = read_manifest(folder / FILE_NAME)
    held = {shard.name for shard in manifest.shards}
    place = manifest.config.get(_PLACE)
    for name in set(manifest.config.get(_REPLACED, [])) - held:
        _let_go(folder, name, place)
    for name in set(map(_revised, held)) - held - set(kept):
        _let_go(folder, name, None)
    sync_folder(folder)


def _make(task: _Task, advance: Callable[[int], None]) -> ShardRecord:
    request = task.exchange
    record = request.make(request.folder, task.old, task.new, task.digest, request.changes[task.old])
    advance(1)
    return record


def _digest(manifest: Manifest, request: Exchange) -> str:
    """Another than the pack's, which would bring back what went."""
    digest = xxhash.xxh3_128(f"{manifest.config_digest} {request.what}".encode())
    for name, change in sorted(request.changes.items()):
        digest.update(f"{name} {change}".encode())
    return digest.hexdigest()


def _revised(name: str) -> str:
    """`shard-000003` -> `shard-000003-r1` -> `shard-000003-r2`."""
    found = _REVISION.fullmatch(name)
    return f"{found[1]}-r{int(found[2]) + 1}" if found else f"{name}-r1"


def _let_go(folder: Path, name: str, place: str | None) -> None:
    """The files of a shard: tar, index, account, columns."""
    files = [folder / f"{name}{suffix}" for suffix in (".tar", ".idx", ".parquet")]
    files = [path for path in (*files, *folder.glob(f"{name}.*.parquet")) if path.exists()]
    if place is not None and files:
        (folder / place).mkdir(exist_ok=True)
    for path in files:
        if place is None:
            path.unlink()
        else:
            path.replace(folder / place / path.name)
