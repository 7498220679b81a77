"""Bad samples: what they are, how they are counted, and when there are too many of them."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError

WORST_SHARDS = 5


@dataclass(frozen=True)
class BadSample:
    """One replaced sample. `index` is its place in the shard, `key` is empty where it could not be read."""

    shard: str
    index: int
    key: str
    kind: str
    error: str

    @classmethod
    def of(cls, error: BadSampleError, shard: str, index: int) -> "BadSample":
        """What is written down of a sample that could not be used."""
        return cls(shard, index, error.key, error.kind, error.reason)


class Quarantine:
    """Appends bad samples to a JSON-lines file, one flushed line each. Opens the file at the first one. `fault`: why it
    could not be written, None while it can: the loop tells the other ranks."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.fault: OSError | None = None

    def write(self, step: int, epoch: int, samples: Iterable[BadSample]) -> None:
        """Append the bad samples of the batch of `step`, from 0; lines count steps from 1, as metrics.jsonl does.

        Nothing is opened where there are none.
        """
        lines = [json.dumps({"step": step + 1, "epoch": epoch, **asdict(sample)}) + "\n" for sample in samples]
        if not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            self.fault = error


@dataclass(frozen=True)
class BadSampleCounts:
    """What a rank was given in a stretch of steps: samples, and the bad ones replaced among them by kind and shard."""

    given: int
    by_kind: Counter[str]
    by_shard: Counter[str]


class BadSampleAccount:
    """Counts of one rank: `read_total` samples delivered, `bad_total` bad ones replaced, `by_shard` since the start."""

    def __init__(self) -> None:
        self.read_total = 0
        self.bad_total = 0
        self.by_shard: Counter[str] = Counter()
        self._open: dict[int, tuple[int, list[BadSample]]] = {}

    def add(self, step: int, read: int, bad: Sequence[BadSample]) -> None:
        """Count the batch of `step`, `read` samples, of which those in `bad` were replaced."""
        self.read_total += read
        self.bad_total += len(bad)
        self.by_shard.update(sample.shard for sample in bad)
        self._open[step] = (read, list(bad))

    def pop_counts(self, step: int) -> BadSampleCounts:
        """The counts of the steps before `step` that were not asked for yet."""
        closed = [self._open.pop(number) for number in sorted(self._open) if number < step]
        bad = [sample for _, samples in closed for sample in samples]
        return BadSampleCounts(
            sum(read for read, _ in closed),
            Counter(sample.kind for sample in bad),
            Counter(sample.shard for sample in bad),
        )


def too_many_bad(bad: int, read: int, max_ratio: float, min_reads: int = 0) -> bool:
    """Whether more than `max_ratio` of the samples are bad.

    Args:
        bad, read: counts summed over all ranks, so that all ranks judge alike.
        min_reads: the ratio is judged as if at least so many samples had been read, so that one early bad sample does
            not end a run.
    """
    return bad > max_ratio * max(read, min_reads)


def bad_ratio_error(bad: int, read: int, max_ratio: float, by_shard: Mapping[str, int]) -> UserError:
    """The error that ends a run with too many bad samples, with the shards that hold most of them."""
    shards = ", ".join(f"{name} ({count})" for name, count in Counter(by_shard).most_common(WORST_SHARDS))
    return UserError(
        "too many bad samples" + (f", most in {shards}" if shards else ""),
        got=f"{bad} of {read} samples",
        expected=f"at most {max_ratio:.4g} of them",
        remedy="see quarantine-<rank>.jsonl in the run folder; repair the shards or raise data.max_bad_ratio",
    )
