"""A packed folder made whole again: of a damaged shard a new one of the samples that are still what they were.

The account knows what a shard held: every sample with the sha256 of its picture and its captions. What does not agree
with it is lost, and so is what cannot be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.build.accounts import PACKED, SCHEMA, SKIPPED, read_account, write_account
from data_tools.corpus.reader import Sample, read_sample
from data_tools.errors import UserError
from data_tools.format.files import opened
from data_tools.format.index import Index, index_path, open_index, write_index
from data_tools.format.manifest import FILE_NAME, ShardRecord, read_manifest
from data_tools.format.survey import build_index
from data_tools.format.tar import TarDamageError
from data_tools.format.writer import write_shard
from data_tools.media.bad import BadSampleError
from data_tools.media.members import DEFAULT_FIELDS
from data_tools.parallel import run_tasks
from data_tools.progress import Progress
from data_tools.rewrite.swap import Exchange

LOST = "lost"
KEPT_IN = "damaged"  # within the folder, where the old files go


@dataclass(frozen=True)
class Finding:
    """A shard that is not what the manifest says: why, and whether its index alone is to be written anew."""

    name: str
    reason: str
    index_alone: bool


@dataclass(frozen=True)
class _Check:
    folder: Path
    record: ShardRecord


def find_damage(folder: Path, workers: int) -> list[Finding]:
    """The damaged shards of a folder, in its order. Every tar is read. Raises UserError for a shard whose account is
    damaged: nobody knows any more what it held."""
    records = read_manifest(folder / FILE_NAME).shards
    found: dict[str, Finding] = {}
    with Progress("checking", len(records), "shards") as progress:
        for finding in run_tasks(_check, [_Check(folder, record) for record in records], workers, progress):
            found.update({finding.name: finding} if finding else {})
    return [found[record.name] for record in records if record.name in found]


def mend_indexes(folder: Path, findings: list[Finding]) -> None:
    """Write the indexes anew of shards whose tars are whole."""
    for finding in findings:
        if finding.index_alone:
            tar = folder / f"{finding.name}.tar"
            write_index(build_index(tar), index_path(tar))


def repair(folder: Path, findings: list[Finding]) -> Exchange:
    """The exchange of the damaged shards."""
    changes = {finding.name: finding.reason for finding in findings if not finding.index_alone}
    return Exchange(folder, "repairing", changes, _sound_rows, KEPT_IN)


def _check(check: _Check, advance: Callable[[int], None]) -> Finding | None:
    advance(1)
    record = check.record
    tar = check.folder / f"{record.name}.tar"
    _account(tar)
    try:
        index = build_index(tar) if record.samples else open_index(index_path(tar))
    except (FileNotFoundError, UserError) as error:
        return Finding(record.name, str(error) or "the tar is missing", False)
    if (index.tar_hash.hex(), index.num_samples) != (record.xxh3_128, record.samples):
        return Finding(record.name, "its content is not the manifest's", False)
    try:
        stored = open_index(index_path(tar), check=True)
    except (FileNotFoundError, UserError):
        stored = None
    if stored is None or stored.to_bytes() != index.to_bytes():
        return Finding(record.name, "its index is damaged or missing", True)
    return None


def _sound_rows(folder: Path, old: str, new: str, digest: str, reason: str) -> ShardRecord:
    """Commit tar, then index, then account of the new shard."""
    tar = folder / f"{old}.tar"
    account = _account(tar)
    whole = set[str]()
    index = write_shard(folder / f"{new}.tar", _sound(tar, account, whole))
    rows = [row if row["status"] != PACKED or row["key"] in whole else _lost(row, reason) for row in account]
    record = ShardRecord(new, index.num_samples, index.tar_bytes, index.tar_hash.hex())
    return write_account(folder, record, digest, rows)


def _sound(tar: Path, account: list[dict], whole: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples that are what the account says, whose keys `whole` gets; keys rise, as they did."""
    wanted: dict[str, list[dict]] = {}
    for row in account:
        if row["status"] == PACKED:
            wanted.setdefault(row["key"], []).append(row)
    last = ""
    for sample in _readable(tar):
        if sample.key > last and _agrees(sample, wanted.get(sample.key, [])):
            last = sample.key
            whole.add(sample.key)
            yield sample.key, sample.members


def _readable(tar: Path) -> Iterator[Sample]:
    try:
        index: Index = build_index(tar)
    except (FileNotFoundError, UserError):  # nothing of it
        return
    with opened(tar) as file:
        for row in range(index.num_samples):
            try:
                yield read_sample(file, str(tar), index, row)
            except TarDamageError:
                continue


def _agrees(sample: Sample, rows: list[dict]) -> bool:
    try:
        captions = DEFAULT_FIELDS.all_captions(sample) if any(row["captions"] for row in rows) else []
        image = DEFAULT_FIELDS.image_bytes(sample) if any(row["sha256"] for row in rows) else b""
    except BadSampleError:
        return False
    said = [caption for row in rows for caption in row["captions"] or ()]
    hashes = {row["sha256"] for row in rows if row["sha256"]}
    return bool(rows) and captions == said and hashes <= {hashlib.sha256(image).hexdigest()}


def _lost(row: dict, reason: str) -> dict:
    return {**row, "status": SKIPPED, "error_class": LOST, "error": f"lost with the shard: {reason}"}


def _account(tar: Path) -> list[dict]:
    return read_account(tar.with_suffix(".parquet"), SCHEMA.names).to_pylist()
