"""What every single setting keeps to: numbers between two ends, texts that can be a name or a path."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from data_tools.errors import UsageError

_LONGEST = 4096  # characters of a text: the longest path of Linux
_NOT_IN_TEXTS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, halves of surrogate pairs
_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Limit:
    """The ends of a number; an end itself is allowed unless `above` or `below` shuts it out."""

    low: float
    high: float
    remedy: str | None = None
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies between the ends; what is not a number never does."""
        from_low = self.low < value if self.above else self.low <= value
        return from_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:g}" if isinstance(end, float) else end for end in (self.low, self.high))
        return f"{low} {'<' if self.above else '<='} value {'<' if self.below else '<='} {high}"


_SHARE = Limit(0, 1, below=True)
_PIXELS = Limit(1, 16384)
_RATE = Limit(1e-12, 100)
_DECAY = Limit(0, 100)
_PAIRS = Limit(1, 2**30)

# By dotted name, * for a place in a list. Every number of the tree has one.
LIMITS = {
    "seed": Limit(0, 2**64 - 1),
    "image_size": _PIXELS,
    "data.train.*.weight": Limit(1e-6, 1e12, "take the source out to switch it off"),
    "data.train.*.repeat": Limit(1e-6, 1e6),
    "data.workers": Limit(0, 512, "0 decodes in the training process; it is per rank"),
    "data.window": Limit(1, 2**31 - 1),
    "data.crop_scale": Limit(0, 1, "two numbers: 0 < low <= high <= 1", above=True),
    "data.flip": Limit(0, 1, "0.5 mirrors every other picture"),
    "data.color_jitter": Limit(0, 1, "0.4 is usual"),
    "data.word_dropout": _SHARE,
    "data.max_bad_ratio": _SHARE,
    "data.cache_gib": Limit(0, 1e6, "the shards that the ranks of a node read at a time must fit", above=True),
    "model.phases.*.image_size": _PIXELS,
    "model.phases.*.patch_dropout": _SHARE,
    "model.text_buckets": Limit(1, 1024),
    "loss.label_smoothing": _SHARE,
    "loss.margin": Limit(0, 2, "cosines lie between -1 and 1", above=True),
    "loss.temperature": Limit(0.01, 1, "the logit scale stays below 100"),
    "loss.logit_bias": Limit(-100, 0, "null: -ln(global batch)"),
    "optim.lr": _RATE,
    "optim.image_lr": Limit(_RATE.low, _RATE.high, "model.locked=image stops the tower"),
    "optim.text_lr": Limit(_RATE.low, _RATE.high, "model.locked=text stops the tower"),
    "optim.betas": Limit(0, 1, "two numbers, such as [0.9, 0.98]", below=True),
    "optim.eps": Limit(1e-30, 1),
    "optim.weight_decay": _DECAY,
    "optim.image_weight_decay": _DECAY,
    "optim.text_weight_decay": _DECAY,
    "optim.layer_decay": Limit(0, 1, "1.0 gives all layers one rate", above=True),
    "optim.ema": Limit(0, 1, "0.9999 averages some 10,000 updates", above=True, below=True),
    "optim.grad_clip": Limit(1e-12, 1e12, "null switches clipping off"),
    "train.global_batch": _PAIRS,
    "train.micro_batch": _PAIRS,
    "train.zero_stage": Limit(0, 3),
    "eval.batch": Limit(1, 2**20),
    "checkpoint.keep": Limit(2, 10**6, "one spare is needed for the day the newest is damaged"),
    "log.images": Limit(0, 1000),
    "guard.max_skipped": Limit(0, 10**9, "0 ends the run at the first"),
    "guard.spike": Limit(0, 1e6, "null switches the watch off", above=True),
}


def check_limits(config: Any) -> None:
    """Raises UsageError for the first setting of the tree that is beyond its limit, too long or no text to use."""
    for name, hint, value in leaves(config):
        many = isinstance(value, list | tuple)
        if isinstance(value, tuple) and len(value) != len(get_args(hint)):
            break_rule(name, value, f"{len(get_args(hint))} values")
        for one in value if many else [value]:
            if isinstance(one, str):
                _check_text(name, one)
            elif hint is not Any and isinstance(one, int | float) and not isinstance(one, bool):
                _check_number(name, one, optional=type(None) in get_args(hint))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, type and value of every setting of a tree of dataclasses."""
    hints = get_type_hints(type(node))
    for one in fields(node):
        name, value = prefix + one.name, getattr(node, one.name)
        if is_dataclass(value):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, list) and value and all(map(is_dataclass, value)):
            for number, item in enumerate(value):
                yield from leaves(item, f"{name}.{number}.")
        else:
            yield name, hints[one.name], value


def names(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every setting that a tree of `kind` can have, * for a place in a list."""
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[0] if get_origin(hint) is list else hint
        if is_dataclass(inner):
            yield from names(inner, f"{prefix}{name}." + "*." * (inner is not hint))  # type: ignore[arg-type]
        else:
            yield prefix + name, hint


def is_number(hint: Any) -> bool:
    """Whether a setting of this type holds numbers."""
    if get_origin(hint) in (Union, types.UnionType, tuple):
        return any(map(is_number, get_args(hint)))
    return hint in (int, float)


def _check_number(name: str, value: float, optional: bool) -> None:
    limit = LIMITS[_INDEX.sub(".*", name)]
    if not limit.holds(value):
        break_rule(name, value, f"{limit}{', or null' if optional else ''}", limit.remedy)


def _check_text(name: str, value: str) -> None:
    if not value.strip():
        break_rule(name, value, "a text that is not empty", "leave it out, or null where nothing is meant")
    if len(value) > _LONGEST:
        break_rule(name, value, f"{_LONGEST} characters at most")
    if _NOT_IN_TEXTS.search(value):
        break_rule(name, value, "a text on one line, without control characters")


def break_rule(name: str, value: object, rule: str, remedy: str | None = None) -> NoReturn:
    """Raise the UsageError for a setting whose value breaks its rule."""
    raise UsageError(f"config value {name} breaks its rule", got=repr(value), expected=rule, remedy=remedy)
