"""Similarities and ranks with one tie rule for every metric.

The tie rule: candidates that tie with a positive stand in random order, and a metric is its expected value over that
order. A model whose features have collapsed to one point so scores exactly at chance, where counting only strictly
better candidates would give it 100 %. Without ties it is the usual metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from data_tools.errors import UserError

RECALLS = (1, 5, 10)


class Tied(NamedTuple):
    """Where the best positive of each query stands, int64 [Q] each: candidates strictly better than it; wrong ones and
    right ones (itself included) that tie with it."""

    better: torch.Tensor
    negatives: torch.Tensor
    positives: torch.Tensor


def similarities(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Dot products [Q, d] x [C, d] -> [Q, C] fp32, summed in fp64.

    A sum in fp32 depends on the place of a row in the matrix product: identical features would differ in the last bit
    from tile to tile, and neither ties nor results would be the same at another block or world size.
    """
    return (queries.double() @ candidates.double().T).float()


def paired_similarities(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Dot products of row i with row i, [n, d] x [n, d] -> [n] fp32, to the same rule as `similarities`."""
    return (left.double() * right.double()).sum(dim=1).float()


def hit_probability(better: torch.Tensor, negatives: torch.Tensor, positives: torch.Tensor, k: int) -> torch.Tensor:
    """Probability that a positive is among the first `k` candidates, ties in random order: 1 - C(n, m) / C(n + p, m).

    Args:
        better: int64 [Q], candidates strictly better than the best positive.
        negatives, positives: int64 [Q], wrong and right candidates that tie with the best positive (itself included).
        k: places; more than there are candidates is a certain hit.

    Returns:
        fp64 [Q]; 0 or 1 where nothing wrong ties.
    """
    places = k - better
    miss = torch.ones_like(better, dtype=torch.float64)
    for drawn in range(k):
        wrong = (negatives - drawn).clamp(min=0).double()
        tied = (negatives + positives - drawn).clamp(min=1)
        miss = torch.where(places > drawn, miss * wrong / tied, miss)
    return 1.0 - miss


def expected_rank(better: torch.Tensor, negatives: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Expected rank (from 1) of the first positive, ties in random order: fp64 [Q]. Arguments as `hit_probability`."""
    return 1.0 + better + negatives / (positives + 1.0)


def recall_and_rank(direction: str, tied: Tied, recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """`DIRECTION_recall@K` (0..1) and `DIRECTION_median_rank` (from 1) of queries that stand so."""
    metrics = {f"{direction}_recall@{k}": hit_probability(*tied, k).mean().item() for k in recalls}
    return metrics | {f"{direction}_median_rank": float(np.median(expected_rank(*tied).cpu().numpy()))}


def require_finite(features: torch.Tensor, what: str) -> None:
    """Refuse NaN and infinity: every comparison with NaN is false, so a broken model would rank first everywhere.

    Raises:
        UserError: with the number of rows affected. Called on tensors that are the same on every rank, so all raise.
    """
    bad = int((~torch.isfinite(features)).any(dim=1).sum())
    if bad:
        raise UserError(
            f"{what} features are not finite",
            got=f"{bad} of {len(features)} rows with NaN or infinity",
            remedy="evaluate an earlier checkpoint; the training run has diverged",
        )
