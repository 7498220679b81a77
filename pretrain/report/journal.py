"""Single steps of a run that are worth a look: JSON lines in run.dir that name the samples of all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pretrain.process.collectives import gather
from pretrain.process.runtime import Runtime
from pretrain.report.metrics import append_line, forget_after
from pretrain.report.writes import Writes


class Journal:
    """A file of one JSON a line about single steps, with the keys of every rank's batch. All ranks hold one, rank 0
    writes. A resume drops the lines behind the checkpoint's step. What cannot be written is told to `writes`."""

    def __init__(self, path: Path, runtime: Runtime, first_step: int, writes: Writes):
        self._path, self._runtime, self._writes = path, runtime, writes
        if runtime.is_main:
            forget_after(path, first_step)

    def write(self, row: dict, loss: float, keys: Sequence[str]) -> None:
        """Add `row`, the rank-local losses and the keys by rank. All ranks must call it, with the same `row`."""
        losses, batches = zip(*gather((_json_number(loss), list(keys))), strict=True)
        if self._runtime.is_main:
            line = json.dumps({**row, "loss_by_rank": losses, "keys_by_rank": batches}, allow_nan=False) + "\n"
            with self._writes.to(self._path), self._path.open("ab", buffering=0) as file:
                append_line(file, self._path, line)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
