"""What a `type` of the settings stands for: which settings it has and where it is built, without importing that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from importlib import import_module
from typing import Any, Generic, TypeVar

_REGISTRY = "registry"
S = TypeVar("S")


@dataclass(frozen=True)
class Entry(Generic[S]):
    """One thing that settings name. `settings`: its frozen dataclass; `build`: "package.module:Name" of what takes
    them, imported when it is asked for, so that `--help` and config errors never wait for torch."""

    settings: type[S]
    build: str

    def load(self) -> Any:
        """What `build` names."""
        return load(self.build)


def load(name: str) -> Any:
    """What "package.module:Name" names."""
    module, _, inside = name.partition(":")
    return getattr(import_module(module), inside)


def entries(registry: Mapping[str, Entry], *default: str) -> Any:
    """A field that maps names of the user's to settings of `registry`'s things, of those named `default` where the user
    says nothing. Each has a setting `type`, the thing's name in `registry`; in YAML it may be left out where the user's
    name is that."""

    def made() -> dict[str, Any]:
        return {name: registry[name].settings() for name in default}

    return field(default_factory=made, metadata={_REGISTRY: registry})


def registry_of(one: Field) -> Mapping[str, Entry] | None:
    """The registry whose things a field maps names to."""
    return one.metadata.get(_REGISTRY)
