"""Files of a run that cannot be written: one rank notices, all ranks end, once and with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from data_tools.errors import UserError
from pretrain.process.collectives import gather


class Writes:
    """What this rank could not write. Nothing is raised where it happens, because the other ranks would wait for this
    one in their next collective: the loop sums `failed` over the ranks at every step, and then all call
    `raise_faults`."""

    def __init__(self) -> None:
        self._fault: str | None = None

    @property
    def failed(self) -> bool:
        """Whether a file could not be written."""
        return self._fault is not None

    @contextmanager
    def to(self, what: object) -> Iterator[None]:
        """Keep the OSError of writing `what`, the first one."""
        try:
            yield
        except OSError as error:
            if self._fault is None:
                self._fault = f"{what}: {error.strerror or error or type(error).__name__}"

    def raise_faults(self, checkpoint: object) -> None:
        """Raises UserError on all ranks where any could not write; `checkpoint`: the last one. All ranks must call
        it."""
        faults = {rank: fault for rank, fault in enumerate(gather(self._fault)) if fault is not None}
        if faults:
            rank, fault = next(iter(faults.items()))
            raise UserError(
                f"the run folder cannot be written on rank {rank}",
                got=fault,
                remedy="make room or restore the disk, then start the run again: it goes on from "
                f"{checkpoint or 'its start, nothing was saved yet'}",
            )
