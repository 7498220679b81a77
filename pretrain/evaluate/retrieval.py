"""Multi-caption zero-shot retrieval, by counting better candidates tile by tile.

The convention is CLIP_benchmark's: image to text is a hit if any of the image's captions is in the top K, text to
image if the caption's image is. Similarities, tie rule: `ranking.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from data_tools.media.members import parse_fields
from pretrain.evaluate import RetrievalConfig
from pretrain.evaluate.bench import Bench, Forward
from pretrain.evaluate.evaluator import Evaluator, Outcome
from pretrain.evaluate.features import encode_corpus
from pretrain.evaluate.pair_loss import validation_loss
from pretrain.evaluate.picture import write_retrieval_picture
from pretrain.evaluate.ranking import (
    RECALLS,
    Tied,
    hit_probability,
    paired_similarities,
    recall_and_rank,
    require_finite,
    similarities,
)
from pretrain.objectives import of_features


class Retrieval(Evaluator):
    """Multi-caption retrieval over a corpus, and the value there of the objectives over pairs that the bench has."""

    def __init__(self, settings: RetrievalConfig, bench: Bench):
        super().__init__(settings, bench)
        self._captions, self._loss_batch = settings.captions, settings.loss_batch
        self._reader = bench.reader(self.corpus, texts=True, captions=settings.captions)
        self.shown = {"loss_batch": settings.loss_batch}
        if settings.captions is not None:
            self.shown["captions"] = settings.captions
        self.decisive = self.shown

    def __call__(self, forward: Forward) -> Outcome:
        """See `Evaluator`."""
        ranks, count = self.bench.runtime, self.corpus.num_samples
        features = encode_corpus(self.bench, forward, self._reader, count, "retrieval")
        metrics = retrieval_metrics(
            features.images, features.texts, features.text_image, rank=ranks.rank, world_size=ranks.world_size
        )
        counts = {"images": count, "texts": len(features.texts)}
        objectives = of_features(self.bench.objectives)
        if objectives:
            metrics["validation_loss"] = validation_loss(features, objectives, ranks, self._loss_batch)
            counts["loss_batch"] = min(self._loss_batch, len(features.first_captions()[0]))
        return Outcome(metrics, retrieval_chance(count, features.text_image), counts, features=features)

    def draw(self, outcome: Outcome, path: Path, seed: int) -> None:
        """Captions with the images that are found for them."""
        assert outcome.features is not None
        fields = parse_fields(None, self._captions)
        write_retrieval_picture(path, outcome.features, self.corpus, seed=seed, fields=fields)


def retrieval_metrics(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    text_image: torch.Tensor,
    rank: int = 0,
    world_size: int = 1,
    block: int = 1024,
    recalls: Sequence[int] = RECALLS,
) -> dict[str, float]:
    """Recall@K and median rank in both directions. Every rank must call it, with the same features.

    Returns:
        `image_to_text_recall@K`, `text_to_image_recall@K` (0..1), `image_to_text_median_rank`,
        `text_to_image_median_rank` (from 1; of the best caption). Arguments and errors: see `count_candidates`.
    """
    counts = count_candidates(image_features, text_features, text_image, rank, world_size, block)
    to_text = recall_and_rank("image_to_text", counts.image_queries(), recalls)
    return to_text | recall_and_rank("text_to_image", counts.text_queries(), recalls)


def count_candidates(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    text_image: torch.Tensor,
    rank: int = 0,
    world_size: int = 1,
    block: int = 1024,
) -> Counts:
    """Where every query stands by cosine, in both directions. Every rank must call it, with the same features.

    A rank sweeps the tiles of its slice of the images once and counts for both directions; the counts are summed over
    the ranks, so every rank returns the same, the same at any world size and block. Memory: `block`^2.

    Args:
        image_features: [N, d], unit norm; images without a caption are candidates, but no queries.
        text_features: [M, d], unit norm.
        text_image: int64 [M], the image of each text.

    Raises:
        UserError: no texts, a text of an image that is not there, features that are not finite.
    """
    _check(image_features, text_features, text_image)
    counts = Counts(image_features, text_features, text_image)
    first, last = (len(image_features) * r // world_size for r in (rank, rank + 1))
    for start in range(first, last, block):
        counts.add_images(start, min(start + block, last), block)
    counts.merge(world_size)
    return counts


def retrieval_chance(num_images: int, text_image: torch.Tensor, recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """Recall@K of a model that orders at random, under the keys of `retrieval_metrics`."""
    captions = torch.bincount(text_image, minlength=num_images)
    captions = captions[captions > 0]
    none, one = torch.zeros_like(captions), torch.ones(1, dtype=torch.int64, device=captions.device)
    chance = {}
    for k in recalls:
        to_text = hit_probability(none, len(text_image) - captions, captions, k)
        to_image = hit_probability(none[:1], one * (num_images - 1), one, k)
        chance[f"image_to_text_recall@{k}"] = to_text.mean().item()
        chance[f"text_to_image_recall@{k}"] = to_image.item()
    return chance


class Counts:
    """Better and equal candidates of every query in both directions; equal includes the positives themselves.

    `own` [M]: the similarity of each text to its image; `best` [N]: of each image to the best of its texts, -inf where
    it has none; `asking` bool [N]: whether it has any.
    """

    def __init__(self, image_features: torch.Tensor, text_features: torch.Tensor, text_image: torch.Tensor):
        self.images, self.texts, self.text_image = image_features, text_features, text_image
        own = [
            paired_similarities(text_features[part], image_features[text_image[part]])
            for part in torch.arange(len(text_features), device=text_image.device).split(4096)
        ]
        self.own = torch.cat(own)
        lowest = torch.full((len(image_features),), -torch.inf, device=self.own.device)
        self.best = lowest.scatter_reduce(0, text_image, self.own, "amax")
        self.asking = torch.bincount(text_image, minlength=len(image_features)) > 0
        self.image_better, self.image_equal = self._zeros(len(image_features))
        self.text_better, self.text_equal = self._zeros(len(text_features))

    def _zeros(self, size: int) -> torch.Tensor:
        return torch.zeros((2, size), dtype=torch.int64, device=self.own.device)

    def add_images(self, start: int, stop: int, block: int) -> None:
        """Count the tiles of images start..stop against all texts."""
        for first in range(0, len(self.texts), block):
            last = min(first + block, len(self.texts))
            tile = similarities(self.images[start:stop], self.texts[first:last])
            mine = self.text_image[first:last]
            columns = torch.nonzero((mine >= start) & (mine < stop)).squeeze(1)
            # the same bits as the reference value, whatever the order of summation: a positive always ties with itself
            tile[mine[columns] - start, columns] = self.own[first:last][columns]
            best, own = self.best[start:stop, None], self.own[None, first:last]
            self.image_better[start:stop] += (tile > best).sum(dim=1)
            self.image_equal[start:stop] += (tile == best).sum(dim=1)
            self.text_better[first:last] += (tile > own).sum(dim=0)
            self.text_equal[first:last] += (tile == own).sum(dim=0)

    def merge(self, world_size: int) -> None:
        """Sum over ranks: images were counted by one rank each, texts by every rank against its images."""
        if world_size > 1:
            for count in (self.image_better, self.image_equal, self.text_better, self.text_equal):
                dist.all_reduce(count)

    def image_queries(self) -> Tied:
        """Of the images that have a caption."""
        at_best = (self.own == self.best[self.text_image]).long()
        positives = torch.zeros_like(self.image_equal).index_add(0, self.text_image, at_best)
        tied = Tied(self.image_better, self.image_equal - positives, positives)
        return Tied(*(values[self.asking] for values in tied))

    def text_queries(self) -> Tied:
        """Of the texts; the only positive is the text's image."""
        return Tied(self.text_better, self.text_equal - 1, torch.ones_like(self.text_equal))


def _check(image_features: torch.Tensor, text_features: torch.Tensor, text_image: torch.Tensor) -> None:
    if not len(text_features) or len(text_image) != len(text_features):
        raise UserError("retrieval needs captions and the image of each", got=f"{len(text_features)} captions")
    low, high = int(text_image.min()), int(text_image.max())
    if low < 0 or high >= len(image_features):
        raise UserError(
            "a caption belongs to an image that is not there",
            got=f"image {low if low < 0 else high}",
            expected=f"0 to {len(image_features) - 1}",
        )
    require_finite(image_features, "image")
    require_finite(text_features, "text")
