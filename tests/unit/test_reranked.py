"""The evaluator that re-ranks, on towers and a head that are tables."""

import pytest

from data_tools.errors import UserError
from evaluate_fakes import HEADS, FakeBench, FakeTowers, Judging
from pretrain.evaluate import RerankedConfig, RetrievalConfig, metric_names
from pretrain.evaluate.evaluator import build_evaluator


def evaluate(towers, candidates=4):
    settings = RerankedConfig(data="photos", candidates=candidates)
    return build_evaluator(settings, FakeBench(40, 8, heads=HEADS))(towers)


def test_a_head_that_repeats_the_cosine_changes_nothing():
    by_cosine = build_evaluator(RetrievalConfig(data="photos"), FakeBench(40, 8))(FakeTowers()).metrics
    outcome = evaluate(Judging())
    assert outcome.metrics.keys() == set(RerankedConfig().metrics(False))
    for name, value in outcome.metrics.items():
        assert value == pytest.approx(by_cosine[name.removeprefix("reranked_")]), name


def test_a_head_that_knows_puts_what_is_among_the_candidates_first():
    by_cosine = build_evaluator(RetrievalConfig(data="photos"), FakeBench(40, 8))(FakeTowers()).metrics
    towers = Judging(sure=5.0)
    outcome = evaluate(towers, candidates=5)
    for way in ("image_to_text", "text_to_image"):
        assert outcome.metrics[f"reranked_{way}_recall@1"] == pytest.approx(by_cosine[f"{way}_recall@5"])
        assert outcome.metrics[f"reranked_{way}_recall@10"] == pytest.approx(by_cosine[f"{way}_recall@10"])
    assert towers.judged == outcome.counts["judged"] < 5 * (40 + outcome.counts["texts"])
    assert outcome.chance["reranked_text_to_image_recall@1"] == pytest.approx(1 / 40)


def test_a_model_without_the_head_is_refused_at_the_start():
    with pytest.raises(UserError, match="objective match"):
        build_evaluator(RerankedConfig(data="photos"), FakeBench(40, 8))


def test_it_stands_beside_plain_retrieval():
    both = {"retrieval": RetrievalConfig(data="photos"), "reranked": RerankedConfig(data="photos")}
    names = metric_names(both, False, False)
    assert len(names) == len(set(names))
