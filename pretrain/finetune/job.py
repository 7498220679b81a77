"""The classification job: labelled images, cross-entropy, top-1 and top-5."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from data_tools.redaction import redact_source
from pretrain import assemble
from pretrain.config.batch import local_batch
from pretrain.config.recorded import recorded
from pretrain.engine.backward import backward
from pretrain.engine.checkpoint import Extras
from pretrain.engine.committed import SETTINGS
from pretrain.engine.engine import Engine
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import describe, restore_optimizer
from pretrain.evaluate.classes import class_numbers
from pretrain.evaluate.overlap import remark
from pretrain.evaluate.runner import check_classes, evaluate_classifier
from pretrain.finetune.classifier import build_classifier, resumed_classifier, wanted_spec
from pretrain.finetune.labels import check_labels, set_classes
from pretrain.objectives import ClassesConfig
from pretrain.objectives.objective import build
from pretrain.pretraining import evaluating
from pretrain.process.runtime import Runtime
from pretrain.stream.batches import Batch
from pretrain.stream.fields.field import micro_batches
from pretrain.tasks import ClassifyConfig
from pretrain.towers.adapt import described
from pretrain.towers.classifier import SCORES, scores_of
from pretrain.towers.model import Inputs, to_device


class Prepared:
    """What a fine-tune has before it takes its run folder: classes, evaluation corpus, classifier and stream. All ranks
    must build it.

    Raises:
        UserError: whatever is wrong with the corpora, with the checkpoint or, without one, with `init`.
    """

    def __init__(self, config: ClassifyConfig, reader: CheckpointReader | None, runtime: Runtime):
        sources = set_classes(assemble.train_sources(config.data), config.classes)
        self.classes = sources[0].corpus.classes
        self.evaluated = config.eval.classification and assemble.eval_corpus(config.eval.classification, config.data)
        self.numbers: torch.Tensor | None = None  # of the evaluated corpus's labels, where it names its classes
        if self.evaluated and self.evaluated.classes:
            what = f"eval.classification {redact_source(config.eval.classification)}"
            self.numbers = class_numbers(self.evaluated.classes, self.classes, what)
        check_labels(sources, runtime)
        if reader is None:
            self.model, self.lines = build_classifier(config, self.classes, runtime)
        else:
            self.model, self.lines = resumed_classifier(config, reader), []
        self.lines += filter(None, [self.model.towers.silenced])
        spec = wanted_spec(config, self.model.spec)
        dropped = self.model.towers.patch_shares[-1]
        fields = assemble.label_fields(config, spec, len(self.classes), dropped)
        self.stream = assemble.train_stream(config, sources, fields, runtime)
        self.reader = self.evaluated and assemble.eval_reader(config, self.evaluated, spec, False, runtime)
        if self.reader:
            check_classes(self.classes, self.reader.labelled)
        if self.evaluated and (warning := remark("eval.classification", self.evaluated, self.stream.corpus)):
            self.lines.append(warning)
        head = {"classes": list(self.classes), "scale": self.model.scale}
        self.description = describe(spec, head=head, **described(config.added()))


class FinetuneJob:
    """See `pretrain.train.Job`. All ranks must build it."""

    def __init__(self, config: ClassifyConfig, runtime: Runtime):
        config = assemble.settle_precision(config, runtime)
        reader = assemble.find_checkpoint(config, runtime)
        if reader is not None and config.init is None:  # what it started from stays on record
            config = replace(config, init=recorded(reader.folder / SETTINGS, "init"))
        self.config, self.runtime = config, runtime
        self.micro_batch = config.train.micro_batch or local_batch(config, runtime.world_size)
        parts = Prepared(config, reader, runtime)
        model, self.stream = parts.model, parts.stream
        self.classes, self._reader, self._numbers = parts.classes, parts.reader, parts.numbers
        self.objectives = build({"classes": ClassesConfig()})
        self.extras = Extras(parts.description, assemble.resolved(config))
        self.state = assemble.start_state(reader, config, self.extras.model, self.stream, runtime)
        assemble.keep_settings(config, self.extras.config, runtime)
        if parts.lines and runtime.is_main:
            print("\n".join(parts.lines), flush=True)
        self.engine = Engine(model, config.optim, config.train, runtime)
        self.resumed_from = None if reader is None else reader.folder
        if reader is not None:
            restore_optimizer(self.engine, reader, self.state.updates)

    def forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of the mean cross-entropy of the global batch."""
        parts = self._micro_batches(batch)
        return backward(self.engine, parts, self.objectives, self.state.samples_seen)

    def diagnose(self, batch: Batch) -> list[str]:
        """Keys of this rank's images whose scores are not finite."""
        with torch.no_grad():
            parts = [to_device(inputs, self.runtime.device) for inputs in self._micro_batches(batch)]
            scores = [self.engine(inputs, SCORES)["local"]["classes"] for inputs in parts]
        return [batch.keys[row] for row in assemble.non_finite_rows([torch.cat(scores)])]

    def evaluate(self) -> dict[str, float]:
        """Accuracies and cross-entropy on eval.classification."""
        if not self._reader:
            return {}
        with evaluating(self.engine):
            scores = functools.partial(scores_of, self.engine)
            return evaluate_classifier(scores, self._reader, self.classes, self.runtime, self._numbers).metrics

    def _micro_batches(self, batch: Batch) -> list[Inputs]:
        """On the host, so that the device holds one micro-batch at a time."""
        return micro_batches(batch.inputs, self.micro_batch)
