"""TrainState: everything a run needs besides tensors to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from data_tools.errors import UserError
from pretrain.towers.files import is_number

VERSION = 1


@dataclass
class TrainState:
    """Where a run stands after `step` steps, of which `skipped` made no update (guard.max_skipped).

    Random numbers need no state: every step seeds its own from (seed, step, rank). `position` is the data stream's
    (pretrain/stream/position.py), derived from samples seen, never from prefetched batches.
    """

    step: int = 0
    samples_seen: int = 0
    position: dict = field(default_factory=dict)
    bad_samples: int = 0
    skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)  # what guard.spike compares with

    @property
    def updates(self) -> int:
        """Optimizer updates made."""
        return self.step - self.skipped

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> TrainState:
        """The inverse of `to_dict`."""
        values = dict(values)
        version = values.pop("version", None)
        if version != VERSION:
            raise UserError("the checkpoint's train state has another version", got=version, expected=VERSION)
        wrong = [name for name, right in _TYPES.items() if not right(values.get(name, _DEFAULTS[name]))]
        if wrong or not set(values) <= set(_TYPES):
            odd = wrong[0] if wrong else min(set(values) - set(_TYPES))
            raise UserError("the checkpoint's train state cannot be read", got=f"{odd} = {values[odd]!r}")
        return cls(**values)


def _count(value: object) -> bool:
    return is_number(value) and value >= 0


_TYPES = {
    "step": _count,
    "samples_seen": _count,
    "position": lambda value: isinstance(value, dict),
    "bad_samples": _count,
    "skipped": _count,
    "recent_losses": lambda value: isinstance(value, list) and all(isinstance(loss, int | float) for loss in value),
}
_DEFAULTS = asdict(TrainState())
