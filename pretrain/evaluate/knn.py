"""k-NN classification of frozen features: labelled images, the bank, vote for the class of the images nearest to them.

As in Wu et al. (arXiv 1805.01978) and DINO (arXiv 2104.14294): the k nearest by cosine vote with weight
exp(cosine / temperature). An image has no vote on itself: bank images of the same bytes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from data_tools.redaction import redact_source
from pretrain.evaluate import KNNConfig
from pretrain.evaluate.bench import Bench, Forward
from pretrain.evaluate.classes import class_numbers, renumber, shown
from pretrain.evaluate.classification import ClassCounts, places_of
from pretrain.evaluate.evaluator import Evaluator, Outcome
from pretrain.evaluate.features import in_corpus_order, without_padding
from pretrain.evaluate.nearest import Nearest
from pretrain.evaluate.ranking import require_finite, similarities
from pretrain.stream.eval_reader import EvalReader

QUERIES, BANK = 256, 4096  # similarities held at once
_PREFIX = "knn_"


class KNN(Evaluator):
    """Accuracies of labelled images by the votes of their nearest neighbours in a bank; where that is the same corpus,
    of each image by all others."""

    def __init__(self, settings: KNNConfig, bench: Bench):
        super().__init__(settings, bench)
        bank = settings.data if settings.train is None else settings.train
        self._train = bench.corpus(bank)
        self._alone = self._train.digest == self.corpus.digest  # features of one corpus serve as both
        self._k, self._temperature = settings.k, settings.temperature
        self._reader = _labelled(bench, self.corpus, settings.data)
        self._bank_reader = self._reader if self._alone else _labelled(bench, self._train, bank)
        self._check_k()
        self._numbers: torch.Tensor | None = None  # what the bank calls each label; None: the same
        found, known = self.corpus.classes, self._train.classes
        if found and known:
            what, remedy = f"the corpus {redact_source(settings.data)}", "pack both with the same class names"
            self._numbers = class_numbers(found, known, what, "the bank", remedy)
        elif found or known:
            named = shown((found or known)[:1])
            self.remarks.append(f"only one of data and train names its classes: label 0 is taken for {named} in both")
        if self._alone:
            self.remarks.append("the data are their own bank: each image is classified by the others (leave-one-out)")
        self._names = known or found
        self.shown = {"k": self._k, "temperature": self._temperature}
        numbers = None if self._numbers is None else self._numbers.tolist()
        self.decisive = {**self.shown, "train": self._train.digest, "numbers": numbers}
        if settings.train is not None:
            self.shown["train"] = redact_source(settings.train)

    def _check_k(self) -> None:
        others = self._train.num_samples - self._alone
        if self._k > others:
            raise UserError(
                "k is larger than the bank",
                got=f"k={self._k} and {others} images that may vote",
                remedy="lower k, or give a bank with more images (train)",
            )

    def __call__(self, forward: Forward) -> Outcome:
        """See `Evaluator`."""
        bench = self.bench
        bank = encode_labelled(bench, forward, self._bank_reader, self._train.num_samples, "k-NN bank")
        asked = bank
        if not self._alone:
            asked = encode_labelled(bench, forward, self._reader, self.corpus.num_samples, "k-NN")
        classes, bank_labels = bank.labels.unique(return_inverse=True)
        labels = self._among(renumber(asked.labels.cpu(), self._numbers).to(classes), classes)
        hits, blind = (ClassCounts.zeros(len(classes), torch.device("cpu")) for _ in range(2))
        hits.add_places(*self._places(asked, labels, bank, bank_labels, len(classes)), labels.cpu())
        blind.add_places(*_by_size(bank_labels.bincount(), labels), labels.cpu())
        return Outcome(
            _prefixed(hits.metrics()),
            _prefixed(blind.metrics()),
            {
                "images": len(labels),
                "train_images": len(bank_labels),
                "classes": len(classes),
                "images_in_train": int(torch.isin(asked.hashes, bank.hashes).sum()),
            },
            hits.per_class([self._name(number) for number in classes.tolist()]),
        )

    def _places(
        self, asked: Labelled, labels: torch.Tensor, bank: Labelled, bank_labels: torch.Tensor, classes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [Q] each, on the host: `places_of` all labels, of which every rank finds its share. Whole numbers are
        shared, so sums of parts of hits do not depend on the number of ranks."""
        ranks = self.bench.runtime
        places = torch.zeros((2, len(labels)), dtype=torch.int64, device=labels.device)
        first, last = (len(labels) * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
        for start in range(first, last, QUERIES):
            own = slice(start, min(start + QUERIES, last))
            found = nearest(asked.images[own], asked.hashes[own], bank, bank_labels, classes, self._k)
            places[:, own] = torch.stack(places_of(found.votes(self._temperature), labels[own]))
        if ranks.world_size > 1:
            dist.all_reduce(places)
        better, negatives = places.cpu()
        return better, negatives

    def _among(self, labels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The place in `classes`, sorted, of each label. Raises UserError, on every rank, where it has none."""
        places = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
        without = labels[classes[places] != labels]
        if len(without):
            names = [self._name(number) for number in without.unique().tolist()]
            raise UserError(
                f"the bank has no image of the classes of {len(without)} images",
                got=shown(names),
                expected=f"some of the bank's {len(classes)} classes",
                remedy="give a bank (train) that has images of all classes of the data",
            )
        return places

    def _name(self, number: int) -> str:
        return self._names[number] if number < len(self._names) else str(number)


@dataclass(frozen=True)
class Labelled:
    """A labelled corpus, the same on every rank, in its order: `images` fp32 [N, d]; `labels` int64 [N]; `hashes` int64
    [N], equal where two images are one."""

    images: torch.Tensor
    labels: torch.Tensor
    hashes: torch.Tensor


def encode_labelled(bench: Bench, forward: Forward, reader: EvalReader, num_images: int, what: str) -> Labelled:
    """Encode every image once. Every rank must call it; each makes the same number of forwards.

    Args:
        reader: this rank's, with labels.
        num_images: samples of the corpus.
        what: how progress, and a message about features, is called.

    Raises:
        UserError: on every rank, where features are not finite.
    """
    batches = []
    for batch in bench.batches(reader, num_images, what):
        features = bench.run(forward, {"image": batch.inputs["image"]})["rows"]["image"].float()
        columns = features, batch.inputs["label"]["class"], batch.identity["image"]
        batches.append(without_padding(batch.positions, *columns))
    found = Labelled(*in_corpus_order(batches, num_images, bench.runtime))
    require_finite(found.images, what)
    return found


def nearest(
    images: torch.Tensor,
    hashes: torch.Tensor,
    bank: Labelled,
    bank_labels: torch.Tensor,
    classes: int,
    k: int,
    block: int = BANK,
) -> Nearest:
    """The `k` images of the bank nearest to each of `images` [q, d], but for those of the same hash. Memory:
    q * (`block` + `classes` + k).

    Args:
        hashes: int64 [q] of the images.
        bank_labels: int64 [N], 0 to `classes` - 1.
    """
    found = Nearest.none(len(images), k, classes, images.device)
    for start in range(0, len(bank_labels), block):
        tile = slice(start, start + block)
        cosines = similarities(images, bank.images[tile])
        cosines.masked_fill_(hashes[:, None] == bank.hashes[tile], -torch.inf)
        found.add(cosines, bank_labels[tile])
    return found


def _by_size(sizes: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`places_of` labels on the host where each class scores its size: what is blind names the largest."""
    ordered = sizes.sort().values
    low, high = (torch.searchsorted(ordered, sizes, right=right) for right in (False, True))
    return (len(sizes) - high)[labels].cpu(), (high - low - 1)[labels].cpu()


def _labelled(bench: Bench, corpus: Corpus, urls: str) -> EvalReader:
    """Raises UserError where there are no labels."""
    reader = bench.reader(corpus)
    if not reader.labelled:
        raise UserError(
            f"the corpus {redact_source(urls)} has no labels",
            expected="a `cls` member in each sample",
            remedy="pack it with --label-column",
        )
    return reader


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {_PREFIX + name: value for name, value in metrics.items()}
