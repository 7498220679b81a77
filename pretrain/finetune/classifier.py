"""Where a classifier starts: the image tower of a trained model, the head from its text tower's class weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.engine.opening import open_model
from pretrain.evaluate.classification import class_embeddings
from pretrain.evaluate.templates import load_templates
from pretrain.finetune.labels import is_count
from pretrain.process.runtime import Runtime
from pretrain.tasks import ClassifyConfig
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.classifier import Classifier
from pretrain.towers.dropout import refuse_dropout
from pretrain.towers.initialise import initialise


def build_classifier(
    config: ClassifyConfig, classes: tuple[str, ...], runtime: Runtime
) -> tuple[Classifier, list[str]]:
    """The classifier of the settings and lines that say how it was initialised. All ranks must call it."""
    towers, lines = _towers(config)
    lines += filter(None, [towers.silenced])
    towers.set_grad_checkpointing(config.train.grad_checkpointing)
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
    classifier = Classifier(towers, classes, head.cpu(), scale, config.mode == "full")
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    lines.append(f"mode {config.mode}: {trained} parameters learn")
    return classifier.train(), lines  # the towers gave class weights in evaluation mode


def _towers(config: ClassifyConfig) -> tuple[DualEncoder, list[str]]:
    if config.random:
        model = build_model(config.init, config.seed)
        return model, [f"random initialisation of {config.init}, seed {config.seed}", *model.started]
    trained, report = open_model(config.init, config.init_ema, config.architecture)
    if config.architecture and config.architecture.endswith(".json"):
        refuse_dropout(trained.spec, config.architecture, hashed=trained.patch_dropout is not None)
    if config.image_size is None or config.image_size == trained.spec.image_size:
        return trained, [str(report)]
    resized = DualEncoder(_with_size(trained.spec, config.image_size))
    again = initialise(resized, trained.export_state(), report.source)
    again.notes = report.notes
    return resized, [str(again)]


def _with_size(spec, size: int):
    model_cfg = {**spec.model_cfg, "vision_cfg": {**spec.model_cfg["vision_cfg"], "image_size": size}}
    return replace(spec, model_cfg=model_cfg, preprocess_cfg={**spec.preprocess_cfg, "size": size})
