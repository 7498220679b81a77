"""Checkpoints that exist whole or not at all, load at any world size and ZeRO stage, and hardly stop the training.

A save begins with a copy of this rank's fragments to host memory, all that training waits for. A thread per rank writes
and hashes the copy; when the ranks have agreed, at a step's end, that all files are on disk, a thread of rank 0 writes
the manifest, renames the folder and moves the pointers (committed.py); at a later step's end all learn of it. No thread
calls a collective: agreement rides on the one that every step has anyway. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from data_tools.errors import UserError
from pretrain.engine import committed
from pretrain.engine.committed import FOLDER, METRICS, MODEL, SETTINGS, STATE, Retention
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.process.collectives import all_reduce_sum, gather, raise_on_all_ranks
from pretrain.process.runtime import Runtime

_PATIENCE = 60  # seconds; a disk that hangs must not keep a failed rank from ending


@dataclass(frozen=True)
class Extras:
    """The small files beside the tensors: the model's description (JSON) and the resolved settings (YAML)."""

    model: dict
    config: str


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: `num_bytes` over all ranks, written in `seconds` from the begin of the save."""

    folder: Path
    step: int
    samples_seen: int
    num_bytes: int
    seconds: float


class Checkpoints:
    """The checkpoints of one run folder, at most one in the making. Methods are collective: all ranks must call them,
    but for `progress` and `close`."""

    def __init__(self, run_dir: str | Path, runtime: Runtime, retention: Retention | None = None):
        self.folder = Path(run_dir) / FOLDER
        self.runtime = runtime
        self.retention = retention or Retention()
        self._copy = HostCopy()
        self._save: _Save | None = None
        self._task: _Task | None = None
        best = self.retention.best(committed.committed(self.folder)) if runtime.is_main else None
        self._best_score = gather(best and best[0])[0]

    def save(
        self, engine: Engine, state: TrainState, extras: Extras, values: Mapping[str, float] | None = None
    ) -> Path:
        """`begin` and `wait`: commit a checkpoint of `state.step`; returns its folder."""
        self.begin(engine, state, extras, values)
        saved = self.wait()
        assert saved is not None
        return saved.folder

    def begin(
        self, engine: Engine, state: TrainState, extras: Extras, values: Mapping[str, float] | None = None
    ) -> None:
        """Copy what a checkpoint of `state.step` holds to host memory and start writing it. `values`: the evaluation of
        that step. UserError on all ranks if the folder cannot be made."""
        assert self._save is None, "one save at a time: wait for the one before"
        started = time.perf_counter()
        final = committed.step_folder(self.folder, state.step)
        temporary = committed.temporary_folder(final)
        prepare = (lambda: committed.prepare(temporary)) if self.runtime.is_main else (lambda: None)
        raise_on_all_ranks(prepare, f"preparing checkpoint {final}")
        small = {STATE: _dump(state.to_dict()), MODEL: _dump(extras.model), SETTINGS: extras.config}
        if values:
            small[METRICS] = _dump(dict(values))
        tensors, index = self._copy.take(engine, self.runtime)
        self._save = _Save(final, temporary, small, state.step, state.samples_seen, started)
        committed.commit_point("copied")
        self._task = _Task(lambda: self._write_rank(temporary, tensors, index))

    def progress(self) -> tuple[bool, bool]:
        """Whether this rank's thread is at work, and whether it has failed: to be summed over ranks for `advance`."""
        task = self._task
        busy = task is not None and task.is_alive()
        return busy, task is not None and not busy and task.fault is not None

    def advance(self, busy: float, failed: float) -> Saved | None:
        """Take the save one stage further unless a rank is busy with it; returns the checkpoint once it is committed.

        Raises:
            UserError: on all ranks, a rank could not write; the committed checkpoints are untouched.
        """
        save = self._save
        if save is None or busy:
            return None
        if failed:
            self._abandon(save)
        if save.entries is None:
            save.entries = gather(self._task and self._task.value)
            committed.commit_point("all-written")
            self._task = _Task(lambda: self._commit(save)) if self.runtime.is_main else None
            return None
        self._save = self._task = None
        num_bytes = sum(entry["bytes"] for entry in save.entries)
        return Saved(save.final, save.step, save.samples_seen, num_bytes, time.perf_counter() - save.started)

    def wait(self) -> Saved | None:
        """End the save in the making, if there is one; returns what it committed."""
        saved = None
        while self._save is not None:
            if self._task is not None:
                self._task.join()
            saved = self.advance(*all_reduce_sum(self.progress()))
        return saved

    def close(self) -> None:
        """Let this rank's thread come to its end, within reason: Python must not be torn down under it. Not collective,
        and no commit: after a fault nobody knows whether the other ranks are there."""
        if self._task is not None:
            self._task.join(_PATIENCE)

    def is_best(self, values: Mapping[str, float]) -> bool:
        """Whether an evaluation beats, by `checkpoint.keep_best`, all others of the run. All ranks must call it."""
        score = self.retention.score(values)
        if score is None and self.retention.keep_best and values:
            name = self.retention.keep_best.removeprefix("-")
            raise UserError(f"checkpoint.keep_best names no metric of this run: {name}", expected=", ".join(values))
        if score is not None:
            score = gather(score)[0]  # unlike devices may differ in its last bits, and the save is collective
        better = score is not None and (self._best_score is None or score > self._best_score)
        if better:
            self._best_score = score
        return better

    def find(self) -> Path | None:
        """The newest intact checkpoint, verified by rank 0, or None. A damaged one is reported and passed over.

        Raises UserError where there are checkpoints but none is intact.
        """
        found: Path | None = None
        notes: list[str] = []
        if self.runtime.is_main:
            found, notes = committed.newest_intact(self.folder)
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

    def _write_rank(self, temporary: Path, tensors: dict[str, torch.Tensor], index: dict) -> dict:
        if self.runtime.is_main:
            committed.clear(self.folder, temporary)
        path = temporary / f"rank-{self.runtime.rank:05d}-of-{self.runtime.world_size:05d}.safetensors"
        committed.commit_point("before-rank-file")
        save_file(tensors, path, metadata={"fragments": json.dumps(index)})
        committed.commit_point("rank-file-unsynced")
        with path.open("rb") as file:
            os.fsync(file.fileno())
        committed.commit_point("rank-file-synced")
        return committed.file_entry(path)

    def _commit(self, save: _Save) -> None:
        committed.commit(save.temporary, save.final, save.entries or [], save.small, self.retention)

    def _abandon(self, save: _Save) -> None:
        """Raise what went wrong, on all ranks; what was written makes room."""
        faults = gather(self._task and self._task.fault)
        self._save = self._task = None
        if self.runtime.is_main:
            committed.clear(self.folder, self.folder)
        rank, fault = next((rank, fault) for rank, fault in enumerate(faults) if fault is not None)
        raise UserError(
            f"saving {save.final} failed on rank {rank}",
            got=fault,
            remedy="make room or restore the disk, then start the run again: the checkpoints before it are untouched",
        )


