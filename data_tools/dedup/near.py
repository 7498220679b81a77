"""All pairs of 64-bit hashes within a Hamming radius, exactly and out of core.

Two hashes that differ in at most r bits agree in at least b - r of any b blocks of their bits. For each choice of b - r
blocks, a table, the hashes are sorted by the bits of these blocks, its key, and those of one key are compared. A pair
counts in the first table that finds it. Large keys make few candidates but many tables, so b follows from the number of
hashes. A table is cut by the highest bits of its key, so that a worker holds one part of the hashes and not all.

A mirrored picture has the hash `hash ^ MIRROR`, so either form stands for a picture. A table takes the form in which
one chosen bit of its key is 0: near forms agree in that bit, hence both or neither are turned, and nothing is stored
twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.hashing.perceptual import MIRROR
from data_tools.parallel import run_tasks
from data_tools.progress import Progress

MAX_RADIUS = (MIRROR.bit_count() - 1) // 2  # beyond it a pair could be near in both forms, and count twice
_CHUNK = 1 << 20  # hashes that are looked at at once
_MOST_BLOCKS = 20
_PART = 1 << 24  # hashes of a part, about
_SORTED_NS, _COMPARED_NS = 60.0, 6.0  # of a hash in a table, and of a candidate: measured, to choose b and to tell
_TRIED = 12  # tables by which candidates are foretold


def either(hashes: np.ndarray) -> np.ndarray:
    """The one form by which a picture and its mirror image are known: uint64 of any shape, and again as much."""
    return _turned(hashes, (MIRROR & -MIRROR).bit_length() - 1)


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits in which two hashes differ, of the one and the other or its mirror image; uint8."""
    off = first ^ second
    return np.minimum(np.bitwise_count(off), np.bitwise_count(off ^ np.uint64(MIRROR)))


