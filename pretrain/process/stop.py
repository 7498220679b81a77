"""Requests to stop: SIGINT, SIGTERM, SIGUSR1, or a launcher that is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.process.entry import EXIT_INTERRUPTED, EXIT_STOPPED

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Launchers pass a Ctrl-C on that the terminal has sent to all of its processes: copies come within so many seconds.
_COPIES = 2.0
_AGAIN = "Ctrl-C again, more than two seconds later, ends it at once without one"


class StopRequest:
    """Whether this process was asked to stop, and why: `reason`, None until then.

    While the run is built nothing would be lost, so a request ends the process at once. From `heed` on it is a flag:
    the loop agrees on it over all ranks, saves and ends. A second SIGINT ends the process at once. Signals are read by
    a thread, because the main one may be in a collective that never returns.

    Args:
        end: called from a thread with the reason and the exit code where the process is to end at once.
        speaks: whether this process says on stderr what it does.
    """

    def __init__(self, end: Callable[[str, int], None], speaks: bool):
        self.reason: str | None = None
        self._end, self._speaks, self._heeded = end, speaks, False
        self._interrupted: float | None = None  # when the first SIGINT came
        self._closed = threading.Event()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._handlers = {number: signal.signal(number, _only_noticed) for number in _ASKING}
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def heed(self) -> None:
        """Training begins: from now on a request waits for the end of a step. Watches the launcher too."""
        self._heeded = True
        launcher = _launcher_line()
        if launcher is not None:
            threading.Thread(target=self._watch, args=(launcher,), daemon=True, name="launcher-watch").start()

    def close(self) -> None:
        """Give the signals back. Can be called again."""
        if not self._closed.is_set():
            self._closed.set()
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._pipe[1])  # ends the thread

    def _listen(self) -> None:
        while number := os.read(self._pipe[0], 1):
            if number[0] in _ASKING and not self._closed.is_set():
                self._ask(signal.Signals(number[0]))
        os.close(self._pipe[0])

    def _ask(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._heeded:
            self._end(f"{number.name} before training began", EXIT_STOPPED)
        elif number == signal.SIGINT and self._interrupted is not None:
            if now - self._interrupted >= _COPIES:
                self._end("a second SIGINT: ended without a checkpoint", EXIT_INTERRUPTED)
            return
        if number == signal.SIGINT:
            self._interrupted = now
        if self.reason is None:
            self.reason = number.name
            self._say(f"{number.name}: the run saves a checkpoint after this step and stops; {_AGAIN}")

    def _watch(self, launcher: tuple[int, int]) -> None:
        while self.reason is None and not self._closed.wait(1):
            if _launcher_line() != launcher and self.reason is None:
                self.reason = "the launcher is gone"

    def _say(self, text: str) -> None:
        if self._speaks:
            try:
                print(f"\n{text}", file=sys.stderr, flush=True)
            except OSError:  # a terminal that is gone
                return


def _only_noticed(number: int, frame: object) -> None:
    """Installed so that the number reaches the pipe; the thread acts."""


def _launcher_line() -> tuple[int, int] | None:
    """(parent, grandparent) where the parent is a launcher. DeepSpeed's per-node launcher outlives its runner, the
    grandparent, so both are watched; above another launcher there may be a shell that is free to go: 0."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        grandparent = int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return (parent, 0) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    if b"deepspeed.launcher.launch" in command:
        return parent, grandparent
    return (parent, 0) if b"torchrun" in command or b"torch.distributed" in command else None
