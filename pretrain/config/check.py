"""Every setting of a tree, walked over: its rule, then from the bottom up the rules between settings."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, cast, get_args, get_origin, get_type_hints

from pretrain.config.declare import Rule, Section, break_rule, check_text, rule_of
from pretrain.config.registry import Entry, registry_of

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def check(section: Section, prefix: str = "") -> None:
    """Raises UsageError for the first setting that breaks a rule, by its dotted name, which begins with `prefix`."""
    for one in fields(section):
        name, value = prefix + one.name, getattr(section, one.name)
        if registry_of(one) is not None:
            _check_names(name, value)
        inner = dict(sections(value, f"{name}."))
        for below, item in inner.items():
            check(item, below)
        if not inner:
            _check_setting(name, value, _hints(cast(Any, type(section)))[one.name], rule_of(one))
    for fault in section.check():
        found = value_at(section, fault.field)
        break_rule(prefix + fault.field, list(found) if isinstance(found, dict) else found, fault.rule, fault.remedy)


def settings_of(registry: Mapping[str, Entry], given: Mapping[str, Any], prefix: str) -> Any:
    """The checked settings of `given`, `type` among them, as a file of an earlier run has them.

    Raises:
        UsageError: a setting that breaks a rule; AttributeError, KeyError or TypeError: no settings of `registry`.
    """
    kind = registry[given["type"]].settings
    for name, value in given.items():
        if value is None and type(None) not in get_args(_hints(cast(Any, kind))[name]):  # the reader knows types
            raise TypeError(f"{prefix}{name} is null")
    settings = kind(**given)
    check(settings, prefix)
    return settings


def sections(value: Any, prefix: str = "") -> Iterator[tuple[str, Section]]:
    """The sections in a value, itself or of a list or map, with how the names of their settings begin."""
    if isinstance(value, Section):
        yield prefix, value
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from ((f"{prefix}{key}.", item) for key, item in items if isinstance(item, Section))


def value_at(node: Any, name: str) -> Any:
    """The value at a dotted name below a section. Raises AttributeError, IndexError or KeyError where none is there."""
    for step in name.split("."):
        if isinstance(node, list):
            node = node[int(step)]
        else:
            node = node[step] if isinstance(node, dict) else getattr(node, step)
    return node


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting of a tree."""
    for one in fields(section):
        value = getattr(section, one.name)
        inner = list(sections(value, f"{prefix}{one.name}."))
        for below, item in inner:
            yield from leaves(item, below)
        if not inner:
            yield prefix + one.name, value


def names(kind: type, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Dotted name, field and type of every setting that a tree of `kind` can have; a place in a list is 0, a
    key of a map NAME, where what is under it has that setting whatever its type, else the type."""
    for one in fields(kind):
        name, hint = prefix + one.name, _hints(cast(Any, kind))[one.name]
        inner, step = within(hint)
        if inner is None:
            yield name, one, hint
            continue
        yield from names(inner, f"{name}.{step}")
        common = {below.name for below in fields(inner)}
        for type_name, entry in (registry_of(one) or {}).items():
            found = names(entry.settings, f"{name}.{type_name}.")
            yield from (setting for setting in found if setting[1].name not in common)


def within(hint: Any) -> tuple[type | None, str]:
    """The section that a setting of this type holds, or None, and the step between their names."""
    step = {list: "0.", dict: "NAME."}.get(cast(Any, get_origin(hint)), "")
    inner = get_args(hint)[-1] if step else hint
    return (cast(type, inner), step) if is_dataclass(inner) else (None, "")


def _check_names(name: str, things: Mapping[str, Any]) -> None:
    """A thing's name is a part of dotted settings, of names of parameters, and of metrics."""
    for own in things:
        if not _NAME.fullmatch(own):
            break_rule(name, own, "names of letters, digits, _ and -")


def _check_setting(name: str, value: Any, hint: Any, rule: Rule | None) -> None:
    if isinstance(value, tuple) and len(value) != len(get_args(hint)):
        break_rule(name, value, f"{len(get_args(hint))} values")
    several = isinstance(value, list | tuple)
    for one in value if several else [value]:
        if isinstance(one, str):
            check_text(name, one)
        if several and isinstance(one, list | dict):  # OmegaConf looks at the items of a list alone
            break_rule(name, value, "a list without lists or maps in it")
    if value is not None and rule is not None:
        rule.check(name, value, type(None) in get_args(hint))
