"""What a run reports: metrics.jsonl and TensorBoard scalars, a progress line, and status.json for schedulers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from data_tools.redaction import redact_text
from data_tools.shards.commit import atomic_write

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"


class Metrics:
    """Writers of one run, on rank 0; elsewhere every method does nothing.

    `metrics.jsonl` has one JSON a line: {"kind": "train" | "eval" | "data" | "checkpoint", "step", "samples",
    "seconds", ...}. A resume drops the lines behind the checkpoint's step, so the file reads as if the run had never
    stopped. `total_steps` is None where the run has no end.
    """

    def __init__(self, run_dir: str | Path, enabled: bool, total_steps: int | None, first_step: int):
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(run_dir)
        self._path = self.folder / "metrics.jsonl"
        forget_after(self._path, first_step)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1)
        self._started = time.monotonic()
        self._progress = _Progress(total_steps, first_step)

    def write(self, kind: str, step: int, samples: int, values: Mapping[str, float]) -> None:
        """Record `values` (finite numbers) at `step` updates and `samples` samples seen."""
        if not self.enabled:
            return
        seconds = round(time.monotonic() - self._started, 3)
        row = {"kind": kind, "step": step, "samples": samples, "seconds": seconds, **values}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        self._progress.show(kind, step, values)

    def pictures(self, step: int, images: torch.Tensor, captions: list[str]) -> None:
        """Show uint8 `images` `[n, 3, h, w]` with their captions in TensorBoard."""
        if self.enabled:
            for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
                self._board.add_image(f"pairs/{index}", image, step)
                self._board.add_text(f"pairs/{index}", caption, step)

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        if self.enabled:
            self._progress.print(text)

    def close(self) -> None:
        """Flush and close the writers."""
        if self.enabled:
            self._progress.close()
            self._file.close()
            self._board.close()


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


def write_status(run_dir: str | Path, state: str, step: int, checkpoint: Path | None, reason: str = "") -> None:
    """Write run.dir/status.json, which says what exit codes cannot: launchers hide those of the ranks."""
    status = {"state": state, "step": step, "checkpoint": checkpoint and str(checkpoint), "reason": redact_text(reason)}
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(run_dir) / "status.json") as file:
        file.write(json.dumps(status, indent=1).encode())


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that are of later steps, and what a crash left of a line."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in rows if json.loads(line)["step"] <= step]
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())


class _Progress:
    """A live bar on a terminal, plain lines elsewhere."""

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

    def show(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None and kind == "train":
            self._bar.update(self._task, completed=step, description=text)
        else:
            end = "" if self._total is None else f"/{self._total}"
            self.print(f"{kind} step {step}{end}  {text}")

    def print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
