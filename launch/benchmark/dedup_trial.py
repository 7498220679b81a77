"""One search for near-copies among drawn hashes, in a process of its own: seconds, peak memory, what goes."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.dedup.find import Goes, Search
from data_tools.dedup.near import distance
from data_tools.dedup.pictures import Pictures, either
from data_tools.hashing.perceptual import MIRROR

_PLANTED = 0.01  # of the hashes are copies of others, with up to two bits more than the radius turned
_CROWDED, _EQUAL, _CENTRE_BITS = (
    0.01,
    0.05,
    8,
)  # of a skewed set: around one centre within so many bits, and of one hash
_EVERY = 0.1  # seconds between looks at the memory


@dataclass(frozen=True)
class DedupTrial:
    """`hashes` drawn evenly, or `skewed`; `checked` compares what is found with comparing all with all."""

    hashes: int
    radius: int
    workers: int
    skewed: bool = False
    checked: bool = False


def drawn(trial: DedupTrial) -> np.ndarray:
    """The hashes, uint64."""
    rng = np.random.default_rng(trial.hashes)
    hashes = rng.integers(0, 2**64, trial.hashes, dtype=np.uint64)
    planted = int(trial.hashes * _PLANTED)
    hashes[:planted] = _turned(rng, hashes[rng.integers(planted, trial.hashes, planted)], trial.radius + 2)
    if trial.skewed:
        crowded, equal = int(trial.hashes * _CROWDED), int(trial.hashes * _EQUAL)
        centre = hashes[-1]
        hashes[-crowded:] = _turned(rng, np.full(crowded, centre), _CENTRE_BITS)
        hashes[-crowded - equal : -crowded] = hashes[0]
    return rng.permutation(hashes)


def _turned(rng: np.random.Generator, hashes: np.ndarray, most: int) -> np.ndarray:
    """Each with 0 to `most` of its bits turned, half of them mirrored."""
    bits = rng.integers(0, most + 1, len(hashes))
    for number in range(most):
        bit = np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
        hashes = np.where(number < bits, hashes ^ bit, hashes)
    return np.where(rng.random(len(hashes)) < 0.5, hashes ^ np.uint64(MIRROR), hashes)


class PeakMemory:
    """`with PeakMemory() as memory`: then `memory.peak`, the largest sum of the proportional set sizes of this process
    and all that it began, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(_EVERY)
            self.peak = max(self.peak, sum(map(_proportional, _family())))


def _family() -> list[str]:
    """Processes of this session: a trial leads one."""
    session = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[3]
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/stat") if _session(path) == session]


def _session(path: Path) -> str:
    try:
        return path.read_text().rsplit(")", 1)[1].split()[3]
    except OSError:  # it has ended
        return ""


def _proportional(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def run(trial: DedupTrial) -> dict:
    """The figures of a trial."""
    hashes = drawn(trial)
    rank = np.random.default_rng(1).integers(0, 2**40, len(hashes), dtype=np.uint64)
    pictures = Pictures(either(hashes), np.ones(len(hashes), bool), rank)
    kept = hashes if trial.checked else None
    del hashes
    with PeakMemory() as memory:
        started = time.perf_counter()
        search = Search(pictures, trial.radius)
        plan = search.plan
        goes = search.run(trial.workers)
        seconds = time.perf_counter() - started
    faults = None if kept is None else _faults(kept, goes, trial.radius)
    figures = {"seconds": seconds, "peak": memory.peak, "goes": len(goes.position), "different": search.different}
    return figures | {"blocks": plan.blocks, "candidates": plan.candidates, "foretold": plan.seconds, "faults": faults}


def _faults(hashes: np.ndarray, goes: Goes, radius: int) -> int:
    """How often the promise is broken, by comparing all with all: near pictures that both stay, and pictures that go
    for one that is not near or goes itself."""
    stays = np.ones(len(hashes), bool)
    stays[goes.position] = False
    left = hashes[stays]
    both = sum(np.count_nonzero(distance(left[one + 1 :], left[one]) <= radius) for one in range(len(left) - 1))
    far = distance(hashes[goes.position], hashes[goes.kept]) > radius
    return int(both + np.count_nonzero(far) + np.count_nonzero(~stays[goes.kept]))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(DedupTrial(**json.loads(sys.argv[1])))))
