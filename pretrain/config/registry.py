"""What a `type` of the settings stands for: which settings it has and where it is built, without importing that."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One thing that settings name. `settings`: its frozen dataclass; `build`: "package.module:Name" of what takes
    them, imported when it is asked for, so that `--help` and config errors never wait for torch."""

    settings: type
    build: str

    def load(self) -> Any:
        """What `build` names."""
        module, name = self.build.split(":")
        return getattr(import_module(module), name)
