"""What a run reports: metrics.jsonl and TensorBoard, and its progress on a terminal or in a log."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from data_tools.errors import printable, shown
from data_tools.format.commit import atomic_write
from data_tools.progress import duration
from pretrain.report.writes import Writes


class Metrics:
    """Writers of one run, on rank 0; elsewhere every method does nothing.

    `metrics.jsonl` has one JSON a line: {"kind": "train" | "eval" | "data" | "checkpoint", "step", "samples",
    "seconds", ...}. A resume drops the lines behind the checkpoint's step, so the file reads as if the run had never
    stopped. `total_steps` is None where the run has no end. What cannot be written is told to `writes`.

    Raises:
        OSError: the files cannot be opened.
    """

    def __init__(
        self, run_dir: str | Path, enabled: bool, total_steps: int | None, first_step: int, writes: Writes | None = None
    ):
        self.enabled = enabled
        if not enabled:
            return
        from pretrain.report.board import Board

        self._writes = writes or Writes()
        self._path = Path(run_dir) / "metrics.jsonl"
        forget_after(self._path, first_step)
        self._file = self._path.open("ab", buffering=0)
        self._board = Board(Path(run_dir) / "tensorboard", first_step + 1)
        self._started = time.monotonic()
        self._first, self._total = first_step, total_steps
        self._progress = _Progress(total_steps, first_step)

    def write(self, kind: str, step: int, samples: int, values: Mapping[str, float], shows: bool = True) -> None:
        """Record `values` (finite numbers) at `step` updates and `samples` samples seen, and show them."""
        if not self.enabled:
            return
        seconds = round(time.monotonic() - self._started, 3)
        row = {"kind": kind, "step": step, "samples": samples, "seconds": seconds, **values}
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._writes.to(self._path):
            append_line(self._file, self._path, line)
        with self._writes.to(self._board.path):
            self._board.scalars({f"{kind}/{name}": value for name, value in values.items()}, step)
        if shows:
            self._progress.show(kind, step, values, self.seconds_left(step))

    def pictures(self, step: int, images: torch.Tensor, captions: list[str]) -> None:
        """Show uint8 `images` `[n, 3, h, w]` with their captions in TensorBoard."""
        if self.enabled:
            with self._writes.to(self._board.path):
                self._board.pictures("pairs", images, [shown(caption) for caption in captions], step)

    def seconds_left(self, step: int) -> float | None:
        """Until the end at the pace since this start, evaluations and saves included; None where it is not known."""
        if not self.enabled or self._total is None or step <= self._first:
            return None
        return max(0, self._total - step) * (time.monotonic() - self._started) / (step - self._first)

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        if self.enabled:
            self._progress.print(text)

    def close(self) -> None:
        """Close the writers; what they could not write was told before."""
        if self.enabled:
            self._progress.close()
            for file in (self._file, self._board):
                with contextlib.suppress(OSError):
                    file.close()


class DataWatch:
    """Notices a run that starves: one whose share of time spent waiting for data stays above a bound.

    Args:
        bound: the share.
        intervals: logging intervals in a row that make a case, so that the start of the loader or one slow read does
            not; as many below the bound end it.
    """

    def __init__(self, bound: float = 0.2, intervals: int = 3):
        self.bound, self.intervals = bound, intervals
        self._starving, self._row = False, 0

    def starves(self, share: float) -> bool:
        """Whether to speak up: true at the interval that makes a case, not again before that case has ended."""
        self._row = self._row + 1 if (share > self.bound) != self._starving else 0
        if self._row < self.intervals:
            return False
        self._starving, self._row = not self._starving, 0
        return self._starving


def starvation_advice(share: float, workers: int, cores: int, scaled_decode: bool) -> str:
    """One line on a run that waits for data; `workers` of this rank, `cores` of this process."""
    more = f"raise data.workers ({workers} per rank now, {cores} cores here)"
    scaled = "" if scaled_decode else "set data.scaled_decode=true, "
    rest = f"{scaled}pack smaller images (`data_tools pack --resize`), or read from a faster disk or a local copy"
    return f"waiting for data takes {share:.0%} of the time: {more}, {rest}"


def append_line(file, path: Path, line: str) -> None:
    """Append to an unbuffered `file`, opened at `path`. Raises OSError where not all of it fits, and where the file is
    no longer at its path: what is written then would vanish with it."""
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        raise FileNotFoundError(errno.ENOENT, "another file has taken its place", str(path))
    data = line.encode()
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that are of later steps, and what a crash or a full disk left of lines."""
    if path.is_file():
        lines = path.read_bytes().split(b"\n")
        kept = [line for line in lines if _step_of(line) <= step]
        with atomic_write(path) as file:
            file.write(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float:
    """The step of a line; of what is no whole line, infinity."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


class _Progress:
    """A live bar on a terminal, plain lines elsewhere; a terminal or a log that is gone stops nothing."""

    def __init__(self, total: int | None, first: int):
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total, completed=first)
            self._bar.start()
        self._total = total

    def show(self, kind: str, step: int, values: Mapping[str, float], left: float | None) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None and kind == "train":
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=step, description=f"{time.strftime('%H:%M:%S')}  {text}")
            return
        end = "" if self._total is None else f"/{self._total}"
        remaining = "" if left is None or kind != "train" else f"  left {duration(left)}"
        self.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {kind} step {step}{end}  {text}{remaining}")

    def print(self, text: str) -> None:
        text = "\n".join(map(printable, text.split("\n")))
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
