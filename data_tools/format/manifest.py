"""manifest.json: the shards of a packed folder, what is in them, and the digest of the settings that made them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeGuard

from data_tools.errors import UserError, shown
from data_tools.format import MAX_SHARDS
from data_tools.format.commit import atomic_write
from data_tools.format.files import read_small
from data_tools.format.tar import BLOCK, MAX_TAR

FILE_NAME = "manifest.json"
FORMAT = "dualstream-shards"
VERSION = 1
MAX_BYTES = 256 << 20  # of a manifest, about a million shards
_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,250}")  # a file in the folder itself
_HASH = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class ShardRecord:
    """One shard: name without suffix, samples, tar bytes, hashes in hex, input rows, skipped rows per error class."""

    name: str
    samples: int
    bytes: int
    xxh3_128: str
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    parquet_xxh3_128: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a packed folder holds; `classes` are the class names in the order of the labels, `columns` what lies beside
    every shard, by name: see `data_tools.columns`."""

    config: dict
    config_digest: str
    schema: dict
    shards: tuple[ShardRecord, ...]
    classes: tuple[str, ...] = ()
    totals: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Commit the manifest of a folder; its shards must be committed before."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    if not manifest.columns:  # packs keep the bytes that they had before there were any
        del content["columns"]
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with atomic_write(folder / FILE_NAME) as file:
        file.write(text.encode() + b"\n")


def read_manifest(path: Path) -> Manifest:
    """Raises UserError when the file is missing, is not a manifest, or is of another version."""
    try:
        return parse_manifest(read_small(path, MAX_BYTES), str(path))
    except FileNotFoundError:
        remedy = "pack into this folder first, or name tars or a brace pattern instead of a folder"
        raise UserError(f"no {FILE_NAME} in {path.parent}", remedy=remedy) from None


def parse_manifest(data: bytes, name: str) -> Manifest:
    """The content of a manifest; `name` is for the errors. Nothing in it is believed that could lead outside its folder
    or past what a shard can be."""
    remedy = "pack again, or name the tars"
    if data.count(b"{") + data.count(b"[") > 3 * MAX_SHARDS:
        raise UserError(f"unreadable manifest {name}", got="more than a million shards", remedy=remedy)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"unreadable manifest {name}", got=error, remedy=remedy) from None
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
    if found != (FORMAT, VERSION):
        raise UserError(f"not a shard manifest: {name}", got=found, expected=(FORMAT, VERSION))
    try:
        _check_fields(content, _FIELDS, "")
        for number, shard in enumerate(content["shards"]):
            _check_fields(shard, _SHARD_FIELDS, f"shards[{number}].")
            _check_shard(shard, f"shards[{number}]")
        shards = tuple(ShardRecord(**shard) for shard in content["shards"])
        fields = {name: content[name] for name in ("config", "config_digest", "schema", "totals")}
        fields["classes"] = tuple(content["classes"])
        fields["columns"] = content.get("columns", {})
    except (KeyError, TypeError) as error:
        raise UserError(f"manifest {name} lacks or misspells a field", got=error, remedy="pack again") from None
    except ValueError as error:
        raise UserError(f"manifest {name} cannot be right", got=error, remedy=remedy) from None
    twice = [shard for shard, count in Counter(record.name for record in shards).items() if count > 1]
    if twice:
        raise UserError(f"manifest {name} lists a shard twice", got=twice[0], remedy=remedy)
    return Manifest(shards=shards, **fields)


def totals_of(shards: Iterable[ShardRecord]) -> dict:
    """Sums over shards: samples, rows, bytes, and skipped rows by error class."""
    sums, skipped = Counter({"samples": 0, "rows": 0, "bytes": 0}), Counter[str]()
    for shard in shards:
        skipped.update(shard.skipped)
        sums.update(samples=shard.samples, rows=shard.rows, bytes=shard.bytes)
    return {**sums, "skipped": dict(sorted(skipped.items()))}


def wrong_totals(manifest: Manifest) -> list[str]:
    """What the totals of a manifest say that the sums over its shards do not."""
    sums = totals_of(manifest.shards)
    return [
        f"total of {name} is {manifest.totals[name]}, the shards have {value}"
        for name, value in sums.items()
        if name in manifest.totals and manifest.totals[name] != value
    ]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_TAR


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_table(value: object) -> TypeGuard[dict]:
    return isinstance(value, dict)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


_HASH_WORDS = "32 hexadecimal digits"
# What a field may hold, in words and as a check.
_FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "config": ("an object", _is_table),
    "config_digest": ("a text", _is_text),
    "schema": ("an object", _is_table),
    "totals": ("an object", _is_table),
    "columns": ("an object of objects", lambda value: _is_table(value) and all(map(_is_table, value.values()))),
    "classes": ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "shards": ("a list of objects", lambda value: isinstance(value, list) and all(map(_is_table, value))),
}
_SHARD_FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "name": ("a file name", lambda value: isinstance(value, str) and bool(_NAME.fullmatch(value))),
    "samples": ("a count", _is_count),
    "bytes": ("a count", _is_count),
    "rows": ("a count", _is_count),
    "skipped": ("an object of counts", _are_counts),
    "xxh3_128": (_HASH_WORDS, _is_hash),
    "parquet_xxh3_128": (_HASH_WORDS, lambda value: value == "" or _is_hash(value)),
}


def _check_fields(content: dict, fields: dict[str, tuple[str, Callable[[object], bool]]], where: str) -> None:
    """Raises ValueError for the first field that holds something else. What may be absent is known to the dataclass."""
    for name, (expected, is_right) in fields.items():
        if name in content and not is_right(content[name]):
            raise ValueError(f"{where}{name} = {shown(repr(content[name]), 100)}, which is not {expected}")


def _check_shard(shard: dict, where: str) -> None:
    if shard["samples"] > shard["bytes"] // BLOCK:
        raise ValueError(f"{where} has {shard['samples']} samples in {shard['bytes']} bytes")
