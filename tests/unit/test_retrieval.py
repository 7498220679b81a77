"""Retrieval metrics against hand-written matrices, a dense reference in CLIP_benchmark's terms, and the tie rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import UserError
from pretrain.evaluate import retrieval
from pretrain.evaluate.ranking import similarities
from pretrain.evaluate.retrieval import retrieval_chance, retrieval_metrics

# 4 images x 8 captions, two captions each
HAND = torch.tensor(
    [
        # captions of image 0 | 1        | 2        | 3
        [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],  # rank 1: its first caption leads
        [0.8, 0.2, 0.5, 0.6, 0.7, 0.1, 0.3, 0.4],  # better than .6: .8 .7 -> rank 3
        [0.95, 0.8, 0.7, 0.65, 0.1, 0.2, 0.5, 0.4],  # better than .2: all but .1 -> rank 7
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.65],  # .7 leads -> rank 1
    ]
)
HAND_OWNER = torch.arange(4).repeat_interleave(2)


def _of_matrix(matrix: torch.Tensor, owner: torch.Tensor, **options) -> dict[str, float]:
    """Identity image features and the matrix' columns as text features: the similarities are the matrix itself."""
    return retrieval_metrics(torch.eye(len(matrix)), matrix.T.contiguous(), owner, **options)


def _features(seed: int, images: int, captions: list[int], dim: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(images), torch.tensor(captions))
    image = torch.randn(images, dim, generator=generator)
    text = image[owner] + torch.randn(len(owner), dim, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1), owner


def _dense(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor, recalls: tuple[int, ...]) -> dict[str, float]:
    """CLIP_benchmark's definition on the whole matrix: top-k by sorting, a hit if any positive is among them."""
    scores = (image.double() @ text.double().T).numpy()
    positive = owner.numpy()[None, :] == np.arange(len(image))[:, None]
    metrics = {}
    for name, matrix, right in (("image_to_text", scores, positive), ("text_to_image", scores.T, positive.T)):
        has = right.any(axis=1)
        order = np.argsort(-matrix, axis=1)
        sorted_right = np.take_along_axis(right, order, axis=1)[has]
        for k in recalls:
            metrics[f"{name}_recall@{k}"] = sorted_right[:, :k].any(axis=1).mean()
        metrics[f"{name}_median_rank"] = np.median(sorted_right.argmax(axis=1) + 1)
    return metrics


def test_hand_written_matrix():
    found = _of_matrix(HAND, HAND_OWNER)
    assert found["image_to_text_recall@1"] == 2 / 4
    assert found["image_to_text_recall@5"] == 3 / 4
    assert found["image_to_text_recall@10"] == 1.0
    assert found["image_to_text_median_rank"] == 2.0  # ranks 1 1 3 7
    # ranks of the captions' images, column by column: 2 4 2 2 4 3 1 2
    assert found["text_to_image_recall@1"] == 1 / 8
    assert found["text_to_image_recall@5"] == 1.0
    assert found["text_to_image_median_rank"] == 2.0
    second = _of_matrix(HAND, HAND_OWNER, recalls=(2, 3))
    assert (second["text_to_image_recall@2"], second["text_to_image_recall@3"]) == (5 / 8, 6 / 8)
    assert (second["image_to_text_recall@2"], second["image_to_text_recall@3"]) == (2 / 4, 3 / 4)


def test_agrees_with_clip_benchmarks_definition():
    image, text, owner = _features(0, 150, [1 + i % 5 for i in range(150)])
    recalls = (1, 3, 5, 10, 100, 1000)  # the last is more than there are candidates
    found = retrieval_metrics(image, text, owner, block=64, recalls=recalls)
    assert found == pytest.approx(_dense(image, text, owner, recalls), abs=1e-12)
    assert 0.05 < found["image_to_text_recall@1"] < 0.95  # the case decides something
    assert found["image_to_text_recall@1000"] == 1.0


@pytest.mark.parametrize("block", [1, 7, 33, 4096])
def test_the_block_does_not_show(block):
    image, text, owner = _features(1, 40, [i % 4 for i in range(40)], dim=513)
    assert retrieval_metrics(image, text, owner, block=block) == retrieval_metrics(image, text, owner)


