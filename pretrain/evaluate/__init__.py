"""What can be evaluated: the settings of each evaluator, and where it stands. No torch.

An evaluator is a file, and an entry in EVALUATORS. Runs and `launch/evaluate.py` take it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pretrain.config.declare import Section, choice, number
from pretrain.config.registry import Entry
from pretrain.engine.places import check_corpus, check_file, check_templates


@dataclass(frozen=True)
class EvaluatorConfig(Section):
    """What a run evaluates, each under a name: `evaluators: {retrieval: {data: data/val}}`. Metrics of one that is
    called as its type keep their names, any other name stands before them: `zero_shot` makes `zero_shot_top1`."""

    type: str = "???"  # which evaluator; may be left out where the name says it
    data: str = "???"  # the corpus, like data.train.0.urls

    ABOUT: ClassVar[str] = ""  # one line of `launch/evaluate.py --help`
    OF_CLASSIFIERS: ClassVar[bool] = False  # whether a fine-tuned classifier can be asked
    DRAWS: ClassVar[bool] = False  # whether there is a picture of its outcome

    def metrics(self, classifier: bool) -> tuple[str, ...]:
        """The names that it may give to numbers, of a fine-tuned `classifier` or of a dual encoder."""
        return ()

    def check_paths(self) -> None:
        """Look at every path that it reads. Raises UserError where nothing is there."""
        check_corpus(self.data)


@dataclass(frozen=True)
class RetrievalConfig(EvaluatorConfig):
    """Recall and median rank in both directions, with all captions, and the loss. Of dual encoders."""

    type: str = choice("retrieval")
    captions: str | None = None  # where the texts are, as in data.train; null: json:captions;txt
    # Pairs in a batch of `validation_loss`, which grows with it.
    loss_batch: int = number(256, ge=2, le=2**20)

    ABOUT = "recall@1/5/10 and median rank in both directions, all captions; validation loss"
    DRAWS = True

    def metrics(self, classifier: bool) -> tuple[str, ...]:
        """See `EvaluatorConfig`."""
        ways = ("image_to_text", "text_to_image")
        ranks = ("recall@1", "recall@5", "recall@10", "median_rank")
        return (*(f"{way}_{rank}" for way in ways for rank in ranks), "validation_loss")


@dataclass(frozen=True)
class ClassificationConfig(EvaluatorConfig):
    """Accuracies of labelled images: zero-shot, or of a fine-tuned classifier, with its cross-entropy."""

    type: str = choice("classification")
    templates: str = "photo"  # zero-shot prompts: photo | simple | openai | a file, {c} for the class in each line
    classes: str | None = None  # a file with the names of the labels 0, 1, ..., one a line; null: those packed

    ABOUT = (
        "top-1 (top-5 above five classes), mean per class: zero-shot, or of a fine-tuned classifier, whose classes "
        "are matched to the data's by name"
    )
    OF_CLASSIFIERS = True

    def metrics(self, classifier: bool) -> tuple[str, ...]:
        """See `EvaluatorConfig`."""
        return ("top1", "top5", "mean_per_class", *(["validation_loss"] if classifier else []))

    def check_paths(self) -> None:
        """See `EvaluatorConfig`."""
        super().check_paths()
        check_templates(self.templates)
        check_file("class file", self.classes)


@dataclass(frozen=True)
class PairsConfig(EvaluatorConfig):
    """Minimal pairs (Winoground, arXiv 2204.03162): two images and two texts that differ in one binding. Of dual
    encoders."""

    type: str = choice("pairs")
    captions: str | None = None  # where the texts are, as in data.train; null: json:captions;txt

    ABOUT = "minimal pairs: nearer to the own caption than to the partner's, Winoground's scores"

    def metrics(self, classifier: bool) -> tuple[str, ...]:
        """See `EvaluatorConfig`."""
        accuracies = ("image_to_text_accuracy", "text_to_image_accuracy")
        return (*accuracies, "text_score", "image_score", "group_score")


@dataclass(frozen=True)
class KNNConfig(EvaluatorConfig):
    """k-NN classification of frozen image features (DINO, arXiv 2104.14294): labelled images vote for the class of the
    images that they are near to. No image votes on itself, by the hash of its bytes."""

    type: str = choice("knn")
    train: str | None = None  # the labelled corpus that votes, like data.train.0.urls; null: data itself, leave-one-out
    k: int = number(20, ge=1, le=2**14)  # neighbours that vote on an image
    temperature: float = number(0.07, gt=0.0, le=100.0)  # a neighbour's vote weighs exp(cosine / temperature)

    ABOUT = (
        "k-NN of frozen image features: top-1 (top-5 above five classes), mean per class, by the votes of the k "
        "nearest of a labelled corpus (train=SHARDS; without it each image is classified by all others of --data)"
    )
    OF_CLASSIFIERS = True

    def metrics(self, classifier: bool) -> tuple[str, ...]:
        """See `EvaluatorConfig`."""
        return ("knn_top1", "knn_top5", "knn_mean_per_class")

    def check_paths(self) -> None:
        """See `EvaluatorConfig`."""
        super().check_paths()
        if self.train is not None:
            check_corpus(self.train)


@dataclass(frozen=True)
class RerankedConfig(EvaluatorConfig):
    """Retrieval whose first candidates a fusion head puts into order. Of dual encoders trained with `match`."""

    type: str = choice("reranked")
    captions: str | None = None  # where the texts are, as in data.train; null: json:captions;txt
    candidates: int = number(16, ge=1, le=2**20)  # by cosine, of each image and each text, that the head judges

    ABOUT = "retrieval, with the first candidates in the order of the fusion head's judgement (objective match)"

    def metrics(self, classifier: bool) -> tuple[str, ...]:
        """See `EvaluatorConfig`."""
        plain = (name for name in RetrievalConfig().metrics(classifier) if "loss" not in name)
        return tuple(f"reranked_{name}" for name in plain)


EVALUATORS: dict[str, Entry[EvaluatorConfig]] = {
    "retrieval": Entry(RetrievalConfig, "pretrain.evaluate.retrieval:Retrieval"),
    "classification": Entry(ClassificationConfig, "pretrain.evaluate.classification:Classification"),
    "pairs": Entry(PairsConfig, "pretrain.evaluate.pairs:Pairs"),
    "knn": Entry(KNNConfig, "pretrain.evaluate.knn:KNN"),
    "reranked": Entry(RerankedConfig, "pretrain.evaluate.reranked:Reranked"),
}
OF_CLASSIFIERS = {name: entry for name, entry in EVALUATORS.items() if entry.settings.OF_CLASSIFIERS}


def prefix_of(name: str, settings: EvaluatorConfig) -> str:
    """What stands before the metrics of an evaluator that the user calls `name`."""
    return "" if name == settings.type else f"{name}_"


def metric_names(evaluators: Mapping[str, EvaluatorConfig], classifier: bool, averaged: bool) -> list[str]:
    """The metrics that these may give, those of the weights' moving average after them where it is `averaged`."""
    own = [prefix_of(name, one) + metric for name, one in evaluators.items() for metric in one.metrics(classifier)]
    return own + [f"ema_{name}" for name in own if averaged]