@dataclass(frozen=True)
class Table:
    """The hashes by the blocks in `key`, numbers below `blocks`, into which the 64 bits are cut."""

    blocks: int
    key: tuple[int, ...]

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """(lowest bit, bits) of each block, those of the key first."""
        edges = [64 * number // self.blocks for number in range(self.blocks + 1)]
        others = [number for number in range(self.blocks) if number not in self.key]
        return [(edges[number], edges[number + 1] - edges[number]) for number in (*self.key, *others)]

    @cached_property
    def key_bits(self) -> int:
        """Bits of the key."""
        return sum(bits for _, bits in self._spans[: len(self.key)])

    def arrange(self, hashes: np.ndarray) -> np.ndarray:
        """The hashes in the form that this table compares, with the key as their highest bits."""
        turned, place = self._form(hashes), 64
        arranged = np.zeros_like(turned)
        for lowest, bits in self._spans:
            place -= bits
            arranged |= ((turned >> np.uint64(lowest)) & np.uint64((1 << bits) - 1)) << np.uint64(place)
        return arranged

    def restore(self, arranged: np.ndarray) -> np.ndarray:
        """The hashes again, in a form of either kind."""
        place, hashes = 64, np.zeros_like(arranged)
        for lowest, bits in self._spans:
            place -= bits
            hashes |= ((arranged >> np.uint64(place)) & np.uint64((1 << bits) - 1)) << np.uint64(lowest)
        return hashes

    def part_of(self, hashes: np.ndarray, bits: int) -> np.ndarray:
        """In which of 2^bits parts each hash falls: by the highest bits of the key."""
        lowest, width = self._spans[0]
        return (self._form(hashes) >> np.uint64(lowest + width - bits)) & np.uint64((1 << bits) - 1)

    def is_first(self, off: np.ndarray) -> np.ndarray:
        """Whether no earlier table finds the pairs whose arranged hashes differ by `off`: in each block before the
        key's last that is not in the key they differ."""
        first, place = np.ones(len(off), bool), 64 - self.key_bits
        others = [number for number in range(self.blocks) if number not in self.key]
        for number, (_, bits) in zip(others, self._spans[len(self.key) :], strict=True):
            place -= bits
            if number < self.key[-1]:
                first &= (off >> np.uint64(place)) & np.uint64((1 << bits) - 1) != 0
        return first

    def _form(self, hashes: np.ndarray) -> np.ndarray:
        for lowest, bits in reversed(self._spans[: len(self.key)]):  # not of the highest bits, which make the parts
            mirrored = (MIRROR >> lowest) & ((1 << bits) - 1)
            if mirrored:
                return _turned(hashes, lowest + (mirrored & -mirrored).bit_length() - 1)
        return hashes


@dataclass(frozen=True)
class Plan:
    """How hashes are joined within `radius`; about so many pairs are compared, which takes a core so many seconds."""

    radius: int
    blocks: int
    part_bits: int
    candidates: float
    seconds: float

    @property
    def tables(self) -> list[Table]:
        """All of them, in the order in which a pair counts."""
        return [Table(self.blocks, key) for key in _keys(self.blocks, self.radius)]


def make_plan(count: int, radius: int, sample: np.ndarray) -> Plan:
    """The cheapest plan for so many different hashes, of which `sample` is a fair one."""
    part_bits = max(0, math.ceil(math.log2(max(1, count) / _PART)))
    plans = [_foretold(count, radius, blocks, part_bits, sample) for blocks in range(radius + 1, _MOST_BLOCKS + 1)]
    return min(plans, key=lambda plan: plan.seconds)


def _foretold(count: int, radius: int, blocks: int, part_bits: int, sample: np.ndarray) -> Plan:
    tables = math.comb(blocks, radius)
    scale = (count / max(1, len(sample))) ** 2
    even = count**2 / 2 / 2 ** (64 * (blocks - radius) // blocks - 1)  # were they spread evenly
    tried = list(itertools.islice(_keys(blocks, radius), 0, None, max(1, tables // _TRIED)))[:_TRIED]
    found = [_alike(np.sort(table.arrange(sample)), table) for table in (Table(blocks, key) for key in tried)]
    candidates = tables * (even + scale * float(np.mean(found)))
    seconds = 1e-9 * (tables * count * _SORTED_NS + candidates * _COMPARED_NS)
    return Plan(radius, blocks, part_bits, candidates, seconds)


def _alike(arranged: np.ndarray, table: Table) -> int:
    """Pairs of one key among sorted hashes."""
    _, counts = np.unique(arranged >> np.uint64(64 - table.key_bits), return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


@dataclass(frozen=True)
class _Task:
    hashes: Path
    table: Table
    radius: int
    part: int
    part_bits: int


def near_pairs(hashes: Path, plan: Plan, workers: int) -> Iterator[np.ndarray]:
    """Every pair within the plan's radius once, uint64 [pairs, 2] at a time, in the form of `either`.

    `hashes` is a file of different uint64, each in that form. The pairs do not depend on the number of workers, their
    order does.
    """
    parts = range(1 << plan.part_bits)
    tasks = [_Task(hashes, table, plan.radius, part, plan.part_bits) for table in plan.tables for part in parts]
    with Progress("comparing", len(tasks), "parts of tables") as progress:
        yield from run_tasks(_pairs_of, tasks, workers, progress)


def _pairs_of(task: _Task, advance: Callable[[int], None]) -> np.ndarray:
    found = [task.table.restore(pairs) for pairs in _compared(_part(task), task.table, task.radius)]
    advance(1)
    return either(np.concatenate(found)) if found else np.empty((0, 2), np.uint64)


def _part(task: _Task) -> np.ndarray:
    """The arranged hashes of one part, sorted."""
    kept = []
    with open(task.hashes, "rb") as file:
        while len(chunk := np.fromfile(file, np.uint64, _CHUNK)):
            if task.part_bits:
                chunk = chunk[task.table.part_of(chunk, task.part_bits) == np.uint64(task.part)]
            kept.append(task.table.arrange(chunk))
    arranged = np.concatenate(kept) if kept else np.empty(0, np.uint64)
    arranged.sort()
    return arranged


def _compared(arranged: np.ndarray, table: Table, radius: int) -> Iterator[np.ndarray]:
    """Near pairs among sorted hashes, arranged still, uint64 [pairs, 2]."""
    shift = np.uint64(64 - table.key_bits)
    for start in range(0, len(arranged), _CHUNK):
        here = np.arange(start, min(start + _CHUNK, len(arranged) - 1))
        for lag in itertools.count(1):
            here = here[here < len(arranged) - lag]
            here = here[(arranged[here] ^ arranged[here + lag]) >> shift == 0]
            if not len(here):
                break
            first, second = arranged[here], arranged[here + lag]
            off = first ^ second
            near = np.bitwise_count(off) <= radius
            if near.any():
                near[near] = table.is_first(off[near])
                yield np.stack([first[near], second[near]], axis=1)


def _turned(hashes: np.ndarray, bit: int) -> np.ndarray:
    """The form of each hash in which `bit` is 0."""
    return hashes ^ (((hashes >> np.uint64(bit)) & np.uint64(1)) * np.uint64(MIRROR))


def _keys(blocks: int, radius: int) -> Iterator[tuple[int, ...]]:
    return itertools.combinations(range(blocks), blocks - radius)
