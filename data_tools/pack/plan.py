"""Settings of a pack, and the plan that follows from them: which sample goes into which shard, under which digest."""

import json
from dataclasses import dataclass

import xxhash

from data_tools.errors import UserError
from data_tools.format import MAX_SHARDS
from data_tools.pack.image import JPEG_QUALITY, Limits, common_extension
from data_tools.pack.rows import Item, Source

# Raised when the same settings and input come to mean other bytes.
_LAYOUT = 1
_SAMPLE_OVERHEAD = 3 * 1024


@dataclass(frozen=True)
class Settings:
    """How samples are cut into shards and stored."""

    name: str
    samples_per_shard: int
    shard_bytes: int | None
    pairs: bool
    limits: Limits


@dataclass(frozen=True)
class Plan:
    """Shards of samples in order of their keys: a hash, so every shard is a fair mixture of the input. `extension` is
    that of all images, None for that of the format."""

    settings: Settings
    source: Source
    shards: list[list[Item]]
    extension: str | None
    config: dict
    digest: str

    def shard_name(self, number: int) -> str:
        """The name of shard `number`, without suffix."""
        return f"{self.settings.name}-{number:06d}"


def make_plan(source: Source, items: list[Item], settings: Settings) -> Plan:
    """The plan follows from rows and settings alone; equal digests mean equal bytes, wherever the input lies."""
    ordered = sorted(items, key=lambda item: item.key)
    shards = _cut(ordered, settings)
    if len(shards) > MAX_SHARDS:
        raise UserError("too many shards", got=len(shards), expected=f"{MAX_SHARDS} or fewer", remedy="larger shards")
    formats = {item.format for item in items if item.format}
    extension = common_extension(formats, settings.limits.resize)
    config = _config(source, settings)
    if len(formats) > 1:  # corpora of one format keep the digest that they had before there was a choice
        config["image_extension"] = extension
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(config, sort_keys=True).encode())
    for item in ordered:
        rows = [(row.source, row.captions, row.label, row.metadata, row.fault) for row in item.rows]
        digest.update(repr((item.id, item.size, rows)).encode("utf-8", "backslashreplace"))
    return Plan(settings, source, shards, extension, config, digest.hexdigest())


def _cut(items: list[Item], settings: Settings) -> list[list[Item]]:
    shards: list[list[Item]] = []
    size = 0
    for item in items:
        added = max(0, item.size) + _SAMPLE_OVERHEAD
        full = not shards or len(shards[-1]) >= settings.samples_per_shard
        if full or (settings.shard_bytes and size + added > settings.shard_bytes):
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += added
    return shards


def _config(source: Source, settings: Settings) -> dict:
    limits = settings.limits
    return {
        "layout": _LAYOUT,
        "name": settings.name,
        "samples_per_shard": settings.samples_per_shard,
        "shard_bytes": settings.shard_bytes,
        "pairs": settings.pairs,
        "resize": limits.resize,
        "jpeg_quality": JPEG_QUALITY,
        "max_pixels": limits.pixels,
        "max_file_bytes": limits.file_bytes,
        "classes": source.labels,
    }
