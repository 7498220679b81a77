"""The checks of one shard, and of all shards together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data_tools.corpus.reader import read_sample
from data_tools.errors import UserError
from data_tools.format.files import opened
from data_tools.format.index import Index, index_path, open_index
from data_tools.format.manifest import ShardRecord
from data_tools.format.survey import build_index, survey_tar
from data_tools.format.tar import TarDamageError
from data_tools.media.members import DEFAULT_FIELDS, Fields
from data_tools.verify.samples import Findings, faults

_SHOWN = 5


@dataclass(frozen=True)
class ShardCheck:
    """A tar to check, against its manifest record if it has one, decoding a share of its images (0 to 1). `fields` say
    where images and captions are; `num_classes` is 0 where nobody knows them."""

    tar: Path
    record: ShardRecord | None
    decode: float
    fields: Fields = DEFAULT_FIELDS
    num_classes: int = 0


@dataclass
class ShardReport:
    """What was found: `problems` is empty for a sound shard. `key_hashes`, uint64 [samples], is all that stays of its
    index, so that a corpus of 10^9 samples fits in memory; None when the tar cannot be walked."""

    tar: Path
    problems: list[str] = field(default_factory=list)
    key_hashes: np.ndarray | None = None
    decoded: int = 0


def check_shard(check: ShardCheck, advance: Callable[[int], None]) -> ShardReport:
    """Run all checks of one shard; nothing found stops the others."""
    report = ShardReport(check.tar)
    advance(1)
    try:
        if not check.tar.exists():
            report.problems.append(f"missing shard {check.tar}")
            return report
        stored = _check_index_file(check, report)
        index = _check_tar(check, stored, report)
        if check.record:
            _check_parquet(check.tar.with_suffix(".parquet"), check.record, report)
        if index is not None:
            report.key_hashes = index.key_hashes.copy()
            _check_samples(check, index, report)
    except OSError as error:
        report.problems.append(f"cannot read {error.filename or check.tar}: {error.strerror}")
    return report


def duplicate_keys(reports: list[ShardReport]) -> list[str]:
    """Keys that stand in more than one shard of a folder."""
    folders: dict[Path, list[tuple[Path, np.ndarray]]] = {}
    for report in reports:
        if report.key_hashes is not None:
            folders.setdefault(report.tar.parent, []).append((report.tar, report.key_hashes))
    return [problem for tars in folders.values() for problem in _repeated(tars)]


def _check_index_file(check: ShardCheck, report: ShardReport) -> Index | None:
    """The stored index; a tar of another tool need not have one."""
    path = index_path(check.tar)
    if not path.exists() and not check.record:
        return None
    try:
        return open_index(path, check=True)
    except UserError as error:
        report.problems.append(str(error))
        return None


def _check_tar(check: ShardCheck, stored: Index | None, report: ShardReport) -> Index | None:
    record, size = check.record, check.tar.stat().st_size
    if record and size != record.bytes:
        report.problems.append(f"size of {check.tar}: {size} bytes, the manifest has {record.bytes}")
    try:
        survey = survey_tar(check.tar)
    except UserError as error:
        offset = getattr(error, "offset", None)
        report.problems.append(str(error) + ("" if offset is None else _place(offset, stored)))
        return None
    if survey.damages:
        places = [_place(loss.start, stored) for loss in survey.losses] + [""]
        report.problems += map("".join, zip(survey.describe_losses(check.tar), places, strict=False))
        return survey.index  # of what can be read
    index = survey.index
    if not record and not index.num_samples:
        report.problems.append(f"no samples in {check.tar}")
    if record and index.tar_hash.hex() != record.xxh3_128:
        report.problems.append(f"content of {check.tar} changed: its hash is not the manifest's")
    if record and index.num_samples != record.samples:
        report.problems.append(f"{check.tar} has {index.num_samples} samples, the manifest {record.samples}")
    if stored and stored.to_bytes() != index.to_bytes():
        changed = "index of other members" if stored.tar_hash == index.tar_hash else "content changed"
        report.problems.append(f"{check.tar} and its index differ ({changed})")
    return index


def _place(offset: int, stored: Index | None) -> str:
    if stored is None:
        return ""
    sample = max(0, int(np.searchsorted(stored.offsets, offset, "right")) - 1)
    return f" (sample {min(sample, stored.num_samples)} of {stored.num_samples})"


def _check_parquet(path: Path, record: ShardRecord, report: ShardReport) -> None:
    if not path.exists():
        report.problems.append(f"missing {path}")
    elif xxhash.xxh3_128_hexdigest(path.read_bytes()) != record.parquet_xxh3_128:
        report.problems.append(f"content of {path} changed: its hash is not the manifest's")


def _check_samples(check: ShardCheck, index: Index, report: ShardReport) -> None:
    """Look at the texts of all samples and decode the images of a share of them, the same ones each time: those of the
    lowest key hashes."""
    chosen = np.ones(index.num_samples, bool)
    if check.decode < 1:
        chosen = index.key_hashes < check.decode * 2.0**64
    findings = Findings(check.num_classes > 0)
    with opened(check.tar) as file:
        for place, decode in enumerate(chosen.tolist()):
            try:
                sample = read_sample(file, str(check.tar), index, place)
            except TarDamageError:  # lost; the damage is reported
                continue
            findings.add(sample, list(faults(sample, check.fields, check.num_classes, decode)))
    report.decoded = int(chosen.sum())
    report.problems += [f"{check.tar}: {problem}" for problem in findings.problems()]


def _repeated(tars: list[tuple[Path, np.ndarray]]) -> list[str]:
    hashes = np.concatenate([hashes for _, hashes in tars])
    order = np.argsort(hashes, kind="stable")
    twice = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    edges = np.cumsum([0, *(len(hashes) for _, hashes in tars)])
    problems = []
    for place in twice[:_SHOWN].tolist():
        shards = np.searchsorted(edges, np.flatnonzero(hashes == hashes[place]), "right") - 1
        names = ", ".join(tars[shard][0].name for shard in shards)
        shard = int(np.searchsorted(edges, place, "right")) - 1
        tar = tars[shard][0]
        with opened(tar) as file:
            sample = read_sample(file, str(tar), build_index(tar), place - int(edges[shard]))
        problems.append(f"key {sample.key!r} in more than one shard: {names}")
    if len(twice) > _SHOWN:
        problems.append(f"and {len(twice) - _SHOWN} more keys that repeat")
    return problems
