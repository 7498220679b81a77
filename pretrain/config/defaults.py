"""The tree of defaults that given settings are laid over: by the task, and by the types of what they name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, read_write

from data_tools.errors import UsageError
from pretrain.config.check import names
from pretrain.config.registry import Entry, registry_of


def task_of(tasks: Mapping[str, Entry], raw: DictConfig, path: object, default: str) -> type:
    """The settings of the task that the file at `path` or an override names. Raises UsageError for another one."""
    name = OmegaConf.select(raw, "task")
    if name is not None and str(name) not in tasks:
        fault = f"config {path} is of another task" if len(tasks) == 1 else "config value task breaks its rule"
        raise UsageError(fault, got=repr(name), expected=" or ".join(tasks), remedy=_near(name, tasks))
    return tasks[default if name is None else str(name)].settings


def defaults(kind: type, raw: DictConfig) -> DictConfig:
    """A tree of `kind` with all defaults, and with those of the types that `raw` maps names to.

    Raises:
        UsageError: a type that is none.
    """
    tree = _structured(cast(Any, kind)).copy()
    given = cast(dict, OmegaConf.to_container(raw))
    for one in fields(kind):
        registry, named = registry_of(one), given.get(one.name)
        if registry is None or not isinstance(named, dict):
            continue
        with read_write(tree):
            tree[one.name] = {
                name: _structured(cast(Any, _entry(registry, settings, one.name, name).settings)).copy()
                for name, settings in named.items()
            }
    return tree


def name_things(raw: DictConfig, kinds: Iterable[type]) -> None:
    """In settings as they are given, turn a name alone, or a list of names, into a map of things without settings of
    their own, where the trees map names to things."""
    for one in (field for kind in kinds for field in fields(kind) if registry_of(field) is not None):
        given = cast(dict, OmegaConf.to_container(raw)).get(one.name)
        named = [given] if isinstance(given, str) else given
        if isinstance(named, list) and all(isinstance(name, str) and name for name in named):
            raw[one.name] = {name: {} for name in named}
        elif isinstance(named, dict):
            for name in (name for name, settings in named.items() if settings is None):
                raw[one.name][name] = {}


@functools.cache
def maps(kind: type) -> set[str]:
    """The settings of `kind` that map names to sections."""
    return {name.partition(".NAME.")[0] for name, *_ in names(kind) if ".NAME." in name}


@functools.cache
def _structured(kind: type) -> DictConfig:
    return OmegaConf.structured(kind)


def _entry(registry: Mapping[str, Entry], settings: Any, field: str, name: Any) -> Entry:
    """What the settings under `name` are of."""
    chosen = settings.get("type", name) if isinstance(settings, dict) else name
    if not isinstance(chosen, str) or chosen not in registry:
        raise UsageError(
            f"config value {field}.{name} has no such type",
            got=repr(chosen),
            expected=", ".join(registry),
            remedy=_near(chosen, registry) or f"a name of your own needs {field}.{name}.type",
        )
    return registry[chosen]


def _near(name: object, known: Mapping[str, object]) -> str | None:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {near[0]!r}?" if near else None
