"""Reading the tree of settings: YAML, then `section.key=value` words of the command line, then the rules."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_tools.errors import UsageError
from data_tools.redaction import redact_source
from pretrain.config.check import check, names
from pretrain.config.declare import Section
from pretrain.config.defaults import defaults, maps, name_things, task_of
from pretrain.config.recorded import flat
from pretrain.config.registry import Entry, registry_of
from pretrain.config.tree import Config

_LARGEST = 1 << 20  # bytes of a config file
_Config = TypeVar("_Config", bound=Config)
_Section = TypeVar("_Section", bound=Section)
_SOURCES = "data.train"


def load_config(kind: type[_Config], path: str | os.PathLike, overrides: Sequence[str] = ()) -> _Config:
    """Read YAML, apply `section.key=value` overrides (later ones win) and return the frozen tree, checked.

    Raises:
        UsageError: another task, unknown key (naming the nearest), wrong type, missing value, a value outside its rule.
    """
    return cast(_Config, load_task({kind.task: Entry(kind, "")}, path, overrides, kind.task))


def load_task(tasks: Mapping[str, Entry], path: str | os.PathLike, overrides: Sequence[str], default: str) -> Config:
    """`load_config` of whichever of `tasks` the settings name, or of `default` where they name none."""
    path = Path(path)
    _require_file(path)
    config = _build(tasks, path, overrides, default)
    check(config)
    return config


def find_run_dir(path: str | os.PathLike, overrides: Sequence[str]) -> str | None:
    """The run.dir of settings that `load_config` refuses, where that much can be read of them."""
    words = [word for word in overrides if word.startswith("run.dir=")]
    try:
        found = words[-1].partition("=")[2] if words else OmegaConf.select(OmegaConf.load(Path(path)), "run.dir")
    except Exception:  # the YAML parser's errors share no class
        return None
    return found if isinstance(found, str) and found else None


def read_section(kind: type[_Section], given: Mapping[str, Any], words: Sequence[str], of: str) -> _Section:
    """A section by itself, checked, of the settings that are `given` and of `key=value` words. `of`: whose settings
    they are, for messages.

    Raises:
        UsageError: as `load_config` does; a word for what is given.
    """
    raw = OmegaConf.create(dict(given))
    for word in words:
        key = word.partition("=")[0]
        if key in given:
            raise UsageError(f"{key} is given twice", got=word, expected=f"it once: {given[key]}")
        _override(raw, word, ())
    try:
        section = cast(_Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), raw)))
    except (OmegaConfBaseException, ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise _explain(error, kind, raw, of, None) from None
    check(section)
    return section


def _require_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        got = "a folder" if path.is_dir() else "a device or a pipe" if path.exists() else "no such file"
    except OSError:  # a name that no file can have
        got = "no such file"
    fault = f"config {path} is {'missing' if got == 'no such file' else 'no file'}"
    raise UsageError(fault, got=got, expected="a YAML file", remedy="start from one in configs/")


def _build(tasks: Mapping[str, Entry], path: Path, overrides: Sequence[str], default: str) -> Config:
    raw, kind = _read_yaml(path), tasks[default].settings
    kinds = [entry.settings for entry in tasks.values()]
    mapped = set().union(*(maps(cast(Any, one)) for one in kinds))
    try:
        _spell_out(raw, kinds)
        for word in overrides:
            _override(raw, word, mapped)
            _spell_out(raw, kinds)
        kind = task_of(tasks, raw, path, default)
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(defaults(kind, raw), raw)))
    except UsageError:
        raise
    except (OmegaConfBaseException, ArithmeticError, RecursionError, TypeError, ValueError) as error:
        raise _explain(error, kind, raw, f"task {cast(Any, kind).task}", path) from None


def _read_yaml(path: Path) -> DictConfig:
    if path.stat().st_size > _LARGEST:
        raise UsageError(
            f"config {path} is no file of settings", got=f"{path.stat().st_size} bytes", expected=f"{_LARGEST} at most"
        )
    try:
        raw = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's errors share no class
        raise UsageError(f"config {path} is not valid YAML", got=error) from None
    if not isinstance(raw, DictConfig):
        raise UsageError(f"config {path} is no tree of settings", got="a list", expected="section: {key: value}")
    return raw


def dump_config(config: Config) -> str:
    """The resolved tree as YAML, readable by `load_config`. It is printed and kept, so URLs lose their credentials."""
    return OmegaConf.to_yaml(OmegaConf.create(_shown(asdict(config))))


def _shown(tree: Any) -> Any:
    """The tree with its texts redacted, one by one: as YAML a password may be escaped past recognition."""
    if isinstance(tree, dict):
        return {key: _shown(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_shown(value) for value in tree]
    return redact_source(tree) if isinstance(tree, str) else tree


def _override(raw, word: str, mapped: Collection[str]) -> None:
    """Set what the word says. A map that is given whole replaces the file's; a section is changed where it says so."""
    key, equals, _ = word.partition("=")
    if not equals or not key:
        raise UsageError(
            f"override {word!r} is not understood", expected="section.key=value, for example optim.lr=1e-3"
        )
    value = _value(key, word.partition("=")[2], word)
    try:
        OmegaConf.update(raw, key, value, merge=key not in mapped, force_add=True)
    except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
        raise UsageError(f"override {word!r} names no place in the settings", got=_first_line(error)) from None


def _value(key: str, text: str, word: str) -> Any:
    if key == _SOURCES:
        return _paths(text)
    try:
        return _parsed(text)
    except Exception as error:  # the YAML parser's errors share no class
        remedy = f"quotes that the shell leaves there: {key}='\"TEXT\"'"
        raise UsageError(f"the value of override {word!r} is not valid YAML", got=error, remedy=remedy) from None


