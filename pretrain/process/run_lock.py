"""One run per folder: a lock that rank 0 holds as long as it lives.

A POSIX record lock, which the kernel drops with the process however it dies, and which no child inherits. It holds
between hosts where the file system passes such locks on: NFS 4, NFS 3 with its lock daemon, Lustre mounted with
`flock`. A file system that has none is reported, and the run goes on unguarded.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from data_tools.errors import UserError

LOCK = "run.lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_UNKNOWN_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def hold(run_dir: Path) -> None:
    """Lock `run_dir` until this process ends. One process of a run calls it, once.

    Raises:
        UserError: another run holds it; names its host, process and start.
    """
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # never closed: closing would unlock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            raise UserError(
                f"run.dir {run_dir} is in use by another run",
                got=_owner(os.pread(descriptor, 4096, 0)),
                remedy="wait for its end or stop it, or choose another run.dir",
            ) from None
        if error.errno not in _UNKNOWN_HERE:
            raise
        print(f"warning: {run_dir} has no file locks ({error}); see to it that one run at a time uses it", flush=True)
        return
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(text: bytes) -> str:
    try:
        return "host {host}, process {pid}, started {started}".format(**json.loads(text))
    except (ValueError, KeyError, TypeError):
        return "a process that has not written its name yet"