def test_images_without_captions_are_candidates_only():
    image, text, owner = _features(2, 30, [0, 2, 1] * 10)
    found = retrieval_metrics(image, text, owner)
    assert found == pytest.approx(_dense(image, text, owner, (1, 5, 10)), abs=1e-12)
    text[:] = image[0]  # every caption looks like the image that has none
    assert retrieval_metrics(image, text, owner)["text_to_image_recall@1"] == 0.0


@pytest.mark.parametrize("dim", [1, 7, 513])
def test_a_collapsed_model_scores_exactly_at_chance(dim):
    one = F.normalize(torch.randn(1, dim, generator=torch.Generator().manual_seed(dim)), dim=1)
    captions = torch.tensor([1 + i % 3 for i in range(50)])
    owner = torch.arange(50).repeat_interleave(captions)
    found = retrieval_metrics(one.repeat(50, 1), one.repeat(len(owner), 1), owner, block=16)
    chance = retrieval_chance(50, owner)
    assert {name: found[name] for name in chance} == pytest.approx(chance)
    assert found["text_to_image_recall@1"] == pytest.approx(1 / 50)
    assert found["text_to_image_recall@10"] == pytest.approx(10 / 50)
    assert found["text_to_image_median_rank"] == 25.5


def test_chance_is_the_hypergeometric_one():
    owner = torch.tensor([0, 0, 1, 2])  # 3 images; image 0 has two of the four captions
    chance = retrieval_chance(4, owner, recalls=(1, 2))
    assert chance["image_to_text_recall@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert chance["image_to_text_recall@2"] == pytest.approx(((1 - (2 / 4) * (1 / 3)) + 2 * 2 / 4) / 3)
    assert chance["text_to_image_recall@2"] == pytest.approx(2 / 4)


def test_ties_count_as_their_expectation():
    # image 0: its two captions tie with one wrong caption; the first place is theirs with probability 2/3
    matrix = torch.tensor([[0.5, 0.5, 0.5, 0.1], [0.0, 0.0, 0.9, 0.0], [0.0, 0.0, 0.0, 0.9]])
    found = _of_matrix(matrix, torch.tensor([0, 0, 1, 2]))
    assert found["image_to_text_recall@1"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert found["image_to_text_recall@5"] == 1.0


def test_median_rank_of_an_even_number_is_between_the_middle_two():
    matrix = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    assert _of_matrix(matrix, torch.tensor([0, 1]))["image_to_text_median_rank"] == 1.5


def test_identical_rows_give_identical_similarities():
    generator = torch.Generator().manual_seed(3)
    one = F.normalize(torch.randn(1, 768, generator=generator), dim=1)
    other = F.normalize(torch.randn(1, 768, generator=generator), dim=1)
    scores = similarities(one.repeat(67, 1), other.repeat(131, 1))
    assert scores.unique().numel() == 1


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(side, value):
    features = [*_features(4, 6, [1] * 6)]
    features[side][2, 3] = value  # NaN compares false with everything: it would rank first
    with pytest.raises(UserError, match="1 of 6 rows"):
        retrieval_metrics(*features)


def test_wrong_owners_are_refused():
    image, text, _ = _features(5, 3, [1, 1, 1])
    with pytest.raises(UserError, match="image 3"):
        retrieval_metrics(image, text, torch.tensor([0, 1, 3]))
    with pytest.raises(UserError, match="needs captions"):
        retrieval_metrics(image, text[:0], torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("towards", [-torch.inf, torch.inf])
def test_a_positive_ties_with_itself_however_its_sum_was_rounded(monkeypatch, towards):
    image, text, owner = _features(6, 30, [2] * 30)
    want = retrieval_metrics(image, text, owner)
    plain = retrieval.paired_similarities
    monkeypatch.setattr(
        retrieval, "paired_similarities", lambda *pair: torch.nextafter(plain(*pair), torch.tensor(towards))
    )
    assert retrieval_metrics(image, text, owner) == want
