"""The evaluations of a run on its corpora. These are looked into at once, so that one that is missing, or has no
captions, labels or class names, is found at the start."""

from __future__ import annotations

import functools
import math

from data_tools.corpus import Corpus
from data_tools.redaction import redact_source
from pretrain.engine.engine import Engine
from pretrain.evaluate.classes import class_numbers
from pretrain.evaluate.features import Encode, encoder
from pretrain.evaluate.overlap import remark
from pretrain.evaluate.pair_loss import PairLoss
from pretrain.evaluate.runner import (
    check_classes,
    evaluate_classification,
    evaluate_classifier,
    evaluate_retrieval,
)
from pretrain.evaluate.templates import load_templates
from pretrain.process.runtime import Runtime
from pretrain.stream.sources import eval_corpus, eval_reader
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.needs import equipment_of
from pretrain.towers.adapt.order import merge
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import scores_of
from pretrain.towers.spec import ModelSpec


class PairEvaluations:
    """Of two towers: recall and the run's own loss on eval.retrieval, accuracy on eval.classification."""

    def __init__(self, config: ContrastiveConfig, runtime: Runtime, model: DualEncoder, trained: Corpus):
        self.config, self.model, self.runtime = config, model, runtime
        named = {"eval.retrieval": config.eval.retrieval, "eval.classification": config.eval.classification}
        corpora = {name: eval_corpus(urls, config.data) for name, urls in named.items() if urls}
        self._retrieval, self._classes = map(corpora.get, named)
        if self._retrieval:
            self._pairs = eval_reader(config, self._retrieval, model.spec, config.eval.captions, runtime)
        if self._classes:
            self._labelled = eval_reader(config, self._classes, model.spec, None, runtime)
            check_classes(self._classes.classes, self._labelled.labelled)
        self._templates = load_templates(config.eval.templates)
        found = (remark(name, corpus, trained) for name, corpus in corpora.items())
        self.remarks = list(filter(None, found))

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Metrics of all of them, and under `ema_` those of the moving average; all ranks must call it."""
        encode = encoder(self.model, self.runtime.device, forward=engine)
        scalars = engine.scalars()
        values = self._evaluate(
            encode, PairLoss(scalars["logit_scale"], scalars.get("logit_bias"), self.config.objectives)
        )
        if values and engine.ema is not None:
            average = DualEncoder(self.model.spec, self.model.rule.buckets)
            equipment_of(self.config.needs).give(average, seed=0)
            average.load_state_dict(merge(self.model.adapters, engine.ema.gathered()))
            average.to(self.runtime.device).eval()
            encode = encoder(average, self.runtime.device, self.config.train.precision)
            state = average.export_state()
            bias = float(state["logit_bias"]) if "logit_bias" in state else None
            loss = PairLoss(math.exp(state["logit_scale"]), bias, self.config.objectives)
            values |= {f"ema_{name}": value for name, value in self._evaluate(encode, loss).items()}
        return values

    def _evaluate(self, encode: Encode, loss: PairLoss) -> dict[str, float]:
        values: dict[str, float] = {}
        if self._retrieval:
            count = self._retrieval.num_samples
            values |= evaluate_retrieval(encode, self._pairs, self.runtime, count, loss).metrics
        if self._classes:
            tokenize, names, templates = self.model.tokenize, self._classes.classes, self._templates
            outcome = evaluate_classification(encode, tokenize, self._labelled, names, templates, self.runtime)
            values |= {f"zero_shot_{name}": value for name, value in outcome.metrics.items()}
        return values


class ClassEvaluation:
    """Of a classifier with these `classes`: accuracies and cross-entropy on eval.classification."""

    def __init__(
        self, config: ClassifyConfig, runtime: Runtime, classes: tuple[str, ...], spec: ModelSpec, trained: Corpus
    ):
        self.remarks: list[str] = []
        self._runtime, self._classes, self._reader = runtime, classes, None
        self._numbers = None  # of the corpus's labels, where it names its classes
        if config.eval.classification is None:
            return
        corpus = eval_corpus(config.eval.classification, config.data)
        if corpus.classes:
            what = f"eval.classification {redact_source(config.eval.classification)}"
            self._numbers = class_numbers(corpus.classes, classes, what)
        self._reader = eval_reader(config, corpus, spec, None, runtime)
        check_classes(classes, self._reader.labelled)
        self.remarks += filter(None, [remark("eval.classification", corpus, trained)])

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Its metrics; all ranks must call it."""
        if self._reader is None:
            return {}
        scores = functools.partial(scores_of, engine)
        return evaluate_classifier(scores, self._reader, self._classes, self._runtime, self._numbers).metrics
