"""Processes as tests see them: which there are, and when they are gone."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path


def worker_pids() -> list[int]:
    """Processes of multiprocessing that this process started through its fork server."""
    return [process.pid for process in multiprocessing.active_children()]


def wait_until_gone(pids: list[int], seconds: float = 10) -> list[int]:
    """Those of the processes that still run after at most so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
