"""Which pictures stay: the best of those that are alike, such that each that goes is alike to one that stays."""

from __future__ import annotations

import numpy as np

_STAYS, _OPEN = -1, -2


def choose(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
    """For each of `count` nodes, numbered from the best, the number of the one for which it goes; -1: it stays.

    From the best on, a node stays unless it is alike to one that stays: then it goes for the best of these. So there
    are no chains: what goes is alike to what it goes for. All nodes whose better neighbours are decided are decided
    together, which comes to the same as one after the other.

    Args:
        better, worse: the nodes of each pair that is alike, int64 [pairs], better < worse.
    """
    fate = np.full(count, _STAYS, np.int64)
    fate[worse] = _OPEN
    order = np.lexsort((better, worse))
    better, worse = better[order], worse[order]
    while len(worse):
        first = np.flatnonzero(np.diff(worse, prepend=-1))  # of the pairs of each worse node
        stays = fate[better] == _STAYS
        undecided = np.logical_or.reduceat(fate[better] == _OPEN, first)
        # The best neighbour that stays decides, unless one better still is undecided; those are sorted before it.
        place = np.where(stays | (fate[better] == _OPEN), np.arange(len(worse)), len(worse))
        leading = np.minimum.reduceat(place, first)
        goes = (leading < len(worse)) & stays[np.minimum(leading, len(worse) - 1)]
        nodes = worse[first]
        fate[nodes[goes]] = better[leading[goes]]
        fate[nodes[~goes & ~undecided]] = _STAYS
        left = fate[worse] == _OPEN
        better, worse = better[left], worse[left]
    return fate
