"""What a run says to the outside from before its job is built: the lock, status.json, and how it takes signals.

Nothing here imports torch: settings and paths are looked at inside of it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from data_tools.errors import UserError
from pretrain.process.entry import EXIT_STOPPED, reason_of
from pretrain.process.status import FAILED, STOPPED, Status
from pretrain.process.stop import StopRequest

_SLACK = 5.0  # seconds that an ending process gets to write its status


class Lifeline:
    """`with Lifeline(run_dir) as life:` around the building and the training of a job. An exception that leaves the
    block becomes the status "failed" with its reason, unless another run holds the folder.

    Raises:
        UserError: another run holds the folder. Of several ranks `claim_run_dir` raises it, on all of them.
    """

    def __init__(self, run_dir: str | Path):
        self._is_main, self._alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
        self.status = Status(run_dir, self._is_main)

    def __enter__(self) -> Lifeline:
        try:
            self.status.own()
        except OSError as error:
            if self._alone:
                got = error.strerror or type(error).__name__
                raise UserError(f"run.dir {self.status.folder} cannot be written", got=got) from None
        except UserError:
            if self._alone:
                raise
        self.stop = StopRequest(self._end, self._is_main)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.status.fail(reason_of(error))
        self.stop.close()

    def _end(self, reason: str, code: int) -> None:
        """End this process from a thread, even where the disk of the status hangs."""
        timer = threading.Timer(_SLACK, os._exit, (code,))
        timer.daemon = True
        timer.start()
        if self._is_main:
            print(f"\n{reason}; last checkpoint: {self.status.checkpoint or 'none'}", file=sys.stderr, flush=True)
        self.status.fail(reason, STOPPED if code == EXIT_STOPPED else FAILED)
        os._exit(code)
