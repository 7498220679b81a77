"""The data state of a run: about 1 kB of JSON, derived from optimizer steps and never from prefetched batches."""

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from data_tools.errors import UserError

_VERSION = 2
_REMEDIES = {
    "manifest_digest": "point data.train at the shards that the run began with, or start a new run",
    "seed": "set the seed that the run began with, or start a new run",
    "window": "set the window that the run began with, or start a new run",
}


class ResumePoint(NamedTuple):
    """A point of a run from which its order goes on: optimizer steps and global samples up to here, and of every source
    the epoch it is in and the samples consumed of that epoch."""

    step: int
    samples_seen: int
    sources: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands in its training data.

    Shards, seed, C and window define the order and may not change on a resume; workers, world size, the weights of a
    mixture and the global batch (a multiple of C) may.
    """

    manifest_digest: str
    seed: int
    streams: int  # C, canonical streams
    window: int  # samples per shuffle window of a stream
    step: int
    samples_seen: int  # global samples consumed since the start of the run
    sources: tuple[tuple[int, int], ...]  # of each: its epoch, global samples consumed of that epoch

    @property
    def anchor(self) -> ResumePoint:
        """The point from which the order goes on."""
        return ResumePoint(self.step, self.samples_seen, self.sources)

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
        sources = state["sources"]
        in_pairs = isinstance(sources, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in sources
        )
        counts = [state[name] for name in ("streams", "window", "step", "samples_seen")]
        counts += [number for pair in sources for number in pair] if in_pairs else []
        if not in_pairs or not all(isinstance(number, int) and number >= 0 for number in counts):
            raise UserError("the saved data position cannot be read", got=state, expected="counts, and pairs of them")
        pairs = tuple((epoch, samples) for epoch, samples in sources)
        return cls(**{name: state[name] for name in names - {"sources"}}, sources=pairs)

    def check_resumable(self, current: "Position") -> None:
        """Raises UserError naming the field by which `current` would go on from here in another order."""
        for name, remedy in _REMEDIES.items():
            saved, now = getattr(self, name), getattr(current, name)
            if saved != now:
                raise UserError(
                    f"the checkpoint's data order has another {name}", got=now, expected=saved, remedy=remedy
                )
