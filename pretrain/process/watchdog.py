"""Ends a process that makes no progress, with the stacks of all its threads on stderr."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pretrain.process import outside_watch
from pretrain.process.outside_watch import STACKS

_SLACK = 10.0  # seconds that an ending process gets to write its status, and that the process outside waits longer


class _Progress:
    beats, phase = 0, "the start"


def heartbeat(phase: str | None = None) -> None:
    """This process made progress, in `phase` (default: the one before). What counts: every forward, training or
    evaluation, and the beginning of each phase: waiting for data, a step, an evaluation, a checkpoint."""
    _Progress.beats += 1
    if phase is not None:
        _Progress.phase = phase


def phase() -> str:
    """What this process is at."""
    return _Progress.phase


class Watchdog:
    """A thread that calls `on_hang` once no progress was made for `limit` seconds (None: never).

    The time in which this process was stopped, or its machine paused, does not count: the thread looks in short ticks,
    of which each counts for two at most. A thread that does not get to run, because the hanging one holds Python's
    lock, is backed by a process (outside_watch.py): it has the stacks printed and ends this one a little later.
    """

    def __init__(self, limit: float | None, on_hang: Callable[[], None]):
        self._closed = threading.Event()
        self._outside: subprocess.Popen | None = None
        if limit is not None:
            heartbeat()
            with suppress(OSError):  # no process more: then without it
                faulthandler.register(STACKS, chain=True)
                command = [sys.executable, "-I", outside_watch.__file__, str(os.getpid())]
                self._outside = subprocess.Popen(command, stdin=subprocess.PIPE)
                os.set_blocking(self._outside.stdin.fileno(), False)  # type: ignore[union-attr]
            threading.Thread(target=self._watch, args=(limit, on_hang), daemon=True, name="hang-watch").start()

    def _watch(self, limit: float, on_hang: Callable[[], None]) -> None:
        tick = min(1.0, limit / 4)
        beats, idle, before = _Progress.beats, 0.0, time.monotonic()
        while not self._closed.wait(tick):
            idle += min(time.monotonic() - before, 2 * tick)
            before = time.monotonic()
            if beats != _Progress.beats:
                beats, idle = _Progress.beats, 0.0
            if idle > limit:
                on_hang()
                return
            self._allow(limit - idle + _SLACK)

    def _allow(self, seconds: float) -> None:
        if self._outside is not None:
            with suppress(OSError, ValueError):  # it is gone, stopped, or closed
                os.write(self._outside.stdin.fileno(), b"%.3f\n" % seconds)  # type: ignore[union-attr]

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._outside is not None:
            self._outside.stdin.close()  # type: ignore[union-attr]
            self._outside.wait()
            self._outside = None
            faulthandler.unregister(STACKS)


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
