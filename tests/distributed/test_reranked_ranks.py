"""Re-ranking by several ranks: the numbers of one, and as many forwards on each, as ZeRO-3 needs."""

import pytest

from evaluate_fakes import HEADS, FakeBench, Judging, ranks
from pretrain.evaluate import RerankedConfig, rerank
from pretrain.evaluate.evaluator import build_evaluator
from ranks import run_ranks


def of_rank(rank, world_size):
    rerank.PAIRS = 7
    towers = Judging(sure=0.2)
    bench = FakeBench(37, 4, place=ranks(rank, world_size), heads=HEADS)
    outcome = build_evaluator(RerankedConfig(data="photos", candidates=5), bench)(towers)
    return outcome.metrics, outcome.counts, len(towers.forwards), towers.judged


def test_ranks_share_the_work_and_agree():
    ((alone, counts, _, judged),) = run_ranks(1, of_rank)
    found = run_ranks(3, of_rank)
    for metrics, own_counts, forwards, _ in found:
        assert metrics == pytest.approx(alone)
        assert own_counts == counts
        assert forwards == found[0][2]
    assert judged == counts["judged"]
    assert max(done for *_, done in found) < 0.6 * judged
