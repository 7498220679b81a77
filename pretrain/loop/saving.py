"""The checkpoints of a run: when one is due, which is the best, and how long a save stops the training."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pretrain.engine.checkpoint import Checkpoints, Extras, Saved
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.loop.book import Book
from pretrain.loop.timetable import Timetable


class Saving:
    """Saves run beside the training, one at a time; each is written down in `book` once it is committed. All ranks must
    call every method but `progress` and `close`.

    Args:
        resumed: whether the state that the run starts with is committed already.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        times: Timetable,
        book: Book,
        engine: Engine,
        state: TrainState,
        extras: Extras,
        resumed: bool,
    ):
        self._checkpoints, self._times, self._book = checkpoints, times, book
        self._engine, self._state, self._extras = engine, state, extras
        self._saved_step = state.step if resumed else None  # of the last save, committed or in the making
        self._stall = 0.0  # seconds that it stopped the training

    def progress(self) -> tuple[bool, bool]:
        """Whether this rank is busy writing, and whether it failed: to be summed over the ranks for `advance`."""
        return self._checkpoints.progress()

    def advance(self, busy: float, failed: float) -> None:
        """Take the save in the making one stage further. Raises UserError on all ranks where one could not write."""
        self._committed(self._checkpoints.advance(busy, failed))

    def due(self, values: Mapping[str, float]) -> bool:
        """Whether to save at this step: by its number, or because its evaluation `values` is the best of the run. To be
        asked at every step, since it keeps the record."""
        best, step = self._checkpoints.is_best(values), self._state.step
        return best or self._times.due("checkpoint", step) or self._times.due("keep", step)

    def begin(self, values: Mapping[str, float]) -> None:
        """Begin a checkpoint of this step with its evaluation `values`, once the one before is committed."""
        started = time.perf_counter()
        with self._book.paused("saving a checkpoint"):
            self.wait()
            self._checkpoints.begin(self._engine, self._state, self._extras, values)
        self._saved_step, self._stall = self._state.step, time.perf_counter() - started

    def finish(self, values: Mapping[str, float]) -> None:
        """Leave a committed checkpoint of this step, the last one."""
        if self._saved_step != self._state.step:
            self.begin(values)
        self.wait()

    def wait(self) -> None:
        """Until the save in the making is committed, if there is one."""
        self._committed(self._checkpoints.wait())

    def close(self) -> None:
        """Let this rank's writer come to its end; see `Checkpoints.close`."""
        self._checkpoints.close()

    def _committed(self, saved: Saved | None) -> None:
        if saved is not None:
            self._book.committed(saved, self._stall)
