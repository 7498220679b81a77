"""The folder of committed checkpoints: how one gets in, what is intact, which ones stay. No tensors, no collectives.

`checkpoints/step-000001200/`
    rank-00000-of-00002.safetensors   fragments of weights and optimizer states (fragments.py)
    state.json                        TrainState
    model.json                        what rebuilds the model (architecture, preprocessing, head)
    config.yaml                       resolved settings
    metrics.json                      the evaluation of this step, where there was one
    manifest.json                     name, bytes and xxh3-128 of every file above
`checkpoints/latest`, `checkpoints/best`: names of such folders

What is being written or deleted lies in a hidden folder: a crash at any point leaves the committed ones as they were.
What people put beside them (copies, renamed checkpoints) is neither resumed from, nor counted, nor deleted.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write, remove_temporaries, sync_folder
from pretrain.towers.files import is_number, read_json

FOLDER, LATEST, BEST, MANIFEST, METRICS = "checkpoints", "latest", "best", "manifest.json", "metrics.json"
STATE, MODEL, SETTINGS = "state.json", "model.json", "config.yaml"
_HIDDEN = ".writing-"
_NAME = re.compile(r"step-([0-9]{9}|[1-9][0-9]{9,17})")  # as step_folder writes it
_RANK_FILE = re.compile(r"rank-([0-9]{5})-of-([0-9]{5})\.safetensors")
_MOST_FILES = 100_000


def commit_point(name: str) -> None:
    """Passed at every point where a crash leaves another state behind; the crash tests put their kill here."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, those of every step that `keep_every` (steps) divides, and the one
    whose evaluation is the best by the metric `keep_best`: the highest, or with a minus before its name the lowest."""

    keep: int = 2
    keep_every: int | None = None
    keep_best: str | None = None

    def score(self, values: Mapping[str, float]) -> float | None:
        """What `keep_best` makes of an evaluation, higher is better; None where its metric is not among `values`."""
        name = (self.keep_best or "").removeprefix("-")
        if name not in values:
            return None
        return -values[name] if self.keep_best != name else values[name]

    def best(self, checkpoints: Sequence[Path]) -> tuple[float, Path] | None:
        """Score and folder of the best evaluated one of `checkpoints`, the first of equals."""
        scores = [(self.score(evaluation(path)), path) for path in checkpoints]
        known = [(score, path) for score, path in scores if score is not None]
        return max(known, key=lambda pair: pair[0], default=None)

    def superfluous(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Those of `checkpoints`, oldest first, that no rule keeps."""
        best = self.best(checkpoints)
        return [
            path
            for path in checkpoints[: -self.keep]
            if not (self.keep_every and step_of(path) % self.keep_every == 0) and (best is None or path != best[1])
        ]


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:09d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def temporary_folder(checkpoint: Path) -> Path:
    """The hidden folder that becomes `checkpoint`."""
    return checkpoint.with_name(_HIDDEN + checkpoint.name)


def prepare(temporary: Path) -> None:
    """Make a temporary folder, empty even where a crash has left one of that name."""
    if temporary.exists():
        _hide(temporary)
    temporary.mkdir(parents=True)


def clear(folder: Path, temporary: Path) -> None:
    """Delete what crashed or failed saves left in `folder`, all but `temporary`."""
    for leftover in folder.glob(f"{_HIDDEN}step-*"):
        if leftover != temporary:
            shutil.rmtree(leftover, ignore_errors=True)
    remove_temporaries(folder)


