"""Packing a plan: keep what is committed, write the rest in parallel, commit the manifest last."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from data_tools.pack.accounts import SCHEMA, committed_record
from data_tools.pack.plan import Plan
from data_tools.pack.shard import ShardTask, pack_shard
from data_tools.parallel import run_tasks
from data_tools.progress import Progress
from data_tools.shards.commit import atomic_write, remove_temporaries, sync_folder
from data_tools.shards.manifest import FILE_NAME, Manifest, ShardRecord, read_manifest, write_manifest

PLAN_NAME = "pack.json"


@dataclass(frozen=True)
class Report:
    """What a pack did, in samples, input rows and bytes; `kept` shards were there from an earlier run."""

    shards: int
    kept: int
    samples: int
    rows: int
    bytes: int
    skipped: dict[str, int]


def run_plan(plan: Plan, folder: Path, workers: int) -> Report:
    """Bring `folder` to hold exactly the plan's shards. Safe to kill at any point and to run again.

    Raises UserError when the folder holds shards of another plan or another pack is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder):
        _claim(folder, plan.digest)
        remove_temporaries(folder)
        names = [plan.shard_name(number) for number in range(len(plan.shards))]
        records = {name: committed_record(folder, name, plan.digest) for name in names}
        kept = sum(record is not None for record in records.values())
        tasks = [_task(plan, folder, number) for number, name in enumerate(names) if records[name] is None]
        with Progress("packing", sum(len(item.rows) for task in tasks for item in task.items), "rows") as progress:
            for record in run_tasks(pack_shard, tasks, workers, progress):
                records[record.name] = record
        shards = [record for record in records.values() if record]
        report = _report(shards, kept)
        write_manifest(_manifest(plan, shards, report), folder)
        (folder / PLAN_NAME).unlink(missing_ok=True)
        sync_folder(folder)
    return report


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder against a second pack; the kernel lets go of it when this process dies."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"another pack is writing into {folder}", remedy="wait for it, or choose another folder"
        ) from None
    finally:
        os.close(descriptor)


def _claim(folder: Path, digest: str) -> None:
    """Write down whose folder this is before the first shard; refuse one that holds something else."""
    manifest, claim = folder / FILE_NAME, folder / PLAN_NAME
    remedy = "choose another output folder, or empty this one to pack anew"
    if manifest.exists():
        found = read_manifest(manifest).config_digest
    elif claim.exists():
        found = json.loads(claim.read_bytes())["config_digest"]
    else:
        others = sorted(path.name for path in folder.glob("*.tar"))
        if others:
            raise UserError(f"{folder} holds tars that are not of this pack", got=others[0], remedy=remedy)
        found = None
    if found not in (None, digest):
        what = f"{folder} holds shards of another input or other settings"
        raise UserError(what, got=f"digest {found}", expected=digest, remedy=remedy)
    if not manifest.exists():
        with atomic_write(claim) as file:
            file.write(json.dumps({"config_digest": digest}).encode())


def _task(plan: Plan, folder: Path, number: int) -> ShardTask:
    labels = plan.source.labels
    classes = None if labels is None else {label: place for place, label in enumerate(labels)}
    root, limits = plan.source.root, plan.settings.limits
    return ShardTask(
        folder, plan.shard_name(number), root, plan.shards[number], limits, plan.extension, classes, plan.digest
    )


def _report(shards: list[ShardRecord], kept: int) -> Report:
    skipped: Counter[str] = Counter()
    for shard in shards:
        skipped.update(shard.skipped)
    samples, rows, size = (sum(getattr(shard, name) for shard in shards) for name in ("samples", "rows", "bytes"))
    return Report(len(shards), kept, samples, rows, size, dict(sorted(skipped.items())))


def _manifest(plan: Plan, shards: list[ShardRecord], report: Report) -> Manifest:
    totals = {"samples": report.samples, "rows": report.rows, "bytes": report.bytes, "skipped": report.skipped}
    schema = {field.name: str(field.type) for field in SCHEMA}
    return Manifest(plan.config, plan.digest, schema, tuple(shards), plan.source.labels or (), totals)
