"""The contrastive task: two towers, images with their texts, losses over the pairs of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from pretrain.engine.opening import Opened, check_weights, open_weights
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import describe
from pretrain.process.runtime import Runtime
from pretrain.stream.fields import FIELDS
from pretrain.stream.fields.field import Field, FieldContext
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.text import Text
from pretrain.stream.loader import FieldsOf, StreamSource
from pretrain.stream.sources import train_sources
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.needs import equipment_of
from pretrain.tasks.recipe import Recipe, bench_of
from pretrain.towers.adapt import described
from pretrain.towers.adapt.order import adapt, adapters_of, merge
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.cut import TextRule
from pretrain.towers.initialise import InitReport, initialise
from pretrain.towers.logits import biased, set_logits, start_logits, warn_of_bias
from pretrain.towers.parts import tower_of
from pretrain.towers.spec import ModelSpec, resolve_spec, tokenizer_of


def recipe(config: ContrastiveConfig, reader: CheckpointReader | None, runtime: Runtime) -> Recipe:
    """See `Recipe`."""

    def fields(model: DualEncoder | None) -> FieldsOf:
        if model is None:
            return pair_fields(config, resolve_spec(config.model.name))
        return pair_fields(config, model.spec, model.rule, model.patch_shares)

    def start() -> tuple[DualEncoder, list[str]]:
        model = make_model(config)
        doubt = warn_of_bias(config.objectives, config.train.global_batch)
        return model, [*start_lines(model, config), *filter(None, [doubt])]

    return Recipe(
        config=config,
        sources=train_sources(config.data),
        fields=fields,
        objectives=config.objectives,
        start=start,
        resume=lambda _: make_model(config, fresh=False),
        describe=lambda model: describe(
            model.spec, **described(config.added()), **equipment_of(config.needs).described()
        ),
        remarks=lambda model: model.remarks(),
        bench=lambda model: bench_of(config, runtime, model, model.spec, objectives=config.objectives),
        average=partial(_average, config),
    )


def pair_fields(
    config: ContrastiveConfig, spec: ModelSpec, rule: TextRule | None = None, dropped: Sequence[float | None] = ()
) -> FieldsOf:
    """The fields of pairs: a caption, cut by `rule`, a picture, and what objectives need beside them. `dropped`: the
    share of patches that each phase and the time after them leaves out; None, or nothing given: none ever."""
    sizes = [phase.image_size for phase in config.model.phases]
    tokenize = tokenizer_of(spec)

    def fields(source: StreamSource, phase: int) -> dict[str, Field]:
        settings = image_settings(spec, config.data, [*sizes, None][phase])
        share, optional = dropped[phase] if dropped else None, config.data.optional
        text = Text(tokenize, source.mapping, source.choose, config.data.word_dropout, rule, "text" in optional)
        found: dict[str, Field] = {"text": text, "image": Image(settings, source.mapping, share, "image" in optional)}
        for name, own in config.needs.fields.items():
            context = FieldContext(name, source.mapping, source.choose, text, name in optional)
            found[name] = FIELDS[own.type].load().of(own, context)
        return found

    return fields


def make_model(config: ContrastiveConfig, fresh: bool = True) -> DualEncoder:
    """The towers of the settings, initialised from the seed and adapted. `fresh`: with what the architecture names for
    them to start from."""
    bias = biased(config.objectives)
    model = build_model(config.model.name, config.seed, config.model.text_buckets, bias, fresh)
    start_logits(model, config.objectives, config.train.global_batch)
    equipment_of(config.needs).give(model, config.seed)
    adapt(model, adapters_of(config))
    return model


def _average(config: ContrastiveConfig, model: DualEncoder, state: dict[str, Tensor]) -> DualEncoder:
    """Towers and heads like those of `model`, with `state`, into which what is added to them is merged."""
    average = DualEncoder(model.spec, model.rule.buckets)
    equipment_of(config.needs).give(average, config.seed)
    average.load_state_dict(merge(model.adapters, state))
    return average


def start_lines(model: DualEncoder, config: ContrastiveConfig) -> list[str]:
    """Give a fresh `model` what it starts from beside its seed; returns lines that say what was loaded."""
    return [*model.started, *([] if config.model.init is None else [str(load_init(model, config))])]


def load_init(model: DualEncoder, config: ContrastiveConfig) -> InitReport:
    """Give `model` the weights of `model.init`; returns what was loaded. Raises UserError where they do not fit."""
    assert config.model.init is not None
    opened = open_weights(config.model.init)
    notes = check_weights(opened, model.spec)
    report = initialise(model, opened.state, opened.took, _may_miss(model, config))
    report.notes = [*opened.notes, *notes, *_take_heads(model, opened)]
    if "logit_bias" in report.missing:
        start_logits(model, config.objectives, config.train.global_batch)
    else:
        set_logits(model, config.objectives)
    return report


def _take_heads(model: DualEncoder, opened: Opened) -> list[str]:
    """Give the heads of `model` the weights that `opened` has under their names, where these fit; a line of each."""
    lines = []
    for name, head in model.heads.items():
        found = {key: value for key, value in opened.heads.items() if key.startswith(f"{name}.")}
        state = {key.removeprefix(f"{name}."): value for key, value in found.items()}
        own = head.state_dict()
        fits = state.keys() == own.keys() and all(state[key].shape == own[key].shape for key in own)
        if fits:
            head.load_state_dict(state)
        lines.append(f"head {name}: {'loaded' if fits else 'starts at random'}")
    return lines


def _may_miss(model: DualEncoder, config: ContrastiveConfig) -> list[str]:
    """Tensors that model.init need not have: the bias of the sigmoid objective, and beside locked parts all others."""
    names = list(model.clip.state_dict()) if config.model.locked else []
    free = [name for name in names if tower_of(f"clip.{name}") not in config.model.locked]
    return free + ["logit_bias"] * biased(config.objectives)
