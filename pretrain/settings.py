"""Reading the tree of settings: YAML, then `section.key=value` words of the command line, then the rules."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.errors import UsageError
from data_tools.remote.urls import redact_text
from pretrain.config import DataConfig, FinetuneConfig, PretrainConfig
from pretrain.rules import validate

_Config = TypeVar("_Config", PretrainConfig, FinetuneConfig)


def load_config(kind: type[_Config], path: str | os.PathLike, overrides: Sequence[str] = ()) -> _Config:
    """Read YAML, apply `section.key=value` overrides (later ones win) and return the frozen tree, checked.

    Raises:
        UsageError: unknown key (naming the nearest), wrong type, missing value, a value outside its rule.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"config {path} is missing", got="no such file", expected="a YAML file", remedy="start from one in configs/"
        )
    try:
        raw = OmegaConf.load(path)
        for word in overrides:
            _override(raw, word)
        tree = OmegaConf.merge(OmegaConf.structured(kind), raw)
        config = cast(_Config, OmegaConf.to_object(tree))
    except UsageError:
        raise
    except OmegaConfBaseException as error:
        raise _explain(error, kind, path) from None
    except TypeError as error:  # OmegaConf's word for a list that an override took for a mapping
        remedy = "a list that the file lacks is given whole: model.phases='[{until: 2 epochs, image_size: 112}]'"
        raise UsageError(f"{path} and the overrides do not fit together", got=str(error), remedy=remedy) from None
    except Exception as error:  # the YAML parser's errors share no class
        raise UsageError(f"config {path} is not valid YAML", got=str(error)) from None
    validate(config)
    return config


def dump_config(config: PretrainConfig | FinetuneConfig) -> str:
    """The resolved tree as YAML, readable by `load_config`. It is printed and kept, so URLs lose their credentials."""
    return redact_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def _override(raw, word: str) -> None:
    key, equals, _ = word.partition("=")
    if not equals or not key:
        raise UsageError(
            f"override {word!r} is not understood", expected="section.key=value, for example optim.lr=1e-3"
        )
    value = OmegaConf.select(OmegaConf.from_dotlist([f"value={word.partition('=')[2]}"]), "value")
    OmegaConf.update(raw, key, value, force_add=True)


def _explain(error: OmegaConfBaseException, kind: type, path: Path) -> UsageError:
    key = str(getattr(error, "full_key", "") or "")
    reason = str(error).splitlines()[0].split(". Did you mean")[0]
    if "not in" in reason:
        near = _nearest(key, list(_all_keys(kind)))
        return UsageError(
            f"unknown config key {key!r} in {path} or on the command line",
            remedy=f"did you mean {near!r}?" if near else "see the keys in pretrain/config.py",
        )
    if "missing mandatory" in reason.lower():
        return UsageError(f"config value {key!r} is not set", remedy=f"add it to {path} or pass {key}=VALUE")
    return UsageError(f"config value {key!r} is wrong", got=reason)


def _nearest(key: str, names: list[str]) -> str | None:
    """The known key most like `key`, by its whole path or else by its last word."""
    leaves = {name.rsplit(".", 1)[-1]: name for name in names}
    whole = difflib.get_close_matches(key, names, 1)
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), 1)
    return whole[0] if whole else leaves[leaf[0]] if leaf else None


def _all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        default = item.default_factory() if callable(item.default_factory) else item.default
        yield prefix + item.name
        if is_dataclass(default):
            yield from _all_keys(default, prefix + item.name + ".")
    if kind is DataConfig or isinstance(kind, DataConfig):
        yield prefix + "train.0.urls"
