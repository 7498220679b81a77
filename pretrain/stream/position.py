"""The data state of a run: under 1 kB of JSON, derived from optimizer steps and never from prefetched batches."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from data_tools.errors import UserError

_VERSION = 1
_REMEDIES = {
    "manifest_digest": "point data.train at the shards that the run began with, or start a new run",
    "seed": "set the seed that the run began with, or start a new run",
    "streams": "set a global batch that gives the same number of canonical streams, gcd(global batch, 64)",
    "window": "set the window that the run began with, or start a new run",
}


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands in its training data.

    The first four fields define the order and may not change on a resume; workers and world size may.
    """

    manifest_digest: str
    seed: int
    streams: int  # C, canonical streams
    window: int  # samples per shuffle window of a stream
    epoch: int
    samples_in_epoch: int  # global samples consumed of this epoch
    samples_seen: int  # global samples consumed since the start of the run

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the version of this layout."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Position":
        """Raises UserError for another version, or missing or unknown fields."""
        names = {field.name for field in fields(cls)}
        if state.get("version") != _VERSION or set(state) != names | {"version"}:
            raise UserError(
                "the saved data position cannot be read",
                got=f"version {state.get('version')} with {', '.join(sorted(state))}",
                expected=f"version {_VERSION} with {', '.join(sorted(names))}",
                remedy="resume with the version of dualstream that wrote the checkpoint",
            )
        return cls(**{name: state[name] for name in names})

    def check_resumable(self, current: "Position") -> None:
        """Raises UserError naming the field by which `current` would go on from here in another order."""
        for name, remedy in _REMEDIES.items():
            saved, now = getattr(self, name), getattr(current, name)
            if saved != now:
                raise UserError(
                    f"the checkpoint's data order has another {name}", got=now, expected=saved, remedy=remedy
                )
