"""manifest.json: the shards of a packed folder, what is in them, and the digest of the settings that made them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_tools.errors import UserError
from data_tools.shards.commit import atomic_write

FILE_NAME = "manifest.json"
FORMAT = "dualstream-shards"
VERSION = 1


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
    """What a packed folder holds; `classes` are the class names in the order of the labels."""

    config: dict
    config_digest: str
    schema: dict
    shards: tuple[ShardRecord, ...]
    classes: tuple[str, ...] = ()
    totals: dict = field(default_factory=dict)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Commit the manifest of a folder; its shards must be committed before."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}, indent=1, ensure_ascii=False)
    with atomic_write(folder / FILE_NAME) as file:
        file.write(text.encode() + b"\n")


def read_manifest(path: Path) -> Manifest:
    """Raises UserError when the file is missing, is not a manifest, or is of another version."""
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        remedy = "pack into this folder first, or name tars or a brace pattern instead of a folder"
        raise UserError(f"no {FILE_NAME} in {path.parent}", remedy=remedy) from None


def parse_manifest(data: bytes, name: str) -> Manifest:
    """The content of a manifest; `name` is for the errors."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"unreadable manifest {name}", got=error, remedy="pack again, or name the tars") from None
    found = (content.get("format"), content.get("version")) if isinstance(content, dict) else None
    if found != (FORMAT, VERSION):
        raise UserError(f"not a shard manifest: {name}", got=found, expected=(FORMAT, VERSION))
    try:
        shards = tuple(ShardRecord(**shard) for shard in content["shards"])
        fields = {name: content[name] for name in ("config", "config_digest", "schema", "totals")}
        return Manifest(shards=shards, classes=tuple(content["classes"]), **fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"manifest {name} lacks or misspells a field", got=error, remedy="pack again") from None
