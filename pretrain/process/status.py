"""run.dir/status.json, which says what exit codes cannot: launchers hide those of the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from datetime import datetime
from pathlib import Path

from data_tools.errors import UserError, shown
from pretrain.process import run_lock

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
FILE = "status.json"
_REASON = 500  # characters: with all of them escaped the file still fits its first block, see `_overwrite`


class Status:
    """The status of a run, from before its job is built to its end. Only who owns the folder writes it: rank 0 once it
    holds the lock, every rank once it knows that rank 0 does (`share`).

    `step`, `steps` (None: without end or not known yet), `checkpoint` and `seconds_left` are what the next `write`
    says; a new start knows the step and the checkpoint of the one before.
    """

    def __init__(self, run_dir: str | Path, is_main: bool):
        self.folder, self._is_main, self._mine = Path(run_dir), is_main, False
        self.state = ""
        self.step = 0
        self.steps: int | None = None
        self.checkpoint: Path | str | None = None
        self.seconds_left: float | None = None

    def own(self) -> None:
        """Make the folder, lock it for this process and say that the run is under way; rank 0 calls it, others need
        not.

        Raises:
            UserError: another run holds the folder; its status stays.
            OSError: the folder cannot be made or written.
        """
        if not self._is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        run_lock.hold(self.folder)
        if not self._mine:
            self._recall()
        self._mine = True
        self.write(RUNNING)

    def share(self) -> None:
        """Rank 0 holds the lock and has written: now this rank may write too, where it is the one that fails, and knows
        what rank 0 knew of the start before."""
        if not self._mine:
            self._recall()
        self._mine = True

    def write(self, state: str, reason: str = "", durable: bool = True) -> None:
        """Replace the file, or do nothing where the folder is not this run's. On a full disk the old file is written
        over. `durable`: so that it survives a power cut. Raises OSError."""
        if not self._mine:
            return
        self.state = state
        status = {
            "state": state,
            "step": self.step,
            "steps": self.steps,
            "checkpoint": self.checkpoint and str(self.checkpoint),
            "reason": shown(reason, _REASON),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds_left": round(self.seconds_left) if self.seconds_left is not None and state == RUNNING else None,
        }
        data = json.dumps(status, indent=1).encode()
        path = self.folder / FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(path, data, durable)
        except OSError:
            _overwrite(path, data)

    def fail(self, reason: str, state: str = FAILED) -> None:
        """The last word of a run that did not end by itself, if the disk takes it; a final state is not changed."""
        if self.state in (RUNNING, ""):
            with contextlib.suppress(OSError):
                self.write(state, reason)

    def _recall(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            before = json.loads((self.folder / FILE).read_text())
            self.step, self.checkpoint = int(before["step"]), before["checkpoint"]


def fail_unbuilt(run_dir: str, reason: str) -> None:
    """Say in the folder of an earlier run that its new start failed before there were settings to go by."""
    status = Status(run_dir, True)
    if (status.folder / FILE).is_file():
        with contextlib.suppress(OSError, UserError):
            status.own()
            status.fail(reason)


def _replace(path: Path, data: bytes, durable: bool) -> None:
    if durable:
        from data_tools.format.commit import atomic_write  # late: the package imports numpy, and `--help` does not

        with atomic_write(path) as file:
            file.write(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _overwrite(path: Path, data: bytes) -> None:
    """Write into the blocks that the file has already, in one call and without cutting it: what was longer is covered
    with spaces, so that whoever reads meanwhile finds JSON."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data.ljust(os.fstat(descriptor).st_size), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