class HostCopy:
    """A copy of this rank's fragments in host memory. The next one goes into the same buffers, so that page-locked
    memory is asked for once."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, engine: Engine, runtime: Runtime) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
        """Flat tensors by `parameter|kind`, and where in its parameter each fragment lies. It is complete on return."""
        tensors, index = {}, {}
        for fragment in engine.fragments():
            index[fragment.name] = {"start": fragment.start, "numel": fragment.numel, "shape": fragment.shape}
            for kind, value in fragment.values.items():
                key = f"{fragment.name}|{kind}"
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                tensors[key] = self._buffers[key].copy_(value, non_blocking=True)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        return tensors, index


@dataclass
class _Save:
    """The save in the making. `entries`: the ranks' files, once all are on disk."""

    final: Path
    temporary: Path
    small: dict[str, str]
    step: int
    samples_seen: int
    started: float
    entries: list[dict] | None = None


class _Task(threading.Thread):
    """A piece of a save beside the training. Whatever it raises is told to all ranks at the next agreement."""

    def __init__(self, action: Callable[[], object]):
        super().__init__(daemon=True, name="checkpoint")  # a rank that fails does not wait for a save nobody commits
        self._action = action
        self.value: object = None
        self.fault: UserError | str | None = None
        self.start()

    def run(self) -> None:
        """The piece, until it ends or fails."""
        try:
            self.value = self._action()
        except Exception as error:
            self.fault = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _dump(values: dict) -> str:
    return json.dumps(values, indent=1)
