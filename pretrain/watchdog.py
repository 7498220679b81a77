"""Ends a process that makes no progress, with the stacks of all its threads on stderr."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

_SLACK = 10.0  # seconds that an ending process gets to write its status, and that Python's own timer gets


class _Progress:
    at, phase = time.monotonic(), "the start"


def beat(phase: str | None = None) -> None:
    """This process made progress, in `phase` (default: the one before). What counts: every forward, training or
    evaluation, and the beginning of each phase: waiting for data, a step, an evaluation, a checkpoint."""
    _Progress.at = time.monotonic()
    if phase is not None:
        _Progress.phase = phase


def phase() -> str:
    """What this process is at."""
    return _Progress.phase


class Watchdog:
    """A thread that calls `on_hang` once no progress was made for `limit` seconds (None: never).

    A thread that does not get to run, because the hanging one holds Python's lock, is backed by faulthandler's timer,
    which needs no lock: it prints the stacks and ends the process with exit code 1 a little later.
    """

    def __init__(self, limit: float | None, on_hang: Callable[[], None]):
        self._closed = threading.Event()
        if limit is not None:
            beat()
            threading.Thread(target=self._watch, args=(limit, on_hang), daemon=True, name="hang-watch").start()

    def _watch(self, limit: float, on_hang: Callable[[], None]) -> None:
        while not self._closed.wait(min(1.0, limit / 4)):
            idle = time.monotonic() - _Progress.at
            if idle > limit:
                on_hang()
                return
            faulthandler.dump_traceback_later(limit - idle + _SLACK, exit=True)
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()


def print_stacks(headline: str) -> None:
    """`headline` and the stacks of all threads, on stderr."""
    print(headline, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)


def end_process(reason: str, write_status: Callable[[str], None]) -> None:
    """Say why and end with exit code 1, from any thread, even where the disk of the status hangs."""
    faulthandler.dump_traceback_later(_SLACK, exit=True)
    print(f"error: {reason}", file=sys.stderr, flush=True)
    write_status(reason)
    os._exit(1)
