"""Evaluation over 2 and 4 real ranks equals one process, bit for bit, with equal forwards on every rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import plain_losses
from evaluate_fakes import FakeBench, FakeTowers, LabelledBench, ranks
from pretrain.evaluate import ClassificationConfig, KNNConfig, PairsConfig, RetrievalConfig, knn, pairs
from pretrain.evaluate.classification import Classification
from pretrain.evaluate.knn import KNN
from pretrain.evaluate.pair_loss import validation_loss
from pretrain.evaluate.pairs import MinimalPairs, Pairs
from pretrain.evaluate.retrieval import Retrieval, retrieval_metrics
from ranks import RankError, run_ranks

CLASSES = ("cat", "dog", "red bus", "tree", "house", "street", "sea")
PAIRS = MinimalPairs(torch.tensor([[1, 2], [5, 9], [22, 13]]), ("colour", "place", "colour"))


def _all_tasks(rank, world_size, images, batch):
    """Everything evaluated, and how the towers were called."""
    place, towers = ranks(rank, world_size), FakeTowers()
    towers.shared["logit_bias"] = torch.tensor([-2.0])
    bench = FakeBench(images, batch, place, labels=7, names=CLASSES)
    retrieval = Retrieval(RetrievalConfig(data="x", loss_batch=4), bench)(towers)
    losses = plain_losses.OF_PAIRS.items()
    values = [validation_loss(retrieval.features, {name: one}, place, 4) for name, one in losses]
    with mock.patch.object(pairs, "read_pairs", return_value=PAIRS):
        of_pairs = Pairs(PairsConfig(data="x"), bench)(towers)
    classes = Classification(ClassificationConfig(data="x", templates="simple"), bench)(towers)
    by_neighbours = [_neighbours(place, towers, images, batch, train) for train in (None, "bank")]
    features = tuple(getattr(retrieval.features, name) for name in ("images", "texts", "text_image"))
    return (
        [retrieval, values, of_pairs, classes, *by_neighbours],
        (*features, *retrieval.features.hashes),
        towers.forwards,
    )


def _neighbours(place, towers, images, batch, train):
    """k-NN with a bank of its own, some of whose images are the data's, or by leaving one out."""
    corpora = {
        "x": [(image, image % 7) for image in range(images)],
        "bank": [(image, image % 7) for image in range(images - 5, images + 36)],
    }
    with mock.patch.multiple(knn, QUERIES=4, BANK=11):
        return KNN(KNNConfig(data="x", train=train, k=6), LabelledBench(corpora, batch=batch, place=place))(towers)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("images", [23, 25])  # 25 on 4 ranks: slices of 7, the last has 4 and a whole batch of padding
def test_ranks_agree_with_one_process(world_size, images):
    alone, features, _ = _all_tasks(0, 1, images, 3)
    results = run_ranks(world_size, _all_tasks, images, 3)
    for outcomes, rank_features, forwards in results:
        assert outcomes == alone
        assert all(map(torch.equal, rank_features, features))
        assert forwards == results[0][2]  # the same number of forwards, of the same sizes


def _metrics(rank, world_size, block):
    towers = FakeTowers(seed=3)
    towers.image[40:50] = towers.image[40]  # ties
    owner = torch.arange(200).repeat_interleave(4)[:777]
    return retrieval_metrics(towers.image[:200], towers.text[:777], owner, rank, world_size, block)


@pytest.mark.parametrize("block", [7, 1024])
def test_retrieval_counts_are_summed_exactly(block):
    want = _metrics(0, 1, 64)
    assert run_ranks(4, _metrics, block) == [want] * 4


def _more_ranks_than_images(rank, world_size):
    eye = torch.eye(3)
    return retrieval_metrics(eye, eye, torch.arange(3), rank, world_size)


def test_more_ranks_than_images():
    assert all(found["image_to_text_recall@1"] == 1.0 for found in run_ranks(4, _more_ranks_than_images))


def _label_out_of_range_on_one_rank(rank, world_size):
    bench = FakeBench(12, 3, ranks(rank, world_size), 8 if rank == 1 else 7, CLASSES)
    Classification(ClassificationConfig(data="x"), bench)(FakeTowers())


def test_a_wrong_label_on_one_rank_is_raised_on_all():
    with pytest.raises(RankError) as caught:
        run_ranks(2, _label_out_of_range_on_one_rank)
    assert set(caught.value.tracebacks) == {0, 1}
    assert all("label that is no class" in text for text in caught.value.tracebacks.values())
