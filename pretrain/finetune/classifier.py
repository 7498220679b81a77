"""Where a classifier starts: the image tower of a trained model, the head from its text tower's class weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from data_tools.errors import UserError
from pretrain.assemble import refuse_another_model
from pretrain.engine.opening import open_model
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import classifier_of
from pretrain.evaluate.classification import class_embeddings
from pretrain.evaluate.templates import load_templates
from pretrain.finetune.labels import is_count
from pretrain.places import require_init
from pretrain.process.runtime import Runtime
from pretrain.tasks import ClassifyConfig
from pretrain.towers.adapt import described
from pretrain.towers.adapt.order import adapt, adapters_of
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.classifier import Classifier
from pretrain.towers.dropout import refuse_dropout
from pretrain.towers.initialise import initialise
from pretrain.towers.spec import ModelSpec


def build_classifier(
    config: ClassifyConfig, classes: tuple[str, ...], runtime: Runtime
) -> tuple[Classifier, list[str]]:
    """The classifier of the settings and lines that say how it was initialised. All ranks must call it."""
    towers, lines = _towers(config)
    towers = towers.to(runtime.device).eval()
    scale = float(towers._scale().detach())
    if config.zero_shot_head and not config.random and not is_count(config.classes):
        head = class_embeddings(
            lambda _, texts: (None, towers.encode_text(texts)),
            towers.tokenize,
            classes,
            load_templates(config.templates),
            runtime,
        )
        lines.append(f"head of {len(classes)} classes from zero-shot text weights, templates {config.templates!r}")
    else:
        head = torch.zeros(len(classes), towers.spec.model_cfg["embed_dim"])
        lines.append(f"head of {len(classes)} classes from zeros")
    classifier = Classifier(towers, classes, head.cpu(), scale)
    adapt(classifier, adapters_of(config))
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    lines.append(f"mode {config.mode}: {trained} parameters learn")
    return classifier.train(), lines  # the towers gave class weights in evaluation mode


def resumed_classifier(config: ClassifyConfig, reader: CheckpointReader) -> Classifier:
    """The classifier that a run goes on with, all of it from the checkpoint: what `init` names may have changed since,
    or be gone. Raises UserError where the checkpoint is of no classifier, or of one with other adapters."""
    saved = reader.model()
    same = {name: value for name, value in saved.items() if name != "adapters"}
    refuse_another_model(reader.folder, saved, same | described(config.added()))
    classifier = classifier_of(reader, adapters_of(config))
    if classifier is None:
        raise UserError(
            f"{reader.folder} was written by another model",
            got="a dual encoder, without classes",
            expected="a fine-tuned classifier",
            remedy="choose another run.dir",
        )
    return classifier.train()


def wanted_spec(config: ClassifyConfig, spec: ModelSpec) -> ModelSpec:
    """`spec` at the image size that the settings ask for."""
    return spec if config.image_size in (None, spec.image_size) else _with_size(spec, config.image_size)


def _towers(config: ClassifyConfig) -> tuple[DualEncoder, list[str]]:
    require_init(config)
    if config.random:
        model = build_model(config.init, config.seed)
        return model, [f"random initialisation of {config.init}, seed {config.seed}", *model.started]
    trained, report = open_model(config.init, config.init_ema, config.architecture)
    if config.architecture and config.architecture.endswith(".json"):
        refuse_dropout(trained.spec, config.architecture, hashed=trained.patch_dropout is not None)
    wanted = wanted_spec(config, trained.spec)
    if wanted is trained.spec:
        return trained, [str(report)]
    resized = DualEncoder(wanted)
    again = initialise(resized, trained.export_state(), report.source)
    again.notes = report.notes
    return resized, [str(again)]


def _with_size(spec: ModelSpec, size: int) -> ModelSpec:
    model_cfg = {**spec.model_cfg, "vision_cfg": {**spec.model_cfg["vision_cfg"], "image_size": size}}
    return replace(spec, model_cfg=model_cfg, preprocess_cfg={**spec.preprocess_cfg, "size": size})
