"""Retrieval over a reader, validation loss and minimal pairs, in one process."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import plain_losses
from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.format.writer import write_shard
from evaluate_fakes import FakeBench, FakeTowers, ranks
from pretrain.evaluate import RetrievalConfig
from pretrain.evaluate import features as features_module
from pretrain.evaluate.features import CorpusFeatures, encode_corpus
from pretrain.evaluate.pair_loss import validation_loss
from pretrain.evaluate.pairs import MinimalPairs, metrics_by_kind, pair_metrics, read_pairs
from pretrain.evaluate.retrieval import Retrieval, retrieval_metrics
from pretrain.objectives import InfoNCEConfig

INFONCE = {"infonce": InfoNCEConfig()}


def _encoded(towers: FakeTowers, images: int, batch: int) -> CorpusFeatures:
    bench = FakeBench(images, batch)
    return encode_corpus(bench, towers, bench.reader(bench.corpus("x")), images, "images")


def _expected(towers: FakeTowers, images: int) -> CorpusFeatures:
    owner = torch.tensor([image for image in range(images) for _ in range(image % 4)])
    rows = torch.tensor([image * 4 + index for image in range(images) for index in range(image % 4)])
    return CorpusFeatures(towers.image[:images], towers.text[rows], owner, shared={"logit_scale": 20.0})


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_every_image_and_caption_is_encoded_once_in_order(batch):
    towers = FakeTowers()
    found = _encoded(towers, 23, batch)
    want = _expected(towers, 23)
    assert torch.equal(found.images, want.images)
    assert torch.equal(found.texts, want.texts)
    assert torch.equal(found.text_image, want.text_image)


def test_many_captions_go_through_in_chunks(monkeypatch):
    monkeypatch.setattr(features_module, "TEXT_CHUNK", 4)
    towers = FakeTowers()
    found = _encoded(towers, 23, 8)
    assert torch.equal(found.texts, _expected(towers, 23).texts)
    assert max(texts for _, texts in towers.forwards) == 4


def test_the_outcome_has_metrics_chance_and_counts():
    towers = FakeTowers()
    outcome = Retrieval(RetrievalConfig(data="x", loss_batch=16), FakeBench(40, 8))(towers)
    want = _expected(towers, 40)
    assert outcome.metrics.items() >= retrieval_metrics(want.images, want.texts, want.text_image).items()
    assert outcome.counts == {"images": 40, "texts": 60, "loss_batch": 16}
    assert set(outcome.chance) <= set(outcome.metrics)
    assert outcome.metrics["image_to_text_recall@1"] > 5 * outcome.chance["image_to_text_recall@1"]


def test_validation_loss_is_the_mean_of_full_batches_of_first_captions():
    towers = FakeTowers()
    features = _expected(towers, 40)  # 30 images have a caption: images 1 2 3 5 6 7 9 ...
    captioned = [image for image in range(40) if image % 4]
    losses = []
    for start in (0, 8, 16):  # 24 to 29 are no full batch
        part = torch.tensor(captioned[start : start + 8])
        logits = 20.0 * towers.image[part].double() @ towers.text[part * 4].double().T
        rows, columns = torch.log_softmax(logits, 1).diagonal(), torch.log_softmax(logits, 0).diagonal()
        losses.append(-(rows.mean() + columns.mean()) / 2)
    assert validation_loss(features, INFONCE, ranks(), 8) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-9)
    everything = validation_loss(features, INFONCE, ranks(), 30)
    assert validation_loss(features, INFONCE, ranks(), 1000) == everything  # smaller than a batch: one batch


@pytest.mark.parametrize("name", plain_losses.OF_PAIRS)
def test_validation_loss_is_the_value_of_the_loss_that_trains(name):
    """By the loss's definition on the whole matrix; captions and images that are one are so here too."""
    towers, settings = FakeTowers(), plain_losses.OF_PAIRS[name]
    towers.shared = {"logit_scale": torch.tensor([15.0]), "logit_bias": torch.tensor([-2.5])}
    bench = FakeBench(40, 8, objectives={name: settings})
    found = Retrieval(RetrievalConfig(data="x", loss_batch=15), bench)(towers)
    image = torch.tensor([image for image in range(40) if image % 4])
    identity = torch.stack([image // 2, image * 4 % 50], dim=1)
    scalars = (torch.tensor([value], dtype=torch.float64) for value in (15.0, -2.5))
    pairs = towers.image[image].double(), towers.text[image * 4].double()
    scale, bias = scalars
    want = []
    for rows in (slice(0, 15), slice(15, 30)):
        own = (*(side[rows] for side in pairs), scale, bias, identity[rows])
        want.append(plain_losses.of_pairs(settings, *own, by=plain_losses.plain))
    assert found.metrics["validation_loss"] == pytest.approx(torch.stack(want).mean().item(), abs=1e-9)


def _pair_features(images: list[list[float]], texts: list[list[float]]) -> CorpusFeatures:
    return CorpusFeatures(torch.tensor(images), torch.tensor(texts), torch.arange(len(texts)))


def test_winoground_scores_of_hand_written_pairs():
    # image x text; pair 0: all right; pair 1: image 3 prefers the wrong text, the texts prefer their images
    matrix = torch.zeros(4, 4)
    matrix[:2, :2] = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    matrix[2:, 2:] = torch.tensor([[0.9, 0.1], [0.7, 0.6]])
    found = pair_metrics(_pair_features(torch.eye(4).tolist(), matrix.T.tolist()), torch.tensor([[0, 1], [2, 3]]))
    assert found == pytest.approx(
        {
            "image_to_text_accuracy": 3 / 4,
            "text_to_image_accuracy": 1.0,
            "text_score": 1 / 2,
            "image_score": 1.0,
            "group_score": 1 / 2,
        }
    )


def test_a_model_blind_to_the_pair_gets_half_and_no_score():
    one = F.normalize(torch.randn(1, 65), dim=1).repeat(4, 1)
    found = pair_metrics(CorpusFeatures(one, one, torch.arange(4)), torch.tensor([[0, 3], [1, 2]]))
    assert found == {
        "image_to_text_accuracy": 0.5,
        "text_to_image_accuracy": 0.5,
        "text_score": 0.0,
        "image_score": 0.0,
        "group_score": 0.0,
    }


def _facts(pair: str | None) -> dict:
    return {"pair": pair, "kind": f"kind of {pair}"} if pair else {}


def _corpus(folder, pairs: list[str | None]):
    samples = [
        (f"{number:04d}", {"jpg": b"x", "json": json.dumps({"captions": ["c"], **_facts(pair)}).encode()})
        for number, pair in enumerate(pairs)
    ]
    write_shard(folder / "a.tar", samples[:3])
    write_shard(folder / "b.tar", samples[3:])
    return open_corpus([folder / "a.tar", folder / "b.tar"])


def test_pairs_are_read_across_shards(tmp_path):
    pairs = read_pairs(_corpus(tmp_path, ["p", None, "q", "r", "q", "p", "r"]))
    assert pairs.positions.tolist() == [[0, 5], [2, 4], [3, 6]]
    assert pairs.kinds == ("kind of p", "kind of q", "kind of r")


def test_metrics_by_kind():
    matrix = torch.eye(4)
    matrix[2:, 2:] = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    features = _pair_features(torch.eye(4).tolist(), matrix.T.tolist())
    positions = torch.tensor([[0, 1], [2, 3]])
    rows = metrics_by_kind(features, MinimalPairs(positions, ("shape", "colour")))
    assert [(row["kind"], row["n"], row["group_score"]) for row in rows] == [("colour", 1, 0.0), ("shape", 1, 1.0)]
    assert metrics_by_kind(features, MinimalPairs(positions, ("", ""))) is None


@pytest.mark.parametrize(
    ("pairs", "message"), [([None] * 4, "no minimal pairs"), (["p", "q", "p", "p"], "got 3 samples")]
)
def test_broken_pairs_are_refused(tmp_path, pairs, message):
    with pytest.raises(UserError, match=message):
        read_pairs(_corpus(tmp_path, pairs))


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"pair": [1]}'])
def test_facts_that_cannot_be_read_name_the_sample(tmp_path, text):
    write_shard(tmp_path / "a.tar", [("0007", {"jpg": b"x", "json": text})])
    with pytest.raises(UserError, match="the json of sample 0007"):
        read_pairs(open_corpus([tmp_path / "a.tar"]))


def test_a_pair_without_a_caption_is_refused():
    features = CorpusFeatures(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 2]))
    with pytest.raises(UserError, match="no caption"):
        pair_metrics(features, torch.tensor([[0, 1]]))
