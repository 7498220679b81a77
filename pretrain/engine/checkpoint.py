"""Checkpoints that exist whole or not at all, and load at any world size and ZeRO stage.

`checkpoints/step-000001200/`
    rank-00000-of-00002.safetensors   fragments of weights and optimizer states (fragments.py)
    state.json                        TrainState
    model.json                        what rebuilds the model (architecture, preprocessing, head)
    config.yaml                       resolved settings
    manifest.json                     name, bytes and xxh3-128 of every file above

All ranks write into a hidden folder; when every file is on disk, rank 0 writes the manifest, renames the folder and
moves the `latest` pointer. A crash at any point leaves the last committed checkpoint in force. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash
from safetensors.torch import save_file

from data_tools.errors import UserError
from data_tools.shards.commit import atomic_write, sync_folder
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import local_fragments
from pretrain.engine.state import TrainState
from pretrain.runtime import Runtime, gather, together

FOLDER, POINTER, MANIFEST = "checkpoints", "latest", "manifest.json"


@dataclass(frozen=True)
class Extras:
    """The small files beside the tensors: the model's description (JSON) and the resolved settings (YAML)."""

    model: dict
    config: str


def commit_point(name: str) -> None:
    """Passed at every point where a crash leaves another state behind; the crash tests put their kill here."""


class Checkpoints:
    """The checkpoints of one run folder. Methods are collective: all ranks must call them."""

    def __init__(self, run_dir: str | Path, runtime: Runtime, keep: int = 2):
        self.folder = Path(run_dir) / FOLDER
        self.runtime = runtime
        self.keep = keep

    def save(self, engine: Engine, state: TrainState, extras: Extras) -> Path:
        """Commit a checkpoint of `state.step`; returns its folder. UserError on all ranks if any cannot write."""
        final = self.folder / f"step-{state.step:09d}"
        temporary = self.folder / f".writing-{final.name}"
        self._on_main(lambda: _fresh(temporary), "preparing a checkpoint")
        name = f"rank-{self.runtime.rank:05d}-of-{self.runtime.world_size:05d}.safetensors"
        entry = together(lambda: self._write_rank(temporary / name, engine), "saving a checkpoint")
        entries = gather(entry)
        small = {"state.json": state.to_dict(), "model.json": extras.model, "config.yaml": extras.config}
        self._on_main(lambda: self._commit(temporary, final, entries, small), "committing a checkpoint")
        return final

    def find(self) -> Path | None:
        """The newest intact checkpoint, verified by rank 0, or None. A damaged one is reported and passed over.

        Raises UserError where there are checkpoints but none is intact.
        """
        found, notes = None, []
        if self.runtime.is_main:
            found, notes = newest_intact(self.folder)
            for note in notes:
                print(f"warning: {note}; falling back to the one before", flush=True)
        found, notes = gather((found, notes))[0]
        if found is None and notes:
            raise UserError(
                f"no checkpoint in {self.folder} is intact",
                got="; ".join(notes),
                remedy="restore a copy, or start anew",
            )
        return found

    def _on_main(self, action: Callable[[], None], what: str) -> None:
        together(action if self.runtime.is_main else lambda: None, what)

    def _write_rank(self, path: Path, engine: Engine) -> dict:
        tensors, index = {}, {}
        for fragment in local_fragments(engine, self.runtime.rank, self.runtime.world_size):
            index[fragment.name] = {"start": fragment.start, "numel": fragment.numel, "shape": fragment.shape}
            for key, value in fragment.values.items():
                tensors[f"{fragment.name}|{key}"] = value.cpu().contiguous()
        commit_point("before-rank-file")
        save_file(tensors, path, metadata={"fragments": json.dumps(index)})
        commit_point("rank-file-unsynced")
        _sync(path)
        commit_point("rank-file-synced")
        return file_entry(path)

    def _commit(self, temporary: Path, final: Path, entries: list[dict], small: dict) -> None:
        for name, content in small.items():
            _write(temporary / name, content if isinstance(content, str) else json.dumps(content, indent=1))
            entries.append(file_entry(temporary / name))
        commit_point("before-manifest")
        _write(temporary / MANIFEST, json.dumps({"files": entries}, indent=1))
        commit_point("before-rename")
        if final.exists():  # a damaged or abandoned one of the same step
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(self.folder)
        commit_point("before-pointer")
        _write(self.folder / POINTER, final.name + "\n")
        commit_point("before-pruning")
        for old in committed(self.folder)[: -self.keep]:
            _remove(old)


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders with a manifest, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files match its manifest, and what is wrong with the newer ones."""
    notes = []
    for path in reversed(committed(folder)):
        fault = fault_of(path)
        if fault is None:
            return path, notes
        notes.append(f"checkpoint {path} is damaged: {fault}")
    return None, notes


def fault_of(checkpoint: Path) -> str | None:
    """What differs from the manifest of a checkpoint, or None."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for want in entries:
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


def _fresh(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(".writing-*"):
        shutil.rmtree(leftover)
    temporary.mkdir()


def _remove(checkpoint: Path) -> None:
    """Delete a committed checkpoint: first it stops counting as one."""
    doomed = checkpoint.with_name(f".writing-{checkpoint.name}-removed")
    checkpoint.rename(doomed)
    commit_point("while-pruning")
    shutil.rmtree(doomed)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
