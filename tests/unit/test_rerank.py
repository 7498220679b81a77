"""Re-ranking against sorting by hand: the first K in the order of another score, and the others behind them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import UserError
from evaluate_fakes import FakeReader
from pretrain.evaluate import rerank
from pretrain.evaluate.ranking import Tied, recall_and_rank
from pretrain.evaluate.rerank import Judged, judge, places, reranked, top_candidates
from pretrain.evaluate.retrieval import count_candidates

IMAGES, K = 24, 5
OWNERS = torch.tensor([image for image in range(IMAGES) for _ in range(image % 4)])  # as FakeReader has them


def features(dim=6):
    g = torch.Generator().manual_seed(3)
    image, text = (F.normalize(torch.randn(n, dim, generator=g), dim=1) for n in (IMAGES, len(OWNERS)))
    return image, F.normalize(text + 0.7 * image[OWNERS], dim=1)


def scores():
    return torch.randn(IMAGES, len(OWNERS), generator=torch.Generator().manual_seed(4))


def by_hand(cosine, score, positive, k):
    """The rank from 1 of the best positive of each query that has one."""
    places = []
    for similar, judged, right in zip(cosine, score, positive, strict=True):
        if right.any():
            order = np.argsort(-similar)
            first = order[:k]
            order = np.concatenate([first[np.argsort(-judged[first])], order[k:]])
            places.append(1 + int(np.argmax(right[order])))
    return places


def run(image, text, table, k, world_size=1, batch=5):
    """Both directions' `Tied`, judged by a table, as ranks would that take turns."""
    to_text, to_image = top_candidates(image, text, k), top_candidates(text, image, k)
    judged = Judged(to_text, to_image)
    tokens = torch.tensor([[4 * image + own] for image in range(IMAGES) for own in range(image % 4)])
    row_of = {int(token): row for row, token in enumerate(tokens[:, 0])}
    asked = []

    def score(images, texts, pairs):
        assert len(pairs["image"]) == len(pairs["text"]) <= rerank.PAIRS
        at = images["pixels"][pairs["image"], 0, 0, 0].long()
        rows = torch.tensor([row_of[int(token)] for token in texts[pairs["text"], 0]])
        asked.extend(zip(at.tolist(), rows.tolist(), strict=True))
        return table[at, rows]

    for rank in range(world_size):
        judge(judged, FakeReader(IMAGES, batch, rank, world_size), tokens, score)
    assert len(asked) == len(set(asked)) == len(judged.codes)  # each pair once
    counts = count_candidates(image, text, OWNERS)
    return places(judged, to_text, to_image, OWNERS, counts)


@pytest.mark.parametrize("k", [1, K, 100])
@pytest.mark.parametrize("world_size", [1, 3])
def test_places_are_those_of_sorting(k, world_size, monkeypatch):
    monkeypatch.setattr(rerank, "PAIRS", 7)  # several forwards a batch
    (image, text), table = features(), scores()
    cosine, positive = (image @ text.T).numpy(), (OWNERS[None] == torch.arange(IMAGES)[:, None]).numpy()
    found = run(image, text, table, k, world_size)
    matrices = (cosine, table.numpy(), positive), (cosine.T, table.numpy().T, positive.T)
    for tied, matrix in zip(found, matrices, strict=True):
        assert (1 + tied.better).tolist() == by_hand(*matrix, k)
        assert tied.negatives.tolist() == [0] * len(tied.better)
        assert tied.positives.tolist() == [1] * len(tied.better)


def test_one_candidate_changes_nothing_and_the_cosine_itself_neither():
    image, text = features()
    for table, k in ((scores(), 1), (image @ text.T, K)):
        of_images, of_texts = run(image, text, table, k)
        counts = count_candidates(image, text, OWNERS)
        assert of_images.better.equal(counts.image_queries().better)
        assert of_texts.better.equal(counts.text_queries().better)


def test_scores_that_are_equal_stand_in_random_order():
    """A head that has learned nothing: among the first K every place is as likely."""
    image, text = features()
    of_images, of_texts = run(image, text, torch.full((IMAGES, len(OWNERS)), 0.3), K)
    counts = count_candidates(image, text, OWNERS)
    for tied, alone in ((of_images, counts.image_queries()), (of_texts, counts.text_queries())):
        within = alone.better < K
        assert within.any()
        assert not within.all()
        assert (tied.better[within] == 0).all()
        assert (tied.negatives + tied.positives)[within].tolist() == [K] * int(within.sum())
        assert tied.better[~within].equal(alone.better[~within])
        wanted = tied.positives[within].double() / K
        first = recall_and_rank("x", Tied(*(values[within] for values in tied)))["x_recall@1"]
        assert first == pytest.approx(wanted.mean().item())


def test_features_that_are_all_one_score_near_chance():
    """Which K of the equals are judged is drawn by hash: not the first ones, among which the right one may stand."""
    images = 400
    one = F.normalize(torch.ones(1, 8), dim=1)
    image = text = one.expand(images, -1)
    found = top_candidates(text, image, 40)
    assert all(len(set(row)) == 40 for row in found.rows.tolist())
    assert len({tuple(sorted(row)) for row in found.rows.tolist()}) == images
    right = found.rows == torch.arange(images)[:, None]
    assert right.any(dim=1).float().mean().item() == pytest.approx(0.1, abs=0.045)  # three deviations
    counts = count_candidates(image, text, torch.arange(images))
    tied = reranked(found, torch.zeros(images, 40), right, counts.text_queries(), counts.own)
    outside = ~right.any(dim=1)
    assert set(tied.better[outside].tolist()) == {40}
    assert set(tied.negatives[outside].tolist()) == {images - 40 - 1}


def test_candidates_are_the_same_in_any_tiles():
    image, text = features()
    whole = top_candidates(image, text, K)
    tiled = top_candidates(image, text, K, block=4)
    assert whole.rows.equal(tiled.rows)
    assert whole.cosines.equal(tiled.cosines)
    wanted = (image.double() @ text.double().T).float().topk(K, dim=1)
    assert whole.rows.equal(wanted.indices)
    assert whole.cosines.equal(wanted.values)


def test_scores_that_are_no_numbers_are_refused():
    image, text = features()
    table = scores()
    table[5] = torch.nan
    with pytest.raises(UserError, match="match"):
        run(image, text, table, K)
