"""How a setting is declared: its default and its rule in one place, `lr: float = number(5e-4, ge=1e-12, le=100)`.

Texts need no declaration: every one is a line that is not empty. Rules between the settings of a section stand in its
`check()`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from data_tools.errors import UsageError
from pretrain.config.durations import parse_duration, parse_seconds

_LONGEST = 4096  # characters of a text: the longest path of Linux
_NOT_IN_TEXTS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, halves of surrogate pairs
_RULE = "rule"


@dataclass(frozen=True)
class Fault:
    """A rule between settings that is broken: by which field of the section (dotted where it lies deeper), the rule,
    and what to do."""

    field: str
    rule: str
    remedy: str | None = None


@dataclass(frozen=True)
class Section:
    """Settings that belong together."""

    def check(self) -> Iterator[Fault]:
        """The faults of settings that only show beside others of the section; each setting by itself is good."""
        yield from ()


class Rule(Protocol):
    """What one setting keeps to; null is not asked about."""

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError for a value that breaks it; `name` is the setting, `optional`: whether null is allowed."""

    def __str__(self) -> str:
        """What is allowed, in the words of configs/README.md."""


@dataclass(frozen=True)
class Number:
    """A number between two ends; what is not a number never lies there. Of a tuple each one."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    remedy: str | None = None

    def __post_init__(self) -> None:
        if (self.ge is None) == (self.gt is None) or (self.le is None) == (self.lt is None):
            raise TypeError("a number has one lower end, ge or gt, and one upper end, le or lt")

    def holds(self, value: float) -> bool:
        """Whether `value` lies between the ends."""
        above = value >= self.ge if self.gt is None else value > self.gt  # type: ignore[operator]
        return above and (value <= self.le if self.lt is None else value < self.lt)  # type: ignore[operator]

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError where a number lies beyond the ends."""
        for one in value if isinstance(value, tuple) else [value]:
            if not self.holds(one):
                break_rule(name, one, f"{self.between('value')}{', or null' if optional else ''}", self.remedy)

    def between(self, word: str) -> str:
        """The ends around a word."""
        low = f"{_end(self.ge)} <=" if self.gt is None else f"{_end(self.gt)} <"
        return f"{low} {word} {f'<= {_end(self.le)}' if self.lt is None else f'< {_end(self.lt)}'}"

    def __str__(self) -> str:
        return self.between("x")


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    allowed: tuple

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError for any other value, naming the nearest."""
        if value not in self.allowed:
            near = difflib.get_close_matches(str(value), map(str, self.allowed), 1)
            remedy = f"did you mean {near[0]!r}?" if near else None
            break_rule(name, value, f"one of {self}", remedy)

    def __str__(self) -> str:
        return ", ".join(map(str, self.allowed))


@dataclass(frozen=True)
class Duration:
    """Steps, samples or epochs. `zero`: may be none; `endless`: may be forever."""

    zero: bool = False
    endless: bool = False

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError for what is no duration, and for one of nothing."""
        number, _ = parse_duration(value, name, self.endless)
        if number == 0 and not self.zero:
            break_rule(name, value, "> 0", "null switches it off" if optional else None)

    def __str__(self) -> str:
        return "a duration"


@dataclass(frozen=True)
class Waiting:
    """A time up to `longest` seconds, `called` so."""

    longest: float
    called: str
    remedy: str

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError for what is no time, or too long."""
        if not 0 < parse_seconds(value, name) <= self.longest:
            rule = f"more than 0, at most {self.called}{', or null' if optional else ''}"
            break_rule(name, value, rule, self.remedy)

    def __str__(self) -> str:
        return f"a time, at most {self.called}"


@dataclass(frozen=True)
class Parsed:
    """What `parse(value, name)` can read; it raises UsageError. `allowed`: in words."""

    parse: Callable[[Any, str], object]
    allowed: str

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError where it cannot be read."""
        self.parse(value, name)

    def __str__(self) -> str:
        return self.allowed


@dataclass(frozen=True)
class PartNames:
    """Names of parts of the model, each once; which ones there are the task knows (`unknown_parts`)."""

    def check(self, name: str, value: Any, optional: bool) -> None:
        """Raises UsageError where a name stands twice."""
        if len(set(value)) < len(value):
            break_rule(name, value, "each name once")

    def __str__(self) -> str:
        return "a list of parts"


def unknown_parts(field: str, named: Collection[str], parts: Sequence[str]) -> Iterator[Fault]:
    """The fault where a setting names what is no part of the model."""
    for name in named:
        if name not in parts:
            near = difflib.get_close_matches(name, parts, 1)
            rule = f"parts of the model: {', '.join(parts)}"
            yield Fault(field, rule, f"did you mean {near[0]!r}?" if near else None)


def setting(default: Any, rule: Rule) -> Any:
    """A field with its default and its rule."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={_RULE: rule})
    return field(default=default, metadata={_RULE: rule})


def number(default: Any, **ends: Any) -> Any:
    """A number, or a tuple of them, between ends: one of `ge`, `gt` and one of `le`, `lt`; `remedy`: for one beyond."""
    return setting(default, Number(**ends))


def choice(*allowed: Any, default: Any = None) -> Any:
    """One of `allowed`, the first unless `default` is given."""
    return setting(allowed[0] if default is None else default, Choice(allowed))


def span(default: str | None, zero: bool = False, endless: bool = False) -> Any:
    """Steps, samples or epochs."""
    return setting(default, Duration(zero, endless))


def rule_of(one: Any) -> Rule | None:
    """The rule that a field was declared with."""
    return one.metadata.get(_RULE)


def check_text(name: str, value: str) -> None:
    """Raises UsageError for a text that can be no name and no path."""
    if not value.strip():
        break_rule(name, value, "a text that is not empty", "leave it out, or null where nothing is meant")
    if len(value) > _LONGEST:
        break_rule(name, value, f"{_LONGEST} characters at most")
    if _NOT_IN_TEXTS.search(value):
        break_rule(name, value, "a text on one line, without control characters")


def break_rule(name: str, value: object, rule: str, remedy: str | None = None) -> NoReturn:
    """Raise the UsageError for a setting whose value breaks its rule."""
    raise UsageError(f"config value {name} breaks its rule", got=repr(value), expected=rule, remedy=remedy)


def _end(end: float | None) -> str:
    return f"{end:g}" if isinstance(end, float) else str(end)
