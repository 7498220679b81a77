"""From the hashes of a corpus to what goes, and for what."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.corpus import Corpus
from data_tools.dedup.choose import choose
from data_tools.dedup.near import distance, make_plan, near_pairs
from data_tools.dedup.pictures import NONE, Pictures, chunks, classes_of, tables

_SAMPLE = 1 << 16
_SEED = 0  # of what is drawn to foretell the work; nothing that is found depends on it


@dataclass(frozen=True)
class Goes:
    """The pictures that go, g of them.

    Attributes:
        position: int64 [g], rising, in the corpus.
        kept: int64 [g], the position of the one that stays for each.
        distance: uint8 [g], bits between the two.
    """

    position: np.ndarray
    kept: np.ndarray
    distance: np.ndarray


class Search:
    """One search for near-copies, which takes the arrays of `pictures` to itself; `plan` foretells its work."""

    def __init__(self, pictures: Pictures, radius: int):
        self._classes = classes_of(pictures)
        looks = self._classes.looks
        drawn = np.random.default_rng(_SEED).random(min(_SAMPLE, len(looks))) * len(looks)
        self.different = len(looks)  # hashes that are to be compared
        self.plan = make_plan(self.different, radius, np.unique(looks[drawn.astype(np.int64)]))

    def run(self, workers: int) -> Goes:
        """Compare them all; every picture that goes lies within the radius of the one that stays for it. Once only."""
        classes = self._classes
        with tempfile.TemporaryDirectory(prefix="dualstream-dedup-") as folder:
            file = Path(folder) / "hashes"
            classes.looks.tofile(file)
            found = [np.empty((0, 2), classes.of.dtype)]
            for pairs in near_pairs(file, self.plan, workers):
                found.append(np.searchsorted(classes.looks, pairs).astype(classes.of.dtype))
        better, worse, order = self._ranked(np.concatenate(found))
        del found
        nodes = choose(better, worse, len(order))
        gone = np.flatnonzero(nodes >= 0)
        return self._goes(order[gone], order[nodes[gone]])

    def _ranked(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The classes of pairs numbered from the best on: the better and the worse of each, and the class of each
        number."""
        classes, alike = self._classes, np.unique(pairs)
        order = np.lexsort((classes.best[alike], ~classes.rank[alike]))
        number = np.empty(len(alike), classes.of.dtype)
        number[order] = np.arange(len(alike))
        classes.rank = np.empty(0)
        pairs = np.sort(number[np.searchsorted(alike, pairs)], axis=1)
        return pairs[:, 0], pairs[:, 1], alike[order]

    def _goes(self, gone: np.ndarray, instead: np.ndarray) -> Goes:
        """What goes where these classes do, each for the one at its place in `instead`."""
        classes = self._classes
        kept = classes.best.copy()
        kept[gone] = classes.best[instead]
        found = [np.empty(0, np.int64)]
        for here in chunks(len(classes.of)):
            there = here.start + np.flatnonzero(classes.of[here] != NONE)
            found.append(there[kept[classes.of[there]] != there])
        position = np.concatenate(found)
        instead_of = kept[classes.of[position]].astype(np.int64)
        own, other = classes.of[position], classes.of[instead_of]
        off, hashed = np.zeros(len(position), np.uint8), own < len(classes.looks)
        off[hashed] = distance(classes.looks[own[hashed]], classes.looks[other[hashed]])
        return Goes(position, instead_of, off)


def same_bytes(corpus: Corpus, goes: Goes) -> np.ndarray:
    """Which of those that go are the very file that stays, bool [g]."""
    wanted = np.unique(np.concatenate([goes.position, goes.kept]))
    sha256: list[bytes] = []
    at = 0
    for table in tables(corpus, ("sha256",)) if len(wanted) else ():
        here = wanted[np.searchsorted(wanted, at) : np.searchsorted(wanted, at + len(table))] - at
        sha256 += table["sha256"].take(here).to_pylist()
        at += len(table)
    first, second = (np.searchsorted(wanted, positions).tolist() for positions in (goes.position, goes.kept))
    return np.array([sha256[one] == sha256[other] for one, other in zip(first, second, strict=True)], bool)
