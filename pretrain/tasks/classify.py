"""The classification task: labelled images, and the image tower of a trained model with a head, which starts from its
text tower's class weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from data_tools.errors import UserError
from pretrain.config.recorded import recorded
from pretrain.engine.committed import SETTINGS
from pretrain.engine.opening import open_known, open_model, spec_of_description
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import classifier_of, describe
from pretrain.evaluate.bench import Bench
from pretrain.evaluate.classes import shown
from pretrain.evaluate.classification import class_embeddings
from pretrain.evaluate.templates import load_templates
from pretrain.objectives import ClassesConfig
from pretrain.process.runtime import Runtime
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.label import Label
from pretrain.stream.loader import FieldsOf
from pretrain.stream.sources import train_sources
from pretrain.tasks import ClassifyConfig
from pretrain.tasks.labels import check_labels, is_count, set_classes
from pretrain.tasks.paths import require_init
from pretrain.tasks.recipe import Recipe, bench_of
from pretrain.towers.adapt import described
from pretrain.towers.adapt.order import adapt, adapters_of
from pretrain.towers.allowed import Architecture
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.classifier import Classifier
from pretrain.towers.dropout import refuse_dropout
from pretrain.towers.initialise import initialise
from pretrain.towers.spec import ModelSpec, resolve_spec


def recipe(config: ClassifyConfig, reader: CheckpointReader | None, runtime: Runtime) -> Recipe:
    """See `Recipe`. Raises UserError for corpora that name no classes, or different ones."""
    if reader is not None and config.init is None:  # what it started from stays on record
        config = replace(config, init=recorded(reader.folder / SETTINGS, "init"))
    sources = set_classes(train_sources(config.data), config.classes)
    classes = sources[0].corpus.classes

    def fields(model: Classifier | None) -> FieldsOf:
        share = None if model is None else model.towers.patch_shares[-1]
        return label_fields(config, _spec(config, model, reader), len(classes), share)

    def start() -> tuple[Classifier, list[str]]:
        check_labels(sources, runtime)
        return build_classifier(config, classes, runtime)

    def resume(reader: CheckpointReader) -> Classifier:
        check_labels(sources, runtime)
        return resumed_classifier(config, reader)

    return Recipe(
        config=config,
        sources=sources,
        fields=fields,
        objectives={"classes": ClassesConfig()},
        start=start,
        resume=resume,
        describe=lambda model: describe(
            wanted_spec(config, model.spec),
            head={"classes": list(classes), "scale": model.scale},
            **described(config.added()),
        ),
        remarks=lambda model: [f"classes:  {len(classes)}: {shown(classes)}", *filter(None, [model.towers.silenced])],
        bench=lambda model: bench_of(config, runtime, model.towers, wanted_spec(config, model.spec), classes=classes),
    )


def label_fields(config: ClassifyConfig, spec: ModelSpec, classes: int, dropped: float | None = None) -> FieldsOf:
    """The fields of labelled images: a number below `classes`, and a picture. `dropped`: the share of patches left
    out; None: none ever."""
    settings = image_settings(spec, config.data)
    return lambda source, _: {"label": Label(classes), "image": Image(settings, source.mapping, dropped)}


def _spec(config: ClassifyConfig, model: Classifier | None, reader: CheckpointReader | None) -> ModelSpec:
    """What the images of a run are made for; without a model, by what the run goes on from or would start from."""
    if model is not None:
        return wanted_spec(config, model.spec)
    if reader is not None:
        return wanted_spec(config, spec_of_description(reader.model(), str(reader.folder)))
    init = require_init(config)
    if config.random:
        return wanted_spec(config, resolve_spec(init))
    found = open_known(init, config.init_ema, config.architecture).spec
    assert found is not None
    return wanted_spec(config, found)


def build_classifier(
    config: ClassifyConfig, classes: tuple[str, ...], runtime: Runtime
) -> tuple[Classifier, list[str]]:
    """The classifier of the settings and lines that say how it was initialised. All ranks must call it."""
    towers, lines = _towers(config)
    towers = towers.to(runtime.device).eval()
    scale = float(towers._scale().detach())
    if config.zero_shot_head and not config.random and not is_count(config.classes):
        bench = Bench(runtime, towers.spec, towers.rule)
        head = class_embeddings(bench, towers, classes, load_templates(config.templates))
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
    or be gone. Raises UserError where the checkpoint is of no classifier."""
    classifier = classifier_of(reader)
    if classifier is None:
        raise UserError(
            f"{reader.folder} was written by another model",
            got="a dual encoder, without classes",
            expected="a fine-tuned classifier",
            remedy="choose another run.dir",
        )
    adapt(classifier, adapters_of(config))
    return classifier.train()


def wanted_spec(config: ClassifyConfig, spec: ModelSpec) -> ModelSpec:
    """`spec` at the image size that the settings ask for."""
    return spec if config.image_size in (None, spec.image_size) else _with_size(spec, config.image_size)


def _towers(config: ClassifyConfig) -> tuple[DualEncoder, list[str]]:
    init = require_init(config)
    if config.random:
        model = build_model(init, config.seed)
        return model, [f"random initialisation of {init}, seed {config.seed}", *model.started]
    trained, report = open_model(init, config.init_ema, config.architecture)
    if trained.heads:
        report.notes = [*report.notes, f"Heads that stay behind: {', '.join(trained.heads)}."]
    trained.heads.clear()  # nothing asks them here, and what is saved is described without them
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
    model_cfg: Architecture = {**spec.model_cfg, "vision_cfg": {**spec.model_cfg["vision_cfg"], "image_size": size}}
    return replace(spec, model_cfg=model_cfg, preprocess_cfg={**spec.preprocess_cfg, "size": size})
