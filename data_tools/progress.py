"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress

_LOG_EVERY = 10.0


class Progress:
    """`with Progress("packing", total, "rows") as progress: progress.update(done)`; writes to stderr."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self._bar: progress.Progress | None = None
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress  # late: `--help` must answer at once
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn(self.unit),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Show that `done` of the total is done."""
        if self._bar:
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if now - self._logged >= _LOG_EVERY:
            self._logged = now
            rate = done / (now - self._started)
            share = 100 * done / max(1, self.total)
            left = f", left {duration((self.total - done) / rate)}" if rate and done <= self.total else ""
            clock, speed = time.strftime("%Y-%m-%d %H:%M:%S"), f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
            text = f"{clock} {self.what}: {done}/{self.total} {self.unit} ({share:.0f} %), {speed}/s{left}"
            print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`1:02:03`, with days before it where there are any."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} d {clock}" if days else clock
