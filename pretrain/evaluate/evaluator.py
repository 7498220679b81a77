"""What an evaluator is, and how a run calls all of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.corpus import Corpus
from data_tools.errors import UserError
from pretrain.evaluate import EVALUATORS, OF_CLASSIFIERS, EvaluatorConfig, prefix_of
from pretrain.evaluate.bench import Bench, Forward
from pretrain.evaluate.features import CorpusFeatures
from pretrain.evaluate.overlap import remark


@dataclass(frozen=True)
class Outcome:
    """Result of an evaluation, the same on every rank.

    `metrics`: name -> value; `chance`: what a random model gets, under the same names; `counts`: what was evaluated;
    `breakdown`: the same numbers by class or by kind of pair; `features`: for pictures.
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    counts: dict[str, int]
    breakdown: list[dict] | None = None
    features: CorpusFeatures | None = field(default=None, repr=False, compare=False)


class Evaluator(ABC):
    """A corpus and what is measured on it. All ranks must build it, and call it.

    It looks into its corpus when it is built, so that what is wrong with that ends a run at its start. `remarks`: lines
    for the user; `shown`: the settings that a record of results names; `decisive`: what else than model, corpus and
    precision the numbers follow from, which goes into the key of the record.

    Raises:
        UserError: a corpus that cannot be opened, or lacks what is needed; a model that cannot be asked.
    """

    def __init__(self, settings: EvaluatorConfig, bench: Bench):
        if bench.classes and not settings.OF_CLASSIFIERS:
            raise UserError(
                f"a fine-tuned classifier cannot be asked for {settings.type}",
                expected=" or ".join(OF_CLASSIFIERS),
                remedy="evaluate the pretraining run it started from",
            )
        self.settings, self.bench = settings, bench
        self.corpus: Corpus = bench.corpus(settings.data)
        self.remarks: list[str] = []
        self.shown: dict[str, Any] = {}
        self.decisive: dict[str, Any] = {}

    @abstractmethod
    def __call__(self, forward: Forward) -> Outcome:
        """Evaluate a model."""

    def draw(self, outcome: Outcome, path: Path, seed: int) -> None:
        """Write a PNG of an outcome of it, where its settings say that it draws; `seed` chooses what is shown. One rank
        calls it."""
        raise NotImplementedError


def build_evaluators(settings: Mapping[str, EvaluatorConfig], bench: Bench) -> dict[str, Evaluator]:
    """The evaluators of these settings, by name. All ranks must call it."""
    return {name: build_evaluator(own, bench) for name, own in settings.items()}


def build_evaluator(settings: EvaluatorConfig, bench: Bench) -> Evaluator:
    """The evaluator of these settings. All ranks must call it."""
    return EVALUATORS[settings.type].load()(settings, bench)


def remarks_of(evaluators: Mapping[str, Evaluator], trained: Corpus) -> list[str]:
    """What the user should know of them before they run: their own remarks, and which of them look at shards of
    `trained`."""
    overlaps = [remark(f"evaluators.{name}", one.corpus, trained) for name, one in evaluators.items()]
    return [line for one in evaluators.values() for line in one.remarks] + list(filter(None, overlaps))


def run_evaluators(evaluators: Mapping[str, Evaluator], forward: Forward) -> dict[str, float]:
    """The metrics of all of them, by the names that the log has. All ranks must call it."""
    values: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        prefix = prefix_of(name, evaluator.settings)
        values |= {prefix + metric: value for metric, value in evaluator(forward).metrics.items()}
    return values
