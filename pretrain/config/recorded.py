"""What the settings file of an earlier run says. It may be of older code, or damaged: it is compared, never obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_tools.errors import shown
from pretrain.config.tree import PRECISIONS


def changes(before: str, after: str) -> list[str]:
    """Lines `- key: value` and `+ key: value` of the settings, and of the comments on code and packages, in which two
    files that `dump_config` wrote differ; where a setting stands in them does not matter."""
    try:
        old, new = dict(_settings(before)), dict(_settings(after))
    except Exception:  # the YAML parser's errors share no class
        return ["the settings of that checkpoint cannot be read"]
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            lines += [shown(f"{mark} {key}{side[key]}") for mark, side in (("-", old), ("+", new)) if key in side]
    return lines


def recorded_precision(path: Path) -> str | None:
    """train.precision of a resolved tree that `dump_config` wrote to `path`; None where it cannot be read there."""
    value = recorded(path, "train.precision")
    return value if value in PRECISIONS[1:] else None


def recorded(path: Path, name: str) -> str | None:
    """The setting `name`, a text, of a tree that `dump_config` wrote to `path`; None where it cannot be read there."""
    try:
        value = OmegaConf.select(OmegaConf.load(path), name)
    except Exception:  # absent, or damaged in one of the many ways of YAML: then it says nothing
        return None
    return value if isinstance(value, str) else None


def flat(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the settings of a tree of plain values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from flat(dict(enumerate(value)), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settings(text: str) -> Iterator[tuple[str, str]]:
    """Names and how a line goes on behind them."""
    yield from ((line, "") for line in text.splitlines() if line.startswith("#"))
    tree = OmegaConf.create(text)
    if not isinstance(tree, DictConfig):
        raise ValueError("no tree of settings")
    for key, value in flat(dict(OmegaConf.to_container(tree))):  # type: ignore[arg-type]
        yield key, f": {value if isinstance(value, str) else json.dumps(value)}"
