"""The evaluations as the training loop and the command line call them: towers and a reader in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_tools.errors import UserError
from pretrain.evaluate import pairs as minimal_pairs
from pretrain.evaluate.classes import renumber
from pretrain.evaluate.classification import ClassCounts, class_embeddings
from pretrain.evaluate.features import CorpusFeatures, Encode, Progress, Ranks, counted, encode_corpus
from pretrain.evaluate.pair_loss import LOSS_BATCH, PairLoss, validation_loss
from pretrain.evaluate.retrieval import retrieval_chance, retrieval_metrics
from pretrain.process.watchdog import heartbeat


@dataclass(frozen=True)
class Outcome:
    """Result of an evaluation, the same on every rank.

    `metrics`: name -> value; `chance`: what a random model gets, under the same names; `counts`: what was evaluated;
    `breakdown`: the same numbers by class or by kind of pair; `features`: of a retrieval, for pictures.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    counts: dict[str, int]
    breakdown: list[dict] | None = None
    features: CorpusFeatures | None = field(default=None, repr=False, compare=False)


def evaluate_retrieval(
    encode: Encode,
    reader: Iterable,
    ranks: Ranks,
    num_images: int,
    objective: PairLoss | None = None,
    loss_batch: int = LOSS_BATCH,
    progress: Progress | None = None,
) -> Outcome:
    """Multi-caption retrieval over the reader's corpus. Every rank must call it.

    Args:
        encode: `encode(images | None, texts | None)` -> unit-norm features or None of each, in evaluation mode: a
            DualEncoder or a DeepSpeed engine around it.
        reader: the rank's `EvalReader`.
        num_images: samples of the corpus (`corpus.num_samples`).
        objective: adds its value as `validation_loss` over batches of `loss_batch`.
        progress: called after each batch with the images that this rank has done.
    """
    features = encode_corpus(encode, reader, num_images, ranks, progress)
    metrics = retrieval_metrics(
        features.images, features.texts, features.text_image, rank=ranks.rank, world_size=ranks.world_size
    )
    counts = {"images": num_images, "texts": len(features.texts)}
    if objective is not None:
        metrics["validation_loss"] = validation_loss(features, objective, ranks, loss_batch)
        counts["loss_batch"] = min(loss_batch, len(features.first_captions()[0]))
    return Outcome(metrics, retrieval_chance(num_images, features.text_image), counts, features=features)


def check_classes(classes: Sequence[str], labelled: bool = True) -> None:
    """Raises UserError for a corpus that cannot be classified: fewer than two classes, or no labels."""
    if len(classes) < 2:
        raise UserError(
            "zero-shot classification needs class names",
            got=f"{len(classes)} in the corpus",
            expected="two or more",
            remedy="pack it with labels, or give evaluate.py a file with one name a line, in their order (--classes)",
        )
    if not labelled:
        raise UserError("the corpus has no labels", expected="a `cls` member in each sample")


@torch.no_grad()
def evaluate_classification(
    encode: Encode,
    tokenize: Callable[[list[str]], torch.Tensor],
    reader: Iterable,
    classes: Sequence[str],
    templates: Sequence[str],
    ranks: Ranks,
    progress: Progress | None = None,
) -> Outcome:
    """Zero-shot classification with the class embeddings of `classes` x `templates`. Every rank must call it.

    Raises:
        UserError: fewer than two classes, a corpus without labels, labels without a class (on every rank).
    """
    check_classes(classes)
    embeddings = class_embeddings(encode, tokenize, classes, templates, ranks)
    hits = ClassCounts.zeros(len(classes), embeddings.device)
    for batch in counted(reader, progress):
        check_classes(classes, "label" in batch.inputs)
        real = batch.positions >= 0
        features = encode(batch.inputs["image"]["pixels"], None)[0].float()
        hits.add(
            features[real.to(features.device)], batch.inputs["label"]["class"][real].to(features.device), embeddings
        )
    return _accuracies(hits, classes, ranks, {"templates": len(templates)})


@torch.no_grad()
def evaluate_classifier(
    scores: Callable[[torch.Tensor], torch.Tensor],
    reader: Iterable,
    classes: Sequence[str],
    ranks: Ranks,
    numbers: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Accuracy of a trained classifier, and its cross-entropy as `validation_loss`. Every rank must call it.

    Args:
        scores: images uint8 [n, 3, h, w] on the device -> class scores [n, classes].
        classes: their names, in the order of the scores.
        numbers: int64 [classes of the corpus], what the model calls each label (`classes.class_numbers`); None: labels
            are numbers in the model's own order.

    Raises:
        UserError: a corpus without labels, labels without a class (on every rank).
    """
    hits, loss = (
        ClassCounts.zeros(len(classes), ranks.device),
        torch.zeros((), dtype=torch.float64, device=ranks.device),
    )
    for batch in counted(reader, progress):
        heartbeat()
        check_classes(classes, "label" in batch.inputs)
        real = batch.positions >= 0
        found = scores(batch.inputs["image"]["pixels"].to(ranks.device, non_blocking=True)).float()
        found = found[real.to(found.device)]
        labels = renumber(batch.inputs["label"]["class"][real], numbers).to(found.device)
        hits.add_scores(found, labels)
        fit = (labels >= 0) & (labels < len(classes))  # others are an error once all ranks know of them
        loss += F.cross_entropy(found[fit].double(), labels[fit], reduction="sum")
    if ranks.world_size > 1:
        dist.all_reduce(loss)
    outcome = _accuracies(hits, classes, ranks, {})
    outcome.metrics["validation_loss"] = loss.item() / outcome.counts["images"]
    outcome.chance["validation_loss"] = math.log(len(classes))
    return outcome


def _accuracies(hits: ClassCounts, classes: Sequence[str], ranks: Ranks, counts: dict[str, int]) -> Outcome:
    hits.merge(ranks.world_size)
    metrics = hits.metrics()
    known = {"top1": 1 / len(classes), "top5": min(5 / len(classes), 1.0), "mean_per_class": 1 / len(classes)}
    return Outcome(
        metrics,
        {name: known[name] for name in metrics},
        {"images": int(hits.images.sum()), "classes": len(classes), **counts},
        hits.per_class(classes),
    )


def evaluate_pairs(
    encode: Encode,
    reader: Iterable,
    pairs: minimal_pairs.MinimalPairs,
    ranks: Ranks,
    num_images: int,
    progress: Progress | None = None,
) -> Outcome:
    """Accuracy on minimal pairs (`pairs.read_pairs`). Every rank must call it."""
    features = encode_corpus(encode, reader, num_images, ranks, progress)
    metrics = minimal_pairs.pair_metrics(features, pairs.positions)
    count = len(pairs.kinds)
    by_kind = minimal_pairs.metrics_by_kind(features, pairs)
    return Outcome(metrics, dict(minimal_pairs.CHANCE), {"images": 2 * count, "pairs": count}, by_kind)
