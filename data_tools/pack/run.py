"""Packing a plan: keep what is committed, write the rest in parallel, commit the manifest last."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write, exclusive, remove_temporaries, sync_folder
from data_tools.format.manifest import FILE_NAME, Manifest, ShardRecord, read_manifest, write_manifest
from data_tools.pack.accounts import SCHEMA, committed_record, remove_orphans
from data_tools.pack.plan import Plan
from data_tools.pack.shard import ShardTask, pack_shard
from data_tools.parallel import run_tasks
from data_tools.progress import Progress

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
    with exclusive(folder):
        _claim(folder, plan)
        remove_temporaries(folder)
        remove_orphans(folder)
        names = [plan.shard_name(number) for number in range(len(plan.shards))]
        records = {name: committed_record(folder, name, plan.digest) for name in names}
        kept = sum(record is not None for record in records.values())
        tasks = [_task(plan, folder, number) for number, name in enumerate(names) if records[name] is None]
        with Progress("packing", sum(len(item.rows) for task in tasks for item in task.items), "rows") as progress:
            for record in run_tasks(pack_shard, tasks, workers, progress):
                records[record.name] = record
        shards = [record for record in records.values() if record]
        report = _report(shards, kept)
        if report.samples:
            write_manifest(_manifest(plan, shards, report, _columns(folder, shards)), folder)
        else:
            _leave_accounts(folder, names)
        (folder / PLAN_NAME).unlink(missing_ok=True)
        sync_folder(folder)
    return report


def _leave_accounts(folder: Path, names: list[str]) -> None:
    """Nothing was packed: what is left is no corpus, only the account of why, which stands in nobody's way."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    for name in names:
        for suffix in (".idx", ".tar"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)


def _claim(folder: Path, plan: Plan) -> None:
    """Write down whose folder this is before the first shard; refuse one that holds something else."""
    remedy = "choose another output folder, or empty this one to pack anew"
    found = _claimed(folder)
    if found is None:
        others = sorted(path.name for path in folder.glob("*.tar"))
        if others:
            raise UserError(f"{folder} holds tars that are not of this pack", got=others[0], remedy=remedy)
        with atomic_write(folder / PLAN_NAME) as file:
            file.write(json.dumps({"config_digest": plan.digest, "config": plan.config}).encode())
    elif found[0] != plan.digest:
        theirs, ours = _difference(found[1], json.loads(json.dumps(plan.config)))
        what = f"{folder} holds shards of another input or other settings"
        raise UserError(what, got=theirs, expected=ours, remedy=remedy)


def _claimed(folder: Path) -> tuple[str, dict] | None:
    """Digest and settings of the pack that wrote, or began to write, into the folder; None for a free one."""
    if (folder / FILE_NAME).exists():
        manifest = read_manifest(folder / FILE_NAME)
        return manifest.config_digest, manifest.config
    try:
        claim = json.loads((folder / PLAN_NAME).read_bytes())
        return str(claim["config_digest"]), dict(claim.get("config", {}))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        remedy = "delete it if no pack of yours is unfinished here"
        raise UserError(f"{folder / PLAN_NAME} was not written by pack", got=error, remedy=remedy) from None


def _difference(theirs: dict, ours: dict) -> tuple[str, str]:
    """The settings that differ on either side; without one the rows or the files do."""
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if not names or not theirs:
        return "another content", "the same rows and files as before"
    before, now = (", ".join(f"{name} {side.get(name)}" for name in names) for side in (theirs, ours))
    return before, now


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


def _columns(folder: Path, shards: list[ShardRecord]) -> dict:
    """Of shards that stayed as they were."""
    if not (folder / FILE_NAME).exists():
        return {}
    before = read_manifest(folder / FILE_NAME)
    return before.columns if before.shards == tuple(shards) else {}


def _manifest(plan: Plan, shards: list[ShardRecord], report: Report, columns: dict) -> Manifest:
    totals = {"samples": report.samples, "rows": report.rows, "bytes": report.bytes, "skipped": report.skipped}
    schema = {field.name: str(field.type) for field in SCHEMA}
    return Manifest(plan.config, plan.digest, schema, tuple(shards), plan.source.labels or (), totals, columns)
