"""Making a folder of shards: keep what is committed, make the rest in parallel, commit the manifest last."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.build.accounts import SCHEMA, committed_record, remove_orphans
from data_tools.errors import UserError
from data_tools.format.commit import atomic_write, exclusive, remove_temporaries, sync_folder
from data_tools.format.manifest import FILE_NAME, Manifest, ShardRecord, read_manifest, totals_of, write_manifest
from data_tools.parallel import run_tasks
from data_tools.progress import Progress

CLAIM = "pack.json"  # in a folder that is not finished: whose it is


@dataclass(frozen=True)
class Build:
    """What is to be made.

    Attributes:
        what: for the progress bar, as in "packing".
        config: the settings, as the manifest keeps them.
        digest: of settings and input; equal ones mean equal bytes.
        names: of the shards, in their order.
        rows: input rows of each.
        task: number of a shard -> what `make` takes; it is pickled into a worker process.
        make: commits tar, index and account of one shard, reporting rows as it goes.
        classes: names of the labels.
    """

    what: str
    config: dict
    digest: str
    names: Sequence[str]
    rows: Sequence[int]
    task: Callable[[int], Any]
    make: Callable[[Any, Callable[[int], None]], ShardRecord]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was made, in samples, input rows and bytes; `kept` shards were there from an earlier run."""

    shards: int
    kept: int
    samples: int
    rows: int
    bytes: int
    skipped: dict[str, int]


def run_build(build: Build, folder: Path, workers: int) -> Report:
    """Bring `folder` to hold exactly these shards. Safe to kill at any point and to run again.

    Raises UserError when the folder holds other shards or another command is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        _claim(folder, build)
        remove_temporaries(folder)
        remove_orphans(folder)
        records = {name: committed_record(folder, name, build.digest) for name in build.names}
        missing = [number for number, name in enumerate(build.names) if records[name] is None]
        with Progress(build.what, sum(build.rows[number] for number in missing), "rows") as progress:
            for record in run_tasks(build.make, [build.task(number) for number in missing], workers, progress):
                records[record.name] = record
        shards = [record for record in records.values() if record]
        report = _report(shards, len(build.names) - len(missing))
        if report.samples:
            write_manifest(_manifest(build, shards, _columns(folder, shards)), folder)
        else:
            _leave_accounts(folder, build.names)
        (folder / CLAIM).unlink(missing_ok=True)
        sync_folder(folder)
    return report


def _leave_accounts(folder: Path, names: Sequence[str]) -> None:
    """Nothing was packed: what is left is no corpus, only the account of why, which stands in nobody's way."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    for name in names:
        for suffix in (".idx", ".tar"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)


def _claim(folder: Path, build: Build) -> None:
    """Write down whose folder this is before the first shard; refuse one that holds something else."""
    remedy = "choose another output folder, or empty this one to begin anew"
    found = _claimed(folder)
    if found is None:
        others = sorted(path.name for path in folder.glob("*.tar"))
        if others:
            raise UserError(f"{folder} holds tars that are not of this command", got=others[0], remedy=remedy)
        with atomic_write(folder / CLAIM) as file:
            file.write(json.dumps({"config_digest": build.digest, "config": build.config}).encode())
    elif found[0] != build.digest:
        theirs, ours = _difference(found[1], json.loads(json.dumps(build.config)))
        what = f"{folder} holds shards of another input or other settings"
        raise UserError(what, got=theirs, expected=ours, remedy=remedy)


def _claimed(folder: Path) -> tuple[str, dict] | None:
    """Digest and settings of the command that wrote, or began to write, into the folder; None for a free one."""
    if (folder / FILE_NAME).exists():
        manifest = read_manifest(folder / FILE_NAME)
        return manifest.config_digest, manifest.config
    try:
        claim = json.loads((folder / CLAIM).read_bytes())
        return str(claim["config_digest"]), dict(claim.get("config", {}))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        remedy = "delete it if no command of yours is unfinished here"
        raise UserError(f"{folder / CLAIM} was not written by data_tools", got=error, remedy=remedy) from None


def _difference(theirs: dict, ours: dict) -> tuple[str, str]:
    """The settings that differ on either side; without one the rows or the files do."""
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if not names or not theirs:
        return "another content", "the same rows and files as before"
    before, now = (", ".join(f"{name} {side.get(name)}" for name in names) for side in (theirs, ours))
    return before, now


def _report(shards: list[ShardRecord], kept: int) -> Report:
    return Report(shards=len(shards), kept=kept, **totals_of(shards))


def _columns(folder: Path, shards: list[ShardRecord]) -> dict:
    """Of shards that stayed as they were."""
    if not (folder / FILE_NAME).exists():
        return {}
    before = read_manifest(folder / FILE_NAME)
    return before.columns if before.shards == tuple(shards) else {}


def _manifest(build: Build, shards: list[ShardRecord], columns: dict) -> Manifest:
    schema = {field.name: str(field.type) for field in SCHEMA}
    return Manifest(build.config, build.digest, schema, tuple(shards), build.classes, totals_of(shards), columns)
