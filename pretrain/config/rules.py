"""The rules that settings must keep, and what follows from them: durations in steps, the batch of a rank."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from fractions import Fraction
from operator import attrgetter
from typing import Any

from data_tools.errors import UsageError
from pretrain.config.limits import break_rule, check_limits
from pretrain.config.tree import EvalConfig, FinetuneConfig, LossConfig, Phase, PretrainConfig, Source

_UNITS = ("epochs", "steps", "samples")
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_NUMBER = r"([0-9]{1,15}(?:_[0-9]{1,15}){0,5}(?:\.[0-9]{1,15})?(?:[eE][0-9]{1,2})?)"
_TIME = re.compile(rf"^\s*{_NUMBER}\s*(second|minute|hour)s?\s*$")
_STEPS = re.compile(r"^\s*([0-9]{1,15})(?:\s*-\s*([0-9]{1,15}))?\s*$")
_DURATION = re.compile(rf"^\s*{_NUMBER}\s*(epoch|step|sample)s?\s*$")
FOREVER = "forever"
ENDLESS = 1 << 62  # steps of a run without an end
_LONGEST = 10**12  # epochs, steps or samples: more than anyone trains, and no overflow anywhere
_MOST_PROFILED = 100
_OF_WHOLE_MATRICES = ("lamb", "muon")
PRECISIONS = ("auto", "fp32", "bf16")
LOSS_NAMES = ("infonce", "multi_positive", "sigmoid", "margin")  # those of pretrain/losses, which imports torch
TEMPLATE_NAMES = ("photo", "simple", "openai")  # of pretrain/evaluate/templates.py


def parse_duration(text: str, where: str) -> tuple[Fraction, str]:
    """`"3 epochs"` -> (3, "epochs"); units are epochs, steps and samples. `"forever"` -> (ENDLESS, "forever").

    Raises UsageError for anything else, `where` being the setting.
    """
    if text == FOREVER:
        return Fraction(ENDLESS), FOREVER
    match = _DURATION.match(str(text))
    if not match:
        raise UsageError(
            f"{where} is not a duration",
            got=repr(text),
            expected="a number and one of " + ", ".join(_UNITS),
            remedy="or forever" if where == _MAY_BE_ENDLESS else None,
        )
    number = Fraction(match[1])
    if number > _LONGEST:
        remedy = FOREVER if where == _MAY_BE_ENDLESS else None
        raise UsageError(f"{where} is too long", got=repr(text), expected=f"{_LONGEST:.0e} at most", remedy=remedy)
    return number, f"{match[2]}s"


def duration_steps(text: str, where: str, steps_per_epoch: int, global_batch: int) -> int:
    """A duration in optimizer steps, rounded up to a whole step. Raises UsageError."""
    number, unit = parse_duration(text, where)
    scale = {"epochs": Fraction(steps_per_epoch), "samples": Fraction(1, global_batch)}.get(unit, 1)
    return math.ceil(number * scale)


def parse_seconds(text: str, where: str) -> float:
    """`"20 minutes"` -> 1200.0; units are seconds, minutes and hours. Raises UsageError."""
    match = _TIME.match(str(text))
    if not match:
        raise UsageError(
            f"{where} is not a time", got=repr(text), expected="a number and one of " + ", ".join(_SECONDS)
        )
    return float(match[1]) * _SECONDS[f"{match[2]}s"]


def parse_steps(text: str, where: str) -> tuple[int, int]:
    """`"10-12"` -> (10, 12), and `"10"` -> (10, 10)."""
    match = _STEPS.match(str(text))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"{where} is not a range of steps", got=repr(text), expected="FIRST-LAST, such as 10-12")
    if last - first >= _MOST_PROFILED:
        raise UsageError(f"{where} is too long for a trace", got=repr(text), expected=f"{_MOST_PROFILED} steps at most")
    return first, last


CHOICES: dict[str, tuple] = {
    "run.resume": ("auto", "never"),
    "train.precision": PRECISIONS,
    "train.zero_stage": (0, 1, 2, 3),
    "train.grad_checkpointing": ("none", "image", "text", "both"),
    "optim.name": ("adamw", "lion", "lamb", "muon"),
    "optim.schedule": ("cosine", "constant"),
    "model.locked": ("none", "image", "text"),
    "loss.name": LOSS_NAMES,
    "loss.negatives": ("sum", "hardest"),
    "mode": ("linear", "full"),
}


def _names_classes(value: Any) -> bool:
    """Whether the setting `classes` can be meant: YAML reads yes, no and null as other things than names."""
    if isinstance(value, list):
        return all(isinstance(name, str | int) and not isinstance(name, bool) and str(name).strip() for name in value)
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool) and str(value) != "")


_RULES: dict[str, tuple[Callable[[Any], bool], str, str | None]] = {
    "data.train": (lambda v: len(v) > 0, "at least one source", "data.train=FOLDER"),
    "data.crop_scale": (lambda v: v[0] <= v[1], "0 < low <= high <= 1", None),
    "checkpoint.keep_best": (
        lambda v: v is None or v.startswith("-") or not v.endswith("loss"),
        "a metric of which more is better, or - and one of which less is",
        "put a minus before a loss: checkpoint.keep_best=-validation_loss",
    ),
    "guard.hang_timeout": (
        lambda v: v is None or 0 < parse_seconds(v, "guard.hang_timeout") <= 1500,
        "more than 0, at most 25 minutes, or null",
        "collectives end by themselves after 30 minutes, without stacks",
    ),
    "classes": (
        _names_classes,
        "a list of names, a file with one a line, a count, or null",
        "put quotes around names that YAML takes for something else (yes, no, null)",
    ),
}

_MAY_BE_ENDLESS = "train.duration"
_MAY_BE_ZERO = ("optim.warmup", "optim.cooldown")
DURATIONS = (
    "train.duration",
    "optim.warmup",
    "optim.cooldown",
    "log.every",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep_every",
)


def validate(config: PretrainConfig | FinetuneConfig) -> None:
    """Check every rule that needs no data and no ranks; raises UsageError naming field, value, rule and remedy."""
    for name, allowed in CHOICES.items():
        value = _value(config, name, allowed[0])
        if value not in allowed:
            near = difflib.get_close_matches(str(value), map(str, allowed), 1)
            remedy = f"did you mean {near[0]!r}?" if near else None
            break_rule(name, value, "one of " + ", ".join(map(str, allowed)), remedy)
    check_limits(config)
    for name, (holds, rule, remedy) in _RULES.items():
        value = _value(config, name, _ABSENT)
        if value is not _ABSENT and not holds(value):
            break_rule(name, value, rule, remedy)
    for name in DURATIONS:
        text = attrgetter(name)(config)
        if text is not None:
            _validate_duration(text, name)
    if config.profile.steps is not None:
        parse_steps(config.profile.steps, "profile.steps")
    if config.train.duration == FOREVER and config.optim.schedule != "constant":
        break_rule("optim.schedule", config.optim.schedule, "constant, because train.duration is forever")
    cooled = parse_duration(config.optim.cooldown, "optim.cooldown")[0] > 0
    if cooled and (config.optim.schedule != "constant" or config.train.duration == FOREVER):
        break_rule(
            "optim.cooldown",
            config.optim.cooldown,
            "0 steps, unless optim.schedule is constant and train.duration ends",
            "a run that went on forever cools down when it is resumed with a duration",
        )
    if config.train.offload_optimizer and config.train.zero_stage == 0:
        break_rule("train.offload_optimizer", True, "false at train.zero_stage=0", "set train.zero_stage=1")
    if config.train.compile and config.train.zero_stage == 3:
        rule = "0, 1 or 2 beside train.compile: at 3 a layer's weights come and go in hooks that a graph cannot hold"
        break_rule("train.zero_stage", 3, rule)
    if config.optim.name in _OF_WHOLE_MATRICES and config.train.zero_stage > 0:
        rule = f"0 at optim.name={config.optim.name}, which looks at whole matrices"
        break_rule("train.zero_stage", config.train.zero_stage, rule, "adamw and lion work at every stage")
    best = config.checkpoint.keep_best
    if best is not None and config.eval.retrieval is None and config.eval.classification is None:
        break_rule("checkpoint.keep_best", best, "an evaluation", "set eval.retrieval or eval.classification")
    if isinstance(config, FinetuneConfig):
        _validate_finetuning(config)
    if isinstance(config, PretrainConfig):
        _validate_loss(config.loss)
        if config.train.global_batch < 2:
            rule = ">= 2: the texts and images of the other pairs of a batch are what a pair is told apart from"
            break_rule(
                "train.global_batch", config.train.global_batch, rule, "without any the loss is 0 and nothing learns"
            )
        _validate_phases(config.model.phases)
        if config.model.locked != "none" and config.model.init is None:
            break_rule("model.locked", config.model.locked, "none without model.init", "set model.init")
        for name in (f"{config.model.locked}_lr", f"{config.model.locked}_weight_decay"):
            if getattr(config.optim, name, None) is not None:
                break_rule(f"optim.{name}", getattr(config.optim, name), "null for a tower that is locked")
    _validate_sources(config.data.train)


# Settings that fine-tuning shares with pretraining and would not heed, and their values where nothing is said.
_NOT_OF_FINETUNING = {
    "optim.ema": None,
    "optim.text_lr": None,
    "optim.text_weight_decay": None,
    "eval.retrieval": None,
    "eval.captions": EvalConfig.captions,
    "eval.templates": EvalConfig.templates,
    "data.word_dropout": 0.0,
}


def _validate_finetuning(config: FinetuneConfig) -> None:
    for name, silent in _NOT_OF_FINETUNING.items():
        _keep_silent(name, attrgetter(name)(config), silent, "in fine-tuning: labels, one tower, no average")
    if config.train.grad_checkpointing in ("text", "both"):
        break_rule("train.grad_checkpointing", config.train.grad_checkpointing, "none or image in fine-tuning")
    if config.train.global_batch < 2:
        break_rule("train.global_batch", config.train.global_batch, "2 or more in fine-tuning: one image has one class")


# Settings that some losses alone know, and those losses.
_OF_SOME_LOSSES = {
    "label_smoothing": ("infonce", "multi_positive"),
    "margin": ("margin",),
    "negatives": ("margin",),
    "temperature": ("infonce", "multi_positive", "sigmoid"),
    "learn_temperature": ("infonce", "multi_positive", "sigmoid"),
    "logit_bias": ("sigmoid",),
}


def _validate_loss(loss: LossConfig) -> None:
    for name, losses in _OF_SOME_LOSSES.items():
        if loss.name not in losses:
            _keep_silent(f"loss.{name}", getattr(loss, name), getattr(LossConfig, name), f"at loss.name={loss.name}")


def _keep_silent(name: str, value: object, silent: object, where: str) -> None:
    if value != silent:
        break_rule(name, value, f"{'null' if silent is None else silent} {where}")


def _validate_duration(text: str, name: str) -> None:
    number, unit = parse_duration(text, name)
    if number == 0 and name not in _MAY_BE_ZERO:
        break_rule(name, text, "> 0", "null switches it off" if name.startswith(("eval", "checkpoint")) else None)
    if unit == FOREVER and name != _MAY_BE_ENDLESS:
        break_rule(name, text, "a number and one of " + ", ".join(_UNITS))


def _validate_phases(phases: list[Phase]) -> None:
    for number, phase in enumerate(phases):
        name = f"model.phases.{number}"
        _validate_duration(phase.until, f"{name}.until")
        if phase.image_size is None and phase.patch_dropout is None:
            break_rule(name, None, "an image_size or a patch_dropout of its own", "take the phase out")


def _validate_sources(sources: list[Source]) -> None:
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        missing = f"data.train.{weighted.index(False)}.weight"
        break_rule(missing, None, "a weight for every source or for none", "without weights sizes and `repeat` decide")
    for number, source in enumerate(sources):
        name = f"data.train.{number}"
        if source.weight is not None and source.repeat != 1:
            break_rule(f"{name}.repeat", source.repeat, "1 beside a weight", "set one of the two")
        if source.choose not in ("random", "first"):
            break_rule(f"{name}.choose", source.choose, "random or first")
        if any(_reads(other) == _reads(source) for other in sources[:number]):
            break_rule(
                f"{name}.urls", source.urls, "not the corpus of a source before it", "repeat: 2 counts one twice"
            )


def _reads(source: Source) -> tuple:
    """What a source reads: two that read the same are one."""
    return source.urls, source.image, source.captions


_ABSENT = object()


def _value(config: object, name: str, absent: Any) -> Any:
    """The value at a dotted name, or `absent`: pretraining and fine-tuning do not share all sections."""
    try:
        return attrgetter(name)(config)
    except AttributeError:
        return absent


def local_batch(config: PretrainConfig | FinetuneConfig, world_size: int) -> int:
    """Pairs per rank and step; raises UsageError where the world size or the micro-batch does not fit."""
    check_world_size(config.train.global_batch, world_size)
    local = config.train.global_batch // world_size
    micro = config.train.micro_batch
    if micro is not None and local % micro:
        raise UsageError(
            "train.micro_batch does not divide the rank's share of the batch",
            got=f"{micro} for {local} pairs",
            expected="a divisor",
            remedy="train.micro_batch=null does it in one forward",
        )
    return local


def check_world_size(global_batch: int, world_size: int) -> None:
    """Raises UsageError where the ranks would hold unequal batches."""
    if global_batch % world_size == 0:
        return
    small = [n for n in range(1, math.isqrt(global_batch) + 1) if global_batch % n == 0]
    fitting = {*small, *(global_batch // n for n in small)}
    below, above = max(n for n in fitting if n < world_size), min((n for n in fitting if n > world_size), default=None)
    raise UsageError(
        f"the global batch {global_batch} is not divisible by the world size",
        got=f"{world_size} ranks",
        expected=f"{below} ranks" if above is None else f"{below} or {above} ranks",
        remedy=f"start with such a number of ranks, or set a global batch that {world_size} divides",
    )
