"""The contrastive job: two towers, the image-text stream, the loss, retrieval and zero-shot classification."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data_tools.corpus import Corpus
from pretrain import assemble
from pretrain.config.batch import local_batch
from pretrain.engine.backward import backward
from pretrain.engine.checkpoint import Extras
from pretrain.engine.engine import Engine
from pretrain.engine.opening import check_weights, open_weights
from pretrain.engine.weights import describe, restore_optimizer
from pretrain.evaluate.features import Encode, encoder
from pretrain.evaluate.overlap import remark
from pretrain.evaluate.pair_loss import PairLoss
from pretrain.evaluate.runner import check_classes, evaluate_classification, evaluate_retrieval
from pretrain.evaluate.templates import load_templates
from pretrain.objectives.objective import build
from pretrain.process.runtime import Runtime
from pretrain.stream.batches import Batch
from pretrain.stream.fields.field import micro_batches
from pretrain.tasks import ContrastiveConfig
from pretrain.towers.adapt import described
from pretrain.towers.adapt.order import adapt, adapters_of, merge
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.initialise import InitReport, initialise
from pretrain.towers.logits import biased, set_logits, start_logits, warn_of_bias
from pretrain.towers.model import Inputs, to_device
from pretrain.towers.parts import tower_of


class PretrainJob:
    """See `pretrain.train.Job`. All ranks must build it."""

    def __init__(self, config: ContrastiveConfig, runtime: Runtime):
        config = assemble.settle_precision(config, runtime)
        self.config, self.runtime = config, runtime
        self.micro_batch = config.train.micro_batch or local_batch(config, runtime.world_size)
        reader = assemble.find_checkpoint(config, runtime)
        self.model = make_model(config, fresh=reader is None)
        spec = self.model.spec
        self.objectives = build(config.objectives)
        fields = assemble.pair_fields(config, spec, self.model.rule, self.model.patch_shares)
        self.stream = assemble.train_stream(config, assemble.train_sources(config.data), fields, runtime)
        self._evaluations = Evaluations(config, self.model, runtime)
        self.extras = Extras(
            describe(spec, **described(config.added()), **assemble.equipment_of(config.needs).described()),
            assemble.resolved(config),
        )
        self.state = assemble.start_state(reader, config, self.extras.model, self.stream, runtime)
        assemble.keep_settings(config, self.extras.config, runtime)
        if reader is not None:
            reader.load_into(self.model)
        else:
            lines = start_lines(self.model, config)
            if lines and runtime.is_main:
                print("\n".join(lines), flush=True)
        doubt = warn_of_bias(config.objectives, config.train.global_batch)
        if doubt and reader is None and runtime.is_main:
            print(doubt, flush=True)
        remarks = [*self.model.remarks(), *self._evaluations.remarks(self.stream.corpus)]
        if runtime.is_main and remarks:
            print("\n".join(remarks), flush=True)
        self.engine = Engine(self.model, config.optim, config.train, runtime)
        self.resumed_from = None if reader is None else reader.folder
        if reader is not None:
            restore_optimizer(self.engine, reader, self.state.updates)

    def forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of the global batch's loss; micro-batches turn the gradient cache on."""
        parts = self._micro_batches(batch)
        return backward(self.engine, parts, self.objectives, self.state.samples_seen)

    def diagnose(self, batch: Batch) -> list[str]:
        """Keys of this rank's pairs with a feature that is not finite."""
        with torch.no_grad():
            outputs = [self.engine(to_device(part, self.engine.device))["rows"] for part in self._micro_batches(batch)]
        features = [torch.cat([rows[field] for rows in outputs]) for field in outputs[0]]
        rows = assemble.non_finite_rows(features)
        return [batch.keys[row] for row in rows]

    def evaluate(self) -> dict[str, float]:
        """Recall and the run's own loss on eval.retrieval, accuracy on eval.classification."""
        return self._evaluations(self.engine)

    def _micro_batches(self, batch: Batch) -> list[Inputs]:
        if self.model.patch_dropout is not None:
            self.model.patch_dropout.prob = self.model.patch_shares[batch.phase]
        inputs = {field: {**rows, "identity": batch.identity[field]} for field, rows in batch.inputs.items()}
        return micro_batches(inputs, self.micro_batch)


