"""How many samples each source of a mixture gives to each global batch.

No random number decides it: it is the largest-remainder share of what the source is owed, and what rounding leaves is
carried to the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERIOD = 1024  # steps after which quotas repeat: realised shares are exact to 1 / (PERIOD * global batch)


class Quotas:
    """Samples of each source in every step.

    Args:
        weights: positive, of any sum.
        global_batch: the sum of a step's quotas.
    """

    def __init__(self, weights: Sequence[float], global_batch: int):
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        taken = np.zeros((PERIOD + 1, len(shares)), dtype=np.int64)
        for step in range(PERIOD):
            owed = shares * global_batch * (step + 1) - taken[step]
            taken[step + 1] = taken[step] + largest_remainders(owed, global_batch)
        self._taken = taken

    def before(self, step: int) -> np.ndarray:
        """Samples that each source gave in steps 0 .. step - 1, int64 [sources]."""
        periods, rest = divmod(step, PERIOD)
        return periods * self._taken[PERIOD] + self._taken[rest]


def largest_remainders(owed: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers >= 0 of sum `total`: each of `owed` rounded down, the largest remainders up; int64, its shape.

    `owed` sums to `total`; entries below 0 (given too much before) count as 0.
    """
    quotas = np.maximum(np.floor(owed), 0).astype(np.int64)
    missing = total - int(quotas.sum())
    ranked = np.argsort(quotas - owed, kind="stable")  # the largest remainder first
    if missing >= 0:
        quotas[ranked[:missing]] += 1
        return quotas
    holders = [source for source in ranked[::-1] if quotas[source] > 0]
    quotas[holders[:-missing]] -= 1
    return quotas
