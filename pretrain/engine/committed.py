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
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_tools.errors import UserError
from data_tools.shards.commit import atomic_write, remove_temporaries, sync_folder

FOLDER, LATEST, BEST, MANIFEST, METRICS = "checkpoints", "latest", "best", "manifest.json", "metrics.json"
_HIDDEN = ".writing-"


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
    for leftover in folder.glob(f"{_HIDDEN}*"):
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
    """Checkpoint folders with a manifest, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match its manifest, and what is wrong with the newer ones."""
    notes: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = fault_of(path)
        if fault is None:
            return path, notes
        notes.append(f"checkpoint {path} is damaged: {fault}")
    return None, notes


def fault_of(checkpoint: Path) -> str | None:
    """What differs from the manifest of a checkpoint, or None."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
        wanted = [{key: entry[key] for key in ("name", "bytes", "xxh3_128")} for entry in entries]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for want in wanted:
        path = checkpoint / want["name"]
        if not path.is_file():
            return f"{want['name']} is missing"
        got = file_entry(path)
        if got != want:
            field = "bytes" if got["bytes"] != want["bytes"] else "xxh3_128"
            return f"{want['name']} has {field} {got[field]}, expected {want[field]}"
    return None


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
        return json.loads((checkpoint / METRICS).read_text())
    except (OSError, ValueError):  # absent, or damaged: then it is not the best one
        return {}


def _hide(path: Path) -> Path:
    """Rename away what is to be deleted: from now on it does not count, however little of it is deleted yet."""
    hidden = path.with_name(f"{_HIDDEN}{path.name.removeprefix(_HIDDEN)}-{secrets.token_hex(4)}")
    return path.rename(hidden)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