def make_model(config: ContrastiveConfig, fresh: bool = True) -> DualEncoder:
    """The towers of the settings, initialised from the seed and adapted. `fresh`: with what the architecture names for
    them to start from."""
    bias = biased(config.objectives)
    model = build_model(config.model.name, config.seed, config.model.text_buckets, bias, fresh)
    start_logits(model, config.objectives, config.train.global_batch)
    assemble.equipment_of(config.needs).give(model, config.seed)
    adapt(model, adapters_of(config))
    return model


def start_lines(model: DualEncoder, config: ContrastiveConfig) -> list[str]:
    """Give a fresh `model` what it starts from beside its seed; returns lines that say what was loaded."""
    return [*model.started, *([] if config.model.init is None else [str(load_init(model, config))])]


def load_init(model: DualEncoder, config: ContrastiveConfig) -> InitReport:
    """Give `model` the weights of `model.init`; returns what was loaded. Raises UserError where they do not fit."""
    opened = open_weights(config.model.init)
    notes = check_weights(opened, model.spec)
    report = initialise(model, opened.state, opened.took, _may_miss(model, config))
    report.notes = opened.notes + notes
    if "logit_bias" in report.missing:
        start_logits(model, config.objectives, config.train.global_batch)
    else:
        set_logits(model, config.objectives)
    return report


def _may_miss(model: DualEncoder, config: ContrastiveConfig) -> list[str]:
    """Tensors that model.init need not have: the bias of the sigmoid objective, and beside locked parts all others."""
    names = list(model.clip.state_dict()) if config.model.locked else []
    free = [name for name in names if tower_of(f"clip.{name}") not in config.model.locked]
    return free + ["logit_bias"] * biased(config.objectives)


class Evaluations:
    """The evaluations of a run on its corpora. These are looked into at once, so that one that is missing, or has no
    captions, labels or class names, is found at the start."""

    def __init__(self, config: ContrastiveConfig, model: DualEncoder, runtime: Runtime):
        self.config, self.model, self.runtime = config, model, runtime
        self._retrieval = config.eval.retrieval and assemble.eval_corpus(config.eval.retrieval, config.data)
        self._classes = config.eval.classification and assemble.eval_corpus(config.eval.classification, config.data)
        self._pairs = self._retrieval and assemble.eval_reader(config, self._retrieval, model.spec, True, runtime)
        self._labelled = self._classes and assemble.eval_reader(config, self._classes, model.spec, False, runtime)
        if self._classes:
            check_classes(self._classes.classes, self._labelled.labelled)
        self._templates = load_templates(config.eval.templates)

    def remarks(self, trained: Corpus) -> list[str]:
        """A line on each corpus that holds shards of `trained`."""
        corpora = {"eval.retrieval": self._retrieval, "eval.classification": self._classes}
        return list(filter(None, (remark(name, corpus, trained) for name, corpus in corpora.items() if corpus)))

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Metrics of all of them, and under `ema_` those of the moving average; all ranks must call it."""
        with evaluating(engine):
            encode = encoder(self.model, self.runtime.device, forward=engine)
            scalars = engine.scalars()
            loss = PairLoss(scalars["logit_scale"], scalars.get("logit_bias"), self.config.objectives)
            values = self._evaluate(encode, loss)
            if values and engine.ema is not None:
                average = DualEncoder(self.model.spec, self.model.rule.buckets)
                assemble.equipment_of(self.config.needs).give(average, seed=0)
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


@contextmanager
def evaluating(engine: Engine) -> Iterator[None]:
    """Evaluation mode, no gradients; training mode again afterwards."""
    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.deepspeed.train()