def _parsed(text: str) -> Any:
    return OmegaConf.select(OmegaConf.from_dotlist([f"value={text}"]), "value")


def _paths(text: str) -> Any:
    """The sources of `data.train=TEXT`: a path, several with commas between, a source, or a YAML list of paths and
    sources.
    Commas within braces, in the name of what exists, and in a URL's query separate nothing."""
    if text.startswith("{urls:"):  # one source; other braces are a pattern of names
        text = f"[{text}]"
    if text.startswith("["):
        with contextlib.suppress(Exception):  # braces within a list are no YAML, and the parser's errors share no class
            return _parsed(text)
        text = text.removeprefix("[").removesuffix("]")
    whole = "?" in text or os.path.exists(text)
    parts = [text] if whole else re.findall(r"(?:\{[^{}]*\}|[^,])+", text)
    return [part.strip().strip("'\"") for part in parts if part.strip()]


def _spell_out(raw: Any, kinds: Iterable[type]) -> None:
    """Give what the user wrote in short its full form."""
    if OmegaConf.is_dict(raw):
        _name_sources(raw)
        name_things(raw, kinds)


def _name_sources(raw: Any) -> None:
    """A source that is given as a path alone means `urls`, and one source alone is a list of one."""
    found = OmegaConf.select(raw, _SOURCES)
    sources = [found] if isinstance(found, str) else found
    if isinstance(sources, list) or OmegaConf.is_list(sources):
        named = [{"urls": source} if isinstance(source, str) else source for source in cast(list, sources)]
        OmegaConf.update(raw, _SOURCES, named)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _explain(error: Exception, kind: type, raw: DictConfig, of: str, path: Path | None) -> UsageError:
    key = str(getattr(error, "full_key", "") or "") or _guilty(kind, raw)
    reason = _first_line(error).split(". Did you mean")[0]
    if "not in" in reason:
        return UsageError(
            f"unknown config key {key!r} {'' if path is None else f'in {path} or '}on the command line",
            expected=f"a setting of {of}",
            remedy=_right_key(kind, key),
        )
    if "missing mandatory" in reason.lower():
        return UsageError(
            f"config value {key!r} is not set",
            remedy=f"{'' if path is None else f'add it to {path} or '}pass {key}=VALUE",
        )
    if isinstance(error, RecursionError):
        return UsageError(f"config value {key!r} refers to itself, or is nested too deep")
    remedy = None
    if "not a ListConfig" in reason:
        reason, remedy = "what is not a list", f"{key}=[{OmegaConf.select(raw, key)}]"
    if isinstance(error, TypeError):  # OmegaConf's word for a list that an override took for a mapping
        remedy = "a list that the file lacks is given whole: model.phases='[{until: 2 epochs, image_size: 160}]'"
    return UsageError(f"config value {key!r} is wrong", got=reason, remedy=remedy)


def _right_key(kind: type, key: str) -> str:
    """What to write in place of an unknown key: that of another type in a map, or the nearest one."""
    field, _, below = key.partition(".")
    registry = {one.name: registry_of(one) or {} for one in fields(kind)}.get(field, {})
    leaf = below.rpartition(".")[2]
    having = [name for name, entry in registry.items() if leaf in {one.name for one in fields(entry.settings)}]
    if having:
        return f"{leaf} is a setting of {', '.join(having)}"
    near = _nearest(key, [_filled(name, key) for name in _keys(kind)])
    return f"did you mean {near!r}?" if near else "configs/README.md has the keys"


def _guilty(kind: type, raw: DictConfig) -> str:
    """The first setting of `raw` that does not fit into the tree by itself: OmegaConf does not always name it."""
    plain = defaults(kind, raw)
    for key, value in flat(cast(dict, OmegaConf.to_container(raw))):
        try:
            alone = not (isinstance(value, str) and "${" in value)
            tree = OmegaConf.merge(plain, _nested(key, value) if alone else raw)
            OmegaConf.select(tree, re.sub(r"\.\d+\b", ".0", key) if alone else key)
        except Exception:
            return key
    return "?"


def _nested(key: str, value: object) -> dict:
    for name in reversed(key.split(".")):
        value = [value] if name.isdigit() else {name: value}
    return cast(dict, value)


def _nearest(key: str, names: list[str]) -> str | None:
    """The known key most like `key`, by its whole path or by its last word (all that is known of a key in a list)."""
    in_lists_last = sorted(names, key=lambda name: (".0." in name) - (".NAME." in name))
    leaves = {name.rsplit(".", 1)[-1]: name for name in in_lists_last}
    found = [(word, word) for word in difflib.get_close_matches(key, names, 1)]
    found += [(leaf, leaves[leaf]) for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(leaves), 1)]
    likeness = [difflib.SequenceMatcher(None, key, word).ratio() for word, _ in found]
    return found[likeness.index(max(likeness))][1] if found else None


def _keys(kind: type) -> list[str]:
    """Dotted names of all sections and settings; those of a list's items stand under 0, of a map's under NAME."""
    found: dict[str, None] = {}
    for name, *_ in names(kind):
        steps = name.split(".")
        ends = (end for end, step in enumerate(steps) if step not in ("0", "NAME"))
        found |= dict.fromkeys(".".join(steps[: end + 1]) for end in ends)
    return list(found)


def _filled(name: str, key: str) -> str:
    """`name` with what `key` calls an item of the same map."""
    before, found, after = name.partition(".NAME.")
    inside = key.removeprefix(f"{before}.").partition(".")[0] if found and key.startswith(f"{before}.") else ""
    return f"{before}.{inside}.{after}" if inside else name
