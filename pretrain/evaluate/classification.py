"""Accuracies of labelled images: zero-shot, where an image belongs to the class whose prompts lie nearest (CLIP, arXiv
2103.00020), or by the scores of a fine-tuned classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_tools.errors import UserError
from data_tools.redaction import redact_source
from pretrain.evaluate import ClassificationConfig
from pretrain.evaluate.bench import Bench, Forward
from pretrain.evaluate.classes import class_numbers, renumber, shown
from pretrain.evaluate.evaluator import Evaluator, Outcome
from pretrain.evaluate.ranking import hit_probability, require_finite, similarities
from pretrain.evaluate.templates import load_classes, load_templates
from pretrain.stream.eval_reader import EvalBatch
from pretrain.towers.classifier import SCORES

PROMPT_CHUNK = 256  # prompts in one forward
_PHOTO = ClassificationConfig().templates

Scores = Callable[[EvalBatch], torch.Tensor]  # a batch -> [n, C]


class Classification(Evaluator):
    """Accuracies on a labelled corpus: of a dual encoder zero-shot; of a fine-tuned classifier by its own scores, with
    its cross-entropy as `validation_loss`."""

    def __init__(self, settings: ClassificationConfig, bench: Bench):
        super().__init__(settings, bench)
        self._reader = bench.reader(self.corpus)
        names = load_classes(settings.classes) if settings.classes else self.corpus.classes
        check_classes(bench.classes or names, self._reader.labelled)
        self.classes: tuple[str, ...] = bench.classes or names
        self._numbers: torch.Tensor | None = None  # what a classifier calls each label; None: as the corpus does
        if not bench.classes:
            self._templates = load_templates(settings.templates)
            self.shown, self.decisive = {"templates": settings.templates}, {"prompts": (names, self._templates)}
            return
        if settings.templates != _PHOTO:
            raise UserError(
                "a fine-tuned classifier has no prompts, and templates belong to dual encoders",
                got=settings.templates,
                remedy="leave them out",
            )
        if names:
            self._numbers = class_numbers(names, bench.classes, f"the corpus {redact_source(settings.data)}")
        else:
            first = shown(bench.classes[:1])
            self.remarks.append(f"the data name no classes: labels are taken for the model's, 0 for {first}")
        self.decisive = {"numbers": None if self._numbers is None else self._numbers.tolist()}

    def __call__(self, forward: Forward) -> Outcome:
        """See `Evaluator`."""
        return self._by_scores(forward) if self.bench.classes else self._zero_shot(forward)

    def _zero_shot(self, forward: Forward) -> Outcome:
        embeddings = class_embeddings(self.bench, forward, self.classes, self._templates)

        def scores(batch: EvalBatch) -> torch.Tensor:
            features = self.bench.run(forward, {"image": batch.inputs["image"]})["rows"]["image"]
            return similarities(features.float(), embeddings)

        hits, _ = self._count(scores)
        return _accuracies(hits, self.classes, {"templates": len(self._templates)})

    def _by_scores(self, forward: Forward) -> Outcome:
        def scores(batch: EvalBatch) -> torch.Tensor:
            return self.bench.run(forward, {"image": batch.inputs["image"]}, SCORES)["local"]["classes"].float()

        hits, loss = self._count(scores)
        outcome = _accuracies(hits, self.classes, {})
        outcome.metrics["validation_loss"] = loss / outcome.counts["images"]
        outcome.chance["validation_loss"] = math.log(len(self.classes))
        return outcome

    def _count(self, scores: Scores) -> tuple[ClassCounts, float]:
        """The hits of all ranks, and the sum of the cross-entropies of what `scores` gives."""
        ranks = self.bench.runtime
        hits = ClassCounts.zeros(len(self.classes), ranks.device)
        loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for batch in self.bench.batches(self._reader, self.corpus.num_samples, "classification"):
            real = batch.positions >= 0
            found = scores(batch)
            found = found[real.to(found.device)]
            labels = renumber(batch.inputs["label"]["class"][real], self._numbers).to(found.device)
            hits.add_scores(found, labels)
            fit = (labels >= 0) & (labels < len(self.classes))  # others are an error once all ranks know of them
            loss += F.cross_entropy(found[fit].double(), labels[fit], reduction="sum")
        hits.merge(ranks.world_size)
        if ranks.world_size > 1:
            dist.all_reduce(loss)
        return hits, loss.item()


def check_classes(classes: Sequence[str], labelled: bool = True) -> None:
    """Raises UserError for a corpus that cannot be classified: fewer than two classes, or no labels."""
    if len(classes) < 2:
        raise UserError(
            "zero-shot classification needs class names",
            got=f"{len(classes)} in the corpus",
            expected="two or more",
            remedy="pack it with labels, or give a file with one name a line, in their order (--classes of "
            "launch/evaluate.py, evaluators.NAME.classes of a run)",
        )
    if not labelled:
        raise UserError("the corpus has no labels", expected="a `cls` member in each sample")


def _accuracies(hits: ClassCounts, classes: Sequence[str], counts: dict[str, int]) -> Outcome:
    metrics = hits.metrics()
    known = {"top1": 1 / len(classes), "top5": min(5 / len(classes), 1.0), "mean_per_class": 1 / len(classes)}
    return Outcome(
        metrics,
        {name: known[name] for name in metrics},
        {"images": int(hits.images.sum()), "classes": len(classes), **counts},
        hits.per_class(classes),
    )


def class_embeddings(bench: Bench, forward: Forward, classes: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """[C, d] fp32: per class the mean of its normalised prompt features, renormalised. Every rank must call it.

    Prompts are cut over the ranks in equal counts; the sums are fp64, so the ranks' number does not show.
    """
    ranks = bench.runtime
    prompts = [(index, template.replace("{c}", name)) for index, name in enumerate(classes) for template in templates]
    chunk = min(PROMPT_CHUNK, -(-len(prompts) // ranks.world_size))
    sums: torch.Tensor | None = None
    for start in range(chunk * ranks.rank, _round_up(len(prompts), chunk * ranks.world_size), chunk * ranks.world_size):
        mine = prompts[start : start + chunk]
        texts = [text for _, text in mine] + [prompts[0][1]] * (chunk - len(mine))
        encoded = bench.run(forward, {"text": bench.text_rows(bench.tokenize(texts))})["rows"]["text"]
        features = F.normalize(encoded.double(), dim=-1)[: len(mine)]
        if sums is None:
            sums = features.new_zeros((len(classes), features.shape[1]))
        sums.index_add_(0, torch.tensor([index for index, _ in mine], dtype=torch.int64, device=sums.device), features)
    assert sums is not None
    if ranks.world_size > 1:
        dist.all_reduce(sums)
    require_finite(sums, "prompt")
    return F.normalize(sums, dim=-1).float()


@dataclass
class ClassCounts:
    """Hits per class, summed over batches and then over ranks: fp64 [C] each, `invalid` labels beside them."""

    top1: torch.Tensor
    top5: torch.Tensor
    images: torch.Tensor
    invalid: torch.Tensor

    @classmethod
    def zeros(cls, num_classes: int, device: torch.device) -> ClassCounts:
        """Nothing counted yet."""
        sizes = (num_classes, num_classes, num_classes, 2)
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count images with `labels` int64 [n] by their `scores` [n, C].

        Faults are only counted here, for one rank alone must not raise while others wait in a collective.
        """
        fits = (labels >= 0) & (labels < scores.shape[1])
        finite = torch.isfinite(scores).all(dim=1)
        self.invalid += torch.stack([(~fits).sum(), (~finite).sum()])
        scores, labels = scores[fits & finite], labels[fits & finite]
        self.add_places(*places_of(scores, labels), labels)

    def add_places(self, better: torch.Tensor, negatives: torch.Tensor, labels: torch.Tensor) -> None:
        """Count images by where their label stands among the classes, see `places_of`; int64 [n] each."""
        one = torch.ones_like(better)
        for counts, k in ((self.top1, 1), (self.top5, 5)):
            counts.index_add_(0, labels, hit_probability(better, negatives, one, k))
        self.images.index_add_(0, labels, one.double())

    def merge(self, world_size: int) -> None:
        """Sum over the ranks. Every rank must call it.

        Raises:
            UserError: on every rank, where a label has no class or a feature was not finite.
        """
        if world_size > 1:
            for counts in (self.top1, self.top5, self.images, self.invalid):
                dist.all_reduce(counts)
        labels, features = self.invalid.long().tolist()
        if labels:
            raise UserError(
                f"{labels} images have a label that is no class",
                expected=f"0 to {len(self.images) - 1}",
                remedy="give the class names in the order of the labels (--classes FILE)",
            )
        if features:
            raise UserError(
                f"the features of {features} images are not finite", remedy="evaluate an earlier checkpoint"
            )

    def metrics(self) -> dict[str, float]:
        """`top1`, `top5` (above five classes only: with five it is 1 by definition) and `mean_per_class`.

        The mean is over classes that have images. Ties count as in `ranking.py`: a collapsed model gets 1 / C.
        """
        total, seen = self.images.sum(), self.images > 0
        metrics = {"top1": (self.top1.sum() / total).item()}
        if len(self.images) > 5:
            metrics["top5"] = (self.top5.sum() / total).item()
        metrics["mean_per_class"] = (self.top1[seen] / self.images[seen]).mean().item()
        return metrics

    def per_class(self, classes: Sequence[str]) -> list[dict]:
        """Name, images and top-1 accuracy of each class; accuracy is null without images."""
        rows = zip(classes, self.images.long().tolist(), self.top1.tolist(), strict=True)
        return [{"class": name, "n": n, "accuracy": hits / n if n else None} for name, n, hits in rows]


def places_of(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many classes score higher than the label, and how many others the same: int64 [n] each, of `scores` [n, C]
    and `labels` int64 [n]."""
    own = scores.gather(1, labels[:, None])
    return (scores > own).sum(dim=1), (scores == own).sum(dim=1) - 1


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
