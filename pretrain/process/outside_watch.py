"""Ends a rank from outside: run by path as a process beside it, which no lock of the rank can hold up.

The rank writes, again and again, how many seconds it may stay silent. Time counts in short ticks, so that a pause of
the whole machine or job counts as one; time in which the rank is stopped does not count. It ends with the rank.
"""

import os
import select
import signal
import sys
import time

STACKS = signal.SIGUSR2  # the rank dumps its stacks on it, then ends
_TICK = 1.0
_PATIENCE = 10.0  # seconds that the dump may take
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _watch(rank: int) -> None:
    left, before = float("inf"), time.monotonic()
    while left > 0:
        heard = _read(_TICK)
        passed = min(time.monotonic() - before, 2 * _TICK)
        before = time.monotonic()
        if heard == b"":
            return
        if heard:
            left = float(heard.split()[-1])
        elif not _is_stopped(rank):
            left -= passed
    print(f"Timeout: process {rank} holds Python's lock and makes no progress", file=sys.stderr, flush=True)
    os.kill(rank, STACKS)
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if _read(_TICK) == b"":
            return
    os.kill(rank, signal.SIGKILL)


def _read(seconds: float) -> bytes | None:
    """What the rank wrote; None where it was silent, nothing where it is gone."""
    ready, _, _ = select.select([0], [], [], seconds)
    return os.read(0, 1 << 16) if ready else None


def _is_stopped(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    _watch(int(sys.argv[1]))
