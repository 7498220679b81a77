"""k-NN of frozen features against the definition, over all orders of what ties, in any tiles and any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import UserError
from evaluate_fakes import FakeTowers, LabelledBench
from pretrain.evaluate import KNNConfig, knn
from pretrain.evaluate.knn import KNN, Labelled, nearest

NAMES = ("cat", "dog", "red bus", "tree", "house", "street", "sea")
BANK = [(image, image * 5 % 7) for image in range(100, 160)]
DATA = [(image, image % 7) for image in range(30)]


def evaluate(data=DATA, bank=BANK, names=None, towers=None, **settings):
    """An outcome; `bank`: None for the data themselves."""
    corpora = {"data": data, "bank": bank}
    config = KNNConfig(data="data", train=bank and "bank", **{"k": 5, **settings})
    return KNN(config, LabelledBench(corpora, names))(towers or FakeTowers())


def by_definition(queries, bank, labels, classes, k, temperature, excluded):
    """Votes in fp64, [q, C]: the mean over every choice that is possible among those that tie at the k-th place."""
    votes = np.zeros((len(queries), classes))
    for row, query in enumerate(queries):
        cosines = (bank.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
        allowed = [at for at in range(len(bank)) if not excluded[row, at]]
        places = sorted((cosines[at] for at in allowed), reverse=True)[:k]
        certain = [at for at in allowed if cosines[at] > places[-1]]
        doubtful = [at for at in allowed if cosines[at] == places[-1]]
        choices = list(itertools.combinations(doubtful, len(places) - len(certain)))
        for at in itertools.chain(certain * len(choices), *choices):
            weight = np.exp((float(cosines[at]) - float(places[0])) / temperature)
            votes[row, labels[at]] += weight / len(choices)
    return votes


def awkward(seed=0):
    """Features of few values, so that many tie, their labels, hashes of which some are shared, and queries."""
    g = torch.Generator().manual_seed(seed)
    table = torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    drawn = [torch.randint(0, high, (n,), generator=g) for high, n in ((5, 23), (3, 23), (30, 23), (5, 17), (30, 17))]
    bank, labels, bank_hashes, queries, hashes = drawn
    return Labelled(table[bank], labels, bank_hashes), table[queries], hashes


@pytest.mark.parametrize("k", [1, 4, 9, 23])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_the_mean_over_all_orders_of_what_ties(k, temperature):
    bank, queries, hashes = awkward()
    excluded = (hashes[:, None] == bank.hashes).numpy()
    assert excluded.any()
    if k == 9:
        bank = Labelled(bank.images[:14], bank.labels[:14], bank.hashes[:14])  # fewer choices to go through
    found = nearest(queries, hashes, bank, bank.labels, 3, k).votes(temperature)
    want = by_definition(
        queries.numpy(), bank.images.numpy(), bank.labels.numpy(), 3, k, temperature, excluded[:, : len(bank.labels)]
    )
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_are_the_same_bits_in_any_tiles_and_any_order_of_the_bank(k):
    bank, queries, hashes = awkward(1)
    g = torch.Generator().manual_seed(2)
    several = F.normalize(torch.randn(40, 6, generator=g), dim=1)
    spread = Labelled(several[:23], bank.labels, bank.hashes)
    for own, asked in ((bank, queries), (spread, several[23:])):
        whole = nearest(asked, hashes, own, own.labels, 3, k).votes(0.07)
        for block in (1, 4, 7):
            order = torch.randperm(23, generator=g)
            moved = Labelled(own.images[order], own.labels[order], own.hashes[order])
            assert nearest(asked, hashes, moved, moved.labels, 3, k, block).votes(0.07).equal(whole)


def test_accuracies_equal_a_dense_reference():
    towers = FakeTowers()
    # images of a class lie together, so that there is something to find
    g = torch.Generator().manual_seed(5)
    centres = torch.randn(7, towers.image.shape[1], generator=g)
    for image, label in BANK + DATA:
        towers.image[image] = F.normalize(towers.image[image] + 0.05 * centres[label], dim=0)
    outcome = evaluate(names=dict.fromkeys(("data", "bank"), NAMES), towers=towers)
    features = [towers.image[[image for image, _ in rows]].numpy() for rows in (DATA, BANK)]
    labels, known = (np.array([label for _, label in rows]) for rows in (DATA, BANK))
    votes = by_definition(*features, known, 7, 5, 0.07, np.zeros((30, 60), bool))
    own = votes[np.arange(30), labels][:, None]
    better, equal = (votes > own).sum(1), (votes == own).sum(1)  # equal: itself, and all where none of it votes
    top1 = (better == 0) / equal
    top5 = np.clip((5 - better) / equal, 0, 1)
    per_class = [top1[labels == number].mean() for number in range(7)]
    want = {"knn_top1": top1.mean(), "knn_top5": top5.mean(), "knn_mean_per_class": np.mean(per_class)}
    assert outcome.metrics == pytest.approx(want)
    assert 0.3 < outcome.metrics["knn_top1"] < outcome.metrics["knn_top5"] < 1
    assert outcome.counts == {"images": 30, "train_images": 60, "classes": 7, "images_in_train": 0}
    assert [row["class"] for row in outcome.breakdown] == list(NAMES)
    assert [row["accuracy"] for row in outcome.breakdown] == pytest.approx(per_class)


def test_features_that_are_all_one_get_chance_of_a_balanced_bank():
    towers = FakeTowers()
    towers.image[:] = towers.image[0]
    outcome = evaluate(DATA[:28], BANK[:56], towers=towers)
    want = {"knn_top1": 1 / 7, "knn_top5": 5 / 7, "knn_mean_per_class": 1 / 7}
    assert outcome.metrics == pytest.approx(want)
    assert outcome.chance == pytest.approx(want)


def test_chance_is_to_name_the_largest_classes_of_the_bank():
    bank = [(100, 0), (101, 0), (102, 0), (103, 1), (104, 1), (105, 2)]
    outcome = evaluate([(0, 0), (1, 1), (2, 0), (3, 2)], bank, k=3)
    assert outcome.chance == pytest.approx({"knn_top1": 0.5, "knn_mean_per_class": 1 / 3})
    assert outcome.metrics.keys() == outcome.chance.keys()


def test_without_a_bank_each_image_is_classified_by_all_others():
    towers, table = FakeTowers(), FakeTowers().image[:30].numpy()
    calls = len(towers.forwards)
    outcome = evaluate(bank=None, towers=towers)
    assert len(towers.forwards) - calls == 8  # 30 images in batches of 4, encoded once
    labels = np.array([label for _, label in DATA])
    votes = by_definition(table, table, labels, 7, 5, 0.07, np.eye(30, dtype=bool))
    top1 = (votes.argmax(1) == labels).mean()
    assert outcome.metrics["knn_top1"] == pytest.approx(top1)
    assert outcome.counts["images_in_train"] == 30
    assert evaluate(bank=None, k=29, towers=towers).metrics["knn_top1"] < 1


def test_an_image_that_is_also_in_the_bank_has_no_vote_on_itself():
    """Copies would get every one right, whatever the model."""
    bank, table = BANK + DATA[:3] + DATA[:1], FakeTowers().image.numpy()
    outcome = evaluate(bank=bank, k=1)
    images, known = (np.array(column) for column in zip(*bank, strict=True))
    copies = images == np.arange(30)[:, None]
    votes = by_definition(table[:30], table[images], known, 7, 1, 0.07, copies)
    right = votes.argmax(1) == [label for _, label in DATA]
    assert not right[:3].all()
    assert outcome.metrics["knn_top1"] == pytest.approx(right.mean())
    assert outcome.counts["images_in_train"] == 3


def test_an_image_without_any_neighbour_ties_with_all_classes():
    outcome = evaluate([(0, 0), (1, 1)], [(0, 0), (0, 1)], k=2)
    assert outcome.breakdown[0]["accuracy"] == 0.5


def test_classes_are_matched_by_name_whatever_their_order():
    swapped = [(image, 6 - label) for image, label in BANK]
    found = evaluate(bank=swapped, names={"data": NAMES, "bank": NAMES[::-1]})
    plain = evaluate(names={"data": NAMES, "bank": NAMES})
    assert found.metrics == pytest.approx(plain.metrics)
    by_name = lambda outcome: {row["class"]: row["accuracy"] for row in outcome.breakdown}  # noqa: E731
    assert by_name(found) == by_name(plain)


def test_labels_without_names_may_be_any_numbers():
    plain = evaluate()
    sparse = [[(image, 10**15 + 3 * label) for image, label in rows] for rows in (DATA, BANK)]
    found = evaluate(*sparse)
    assert found.metrics == plain.metrics
    assert found.breakdown[1]["class"] == str(10**15 + 3)


def test_what_the_user_should_know_is_remarked():
    corpora, names = {"data": DATA, "bank": BANK}, {"bank": NAMES}
    alone = KNN(KNNConfig(data="data"), LabelledBench(corpora))
    assert "leave-one-out" in alone.remarks[0]
    assert KNN(KNNConfig(data="data", train="bank"), LabelledBench(corpora)).remarks == []
    named = KNN(KNNConfig(data="data", train="bank"), LabelledBench(corpora, names))
    assert "label 0 is taken for cat" in named.remarks[0]
    assert named.shown == {"k": 20, "temperature": 0.07, "train": "bank"}
    assert named.decisive["train"] == "bank"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 61}, "k is larger than the bank; got k=61 and 60 images that may vote"),
        ({"bank": None, "k": 30}, "k is larger than the bank; got k=30 and 29 images"),
        ({"data": [(0, None)]}, "the corpus data has no labels"),
        ({"bank": [(0, None)] * 9}, "the corpus bank has no labels"),
        (
            {"names": {"data": (*NAMES[:6], "seas"), "bank": NAMES}},
            r"the corpus data has classes that the bank does not know.*is seas the bank's sea\? pack both",
        ),
        ({"data": [(0, 0), (1, 8), (2, 9), (3, 8)]}, "no image of the classes of 3 images; got 8, 9"),
        ({"data": [(0, 0), (1, 3)], "bank": [(5, 2), (6, 0)], "k": 1, "names": {"bank": NAMES}}, "1 images; got tree"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(changes, said):
    with pytest.raises(UserError, match=said) as caught:
        evaluate(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image", [3, 120])
def test_features_that_are_not_finite_are_refused(image):
    towers = FakeTowers()
    towers.image[image, 2] = torch.nan
    with pytest.raises(UserError, match=r"k-NN.* features are not finite"):
        evaluate(towers=towers)


def test_blocks_of_queries_and_of_the_bank_change_nothing(monkeypatch):
    whole = evaluate()
    monkeypatch.setattr(knn, "QUERIES", 7)
    assert evaluate() == whole