def commit(temporary: Path, final: Path, entries: list[dict], small: Mapping[str, str], retention: Retention) -> None:
    """Turn `temporary`, in which all ranks have written the files of `entries`, into the checkpoint `final`; add the
    `small` files, move the pointers, and delete what `retention` does not keep. One process calls it."""
    folder = final.parent
    for entry in entries:
        path = temporary / entry["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            raise UserError(f"{path} is not as its rank wrote it", got=f"{size} bytes", expected=entry["bytes"])
    for name, text in small.items():
        _write(temporary / name, text)
    entries = [*entries, *(file_entry(temporary / name) for name in small)]
    commit_point("before-manifest")
    _write(temporary / MANIFEST, json.dumps({"files": entries}, indent=1))
    commit_point("before-rename")
    if final.exists():  # a damaged one of the same step
        _hide(final)
        commit_point("while-replacing")
    temporary.rename(final)
    sync_folder(folder)
    commit_point("before-latest")
    _write(folder / LATEST, final.name + "\n")
    commit_point("before-best")
    kept = [path for path in committed(folder) if step_of(path) <= step_of(final)]
    passed_over = [path for path in committed(folder) if path not in kept]  # damaged: the run went on from before them
    best = retention.best(kept)
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        _write(folder / BEST, best[1].name + "\n")
    commit_point("before-pruning")
    for old in [*passed_over, *retention.superfluous(kept)]:
        hidden = _hide(old)
        commit_point("while-pruning")
        shutil.rmtree(hidden, ignore_errors=True)  # what stays for now, a file that is open on NFS, `clear` removes


def committed(folder: Path) -> list[Path]:
    """The run's own checkpoint folders with a manifest, oldest first."""
    return [path for path in _own(folder) if (path / MANIFEST).is_file()]


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match its manifest, and what is wrong with the newer ones."""
    notes: list[str] = []
    for path in reversed(_own(folder)):
        fault = fault_of(path)
        if fault is None:
            return path, notes
        notes.append(f"checkpoint {path} is damaged: {fault}")
    return None, notes


def _own(folder: Path) -> list[Path]:
    """Folders that this module named, oldest first; not a copy under another step's name, which its state gives away.

    One without a manifest, or whose state cannot be read, is damaged, and still the run's own.
    """
    named = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in named if _saved_step(path) in (None, step_of(path))), key=step_of)


def _saved_step(checkpoint: Path) -> int | None:
    try:
        step = read_json(checkpoint / STATE).get("step")
    except UserError:
        return None
    return step if is_number(step) else None


def fault_of(checkpoint: Path) -> str | None:
    """What differs from the manifest of a checkpoint, or None."""
    try:
        entries = _entries(checkpoint)
        for want in entries:
            path = checkpoint / want["name"]
            if not path.is_file():
                return f"{want['name']} is missing"
            got = file_entry(path)
            if got != want:
                field = "bytes" if got["bytes"] != want["bytes"] else "xxh3_128"
                return f"{want['name']} has {field} {got[field]}, expected {want[field]}"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None


def rank_files(checkpoint: Path) -> list[Path]:
    """The files of the ranks, as the manifest lists them: another one in the folder is not the checkpoint's. Raises
    UserError for a manifest that is none."""
    return [checkpoint / entry["name"] for entry in _entries(checkpoint) if _RANK_FILE.fullmatch(entry["name"])]


def _entries(checkpoint: Path) -> list[dict]:
    """The entries of a manifest, by name: plain file names, and with them all that a checkpoint needs."""
    path = checkpoint / MANIFEST
    entries = read_json(path).get("files")
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_FILES:
        raise UserError(f"{path} lists no files")
    wanted = {}
    for entry in entries:
        keys = ("name", "bytes", "xxh3_128")
        want = {key: entry.get(key) for key in keys} if isinstance(entry, dict) else {}
        name = want.get("name")
        if not isinstance(name, str) or Path(name).name != name or name in wanted or not is_number(want["bytes"]):
            raise UserError(f"{path} has an entry that is none", got=entry, expected=f"{', '.join(keys)} of one file")
        wanted[name] = want
    ranks = [match for name in wanted if (match := _RANK_FILE.fullmatch(name))]
    whole = [f"rank-{rank:05d}-of-{len(ranks):05d}.safetensors" for rank in range(max(1, len(ranks)))]
    missing = [name for name in (STATE, MODEL, SETTINGS, *whole) if name not in wanted]
    if missing:
        raise UserError(f"{path} is not whole", got=f"{len(wanted)} files without {missing[0]}")
    return [wanted[name] for name in sorted(wanted)]


def file_entry(path: Path) -> dict:
    """Name, bytes and xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def evaluation(checkpoint: Path) -> dict[str, float]:
    """The metrics that were evaluated at a checkpoint's step; none where it was not evaluated."""
    try:
        values = read_json(checkpoint / METRICS)
    except UserError:  # absent, or damaged: then it is not the best one
        return {}
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def _hide(path: Path) -> Path:
    """Rename away what is to be deleted: from now on it does not count, however little of it is deleted yet."""
    hidden = path.with_name(f"{_HIDDEN}{path.name.removeprefix(_HIDDEN)}-{secrets.token_hex(4)}")
    return path.rename(hidden)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
