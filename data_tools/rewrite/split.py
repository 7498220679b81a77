"""Which part of a split each sample belongs to: by shares, drawn by what the picture is, or by what its json says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xxhash

from data_tools.corpus import Corpus, Sample, ShardReader, open_corpus
from data_tools.errors import UsageError, UserError, shown
from data_tools.format.tar import TarDamageError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import Fields
from data_tools.parallel import run_tasks
from data_tools.progress import Progress
from data_tools.rewrite.ids import value_at

MAX_PARTS = 100
_ADVANCE_EVERY = 256
_NONE = ""  # the part of a sample that was lost, or whose json says nothing


@dataclass(frozen=True)
class Shares:
    """Parts by the share of samples that each takes; samples of one picture, to the byte, are in one part.

    A sample falls where a hash of its picture and the seed does, so the parts of a corpus that has grown are those of
    before and more. Without a picture its key stands for it.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    seed: int
    fields: Fields

    def part(self, sample: Sample) -> str:
        """The name of a sample's part."""
        try:
            content = self.fields.image_bytes(sample)
        except BadSampleError:
            content = sample.key.encode("utf-8", "surrogateescape")
        place = xxhash.xxh3_64_intdigest(content, self.seed) / 2**64
        edges = np.cumsum(self.shares)
        return self.names[min(int(np.searchsorted(edges, place, "right")), len(self.names) - 1)]


@dataclass(frozen=True)
class Told:
    """Parts by a field of the json."""

    field: str

    def part(self, sample: Sample) -> str:
        """What stands there, "" where nothing does."""
        return value_at(sample, self.field)


def parse_shares(text: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """`train=0.98,val=0.02` -> names and shares. Raises UsageError for shares that do not add up to 1."""
    expected = "NAME=SHARE,NAME=SHARE, which add up to 1"
    pairs = [pair.partition("=") for pair in text.split(",")]
    try:
        names, shares = tuple(name.strip() for name, _, _ in pairs), tuple(float(share) for _, _, share in pairs)
    except ValueError:
        raise UsageError("bad --shares", got=text, expected=expected) from None
    if len(set(names)) < len(names) or not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise UsageError("bad --shares", got=text, expected=expected)
    return names, shares


def assign(corpus: Corpus, rule: Shares | Told, workers: int) -> dict[str, list[np.ndarray]]:
    """By the name of a part its rows of each shard, int64 rising. Every sample is read once.

    Raises UserError for samples of which the json says nothing, and for more than MAX_PARTS parts.
    """
    tasks = list(enumerate(corpus.urls))
    found: dict[int, list[str]] = {}
    with Progress("reading", corpus.num_samples, "samples") as progress:
        for number, parts in run_tasks(_Look(rule), tasks, workers, progress):
            found[number] = parts
    names = sorted({part for parts in found.values() for part in parts} - {_NONE})
    without = sum(parts.count(_NONE) for parts in found.values())
    if without and isinstance(rule, Told):
        what = f"{without} of {corpus.num_samples} samples say nothing in {rule.field!r} of their json"
        raise UserError(what, expected="the name of a part", remedy="name another --field, or split by --shares")
    if len(names) > MAX_PARTS:
        listed = ", ".join(shown(name, 30) for name in names[:5])
        raise UserError("too many parts", got=f"{len(names)}, such as {listed}", expected=f"at most {MAX_PARTS}")
    if isinstance(rule, Shares):
        names = list(rule.names)
    columns = [np.array(found[number]) for number in range(len(tasks))]
    return {name: [np.flatnonzero(column == name) for column in columns] for name in names}


@dataclass(frozen=True)
class _Look:
    rule: Shares | Told

    def __call__(self, task: tuple[int, str], advance: Callable[[int], None]) -> tuple[int, list[str]]:
        """The number of a shard and the part of each of its samples."""
        number, tar = task
        parts: list[str] = []
        with ShardReader(open_corpus(tar)) as reader:
            for row in range(reader.index(0).num_samples):
                parts.append(self._part(reader, row))
                if len(parts) % _ADVANCE_EVERY == 0:
                    advance(_ADVANCE_EVERY)
        advance(len(parts) % _ADVANCE_EVERY)
        return number, parts

    def _part(self, reader: ShardReader, row: int) -> str:
        try:
            return self.rule.part(reader.read(0, row))
        except (TarDamageError, BadSampleError):
            return _NONE
