"""What a run writes down about faults: JSON lines in run.dir that name the samples of all ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pretrain.metrics import forget_after
from pretrain.runtime import Runtime, gather


class Journal:
    """A file of one JSON a line about single steps, with the keys of every rank's batch. All ranks hold one, rank 0
    writes. A resume drops the lines behind the checkpoint's step."""

    def __init__(self, path: Path, runtime: Runtime, first_step: int):
        self._path, self._runtime = path, runtime
        if runtime.is_main:
            forget_after(path, first_step)

    def write(self, row: dict, loss: float, keys: Sequence[str]) -> None:
        """Add `row`, the rank-local losses and the keys by rank. All ranks must call it, with the same `row`."""
        losses, batches = zip(*gather((_json_number(loss), list(keys))), strict=True)
        if self._runtime.is_main:
            with self._path.open("a") as file:
                file.write(json.dumps({**row, "loss_by_rank": losses, "keys_by_rank": batches}, allow_nan=False) + "\n")


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
