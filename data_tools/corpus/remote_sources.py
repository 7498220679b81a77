"""Sources that are URLs, resolved with as few requests as can be: a manifest is one, a tar's index one of 64 bytes."""

import glob
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data_tools.corpus.sources import COMPRESSED
from data_tools.errors import UserError
from data_tools.format import manifest as manifests
from data_tools.format.index import HEADER_BYTES, IndexHeader, index_path, open_index, parse_header
from data_tools.progress import Progress
from data_tools.redaction import redact
from data_tools.remote.cache import Cache
from data_tools.remote.retry import DeniedError, MissingError
from data_tools.remote.settings import CacheSettings, Shard
from data_tools.remote.store import read_bytes
from data_tools.remote.urls import child, expand_braces, index_url, name_of, parent, split_query


def describe_loss(lost: int, samples: int) -> str:
    """What the damage of a shard was, to be put behind its name; "" where nothing is lost."""
    return f"is damaged: at least {lost} of {samples} samples were lost before it was indexed" if lost else ""


class ShardEntry(NamedTuple):
    """A shard as its manifest or index has it: path or URL, samples, bytes of the tar, its xxh3-128; what it lost, ""
    for nothing; and what file it is, whatever its path (None: its URL says)."""

    place: str
    samples: int
    tar_bytes: int
    digest: bytes
    damage: str = ""
    identity: tuple[int, int] | None = None


_REQUESTS, _WALKS = 16, 4


def resolve_url(url: str, cache: CacheSettings) -> tuple[list[ShardEntry], tuple[str, ...]]:
    """The shards of a remote manifest, folder, tar or brace pattern of tars, and the class names.

    A tar without an index beside it is brought into the cache and walked, once per node.
    """
    if name_of(url) == manifests.FILE_NAME:
        return _from_manifest(url, cache)
    if name_of(url).endswith(COMPRESSED):
        remedy = "unpack it where it lies, for samples are read from any place of a shard"
        raise UserError(f"{redact(url)} is compressed", expected="a plain tar", remedy=remedy)
    if glob.has_magic(name_of(url)):
        remedy = "name the tars with braces, as in shard-{000000..000127}.tar"
        raise UserError(f"cannot search for {redact(url)}", got="a glob pattern in a URL", remedy=remedy)
    if not name_of(url).endswith(".tar"):
        return _from_manifest(child(url, manifests.FILE_NAME), cache)
    tars = expand_braces(url)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        headers = list(pool.map(lambda tar: _header(tar, cache), tars))
    unknown = [tar for tar, header in zip(tars, headers, strict=True) if header is None]
    walked = iter(_identify(unknown, cache))
    shards = [
        next(walked) if header is None else _indexed(tar, header) for tar, header in zip(tars, headers, strict=True)
    ]
    for shard in shards:
        if shard.samples == 0:
            remedy = "leave this tar out"
            raise UserError(
                f"no samples in {redact(shard.place)}", expected="members named KEY.EXTENSION", remedy=remedy
            )
    return shards, ()


def _indexed(tar: str, header: IndexHeader) -> ShardEntry:
    damage = "is damaged: samples were lost before it was indexed" if header.damaged else ""
    return ShardEntry(tar, header.samples, header.tar_bytes, header.tar_hash, damage)


def _from_manifest(url: str, cache: CacheSettings) -> tuple[list[ShardEntry], tuple[str, ...]]:
    try:
        data = read_bytes(url, cache.limits)
    except MissingError:
        remedy = "upload the manifest of the packed folder, or name tars or a brace pattern instead of a folder"
        raise UserError(f"no {manifests.FILE_NAME} in {redact(parent(url))}", remedy=remedy) from None
    manifest = manifests.parse_manifest(data, redact(url))
    strange = next((record.name for record in manifest.shards if set(record.name) & set("%?#")), None)
    if strange is not None:
        remedy = "pack with a plain --name"
        raise UserError(f"a shard of {redact(url)} has a name that is no part of a URL", got=strange, remedy=remedy)
    folder, query = split_query(parent(url))
    shards = [
        ShardEntry(f"{folder}/{record.name}.tar{query}", record.samples, record.bytes, bytes.fromhex(record.xxh3_128))
        for record in manifest.shards
        if record.samples  # every row of a shard may have been skipped
    ]
    return shards, manifest.classes


def _header(tar: str, cache: CacheSettings) -> IndexHeader | None:
    """What the index beside a tar says of it; None where there is none."""
    url = index_url(tar)
    try:
        return parse_header(read_bytes(url, cache.limits, 0, HEADER_BYTES), redact(url))
    except (MissingError, DeniedError):  # object stores deny what is missing to those who may not list
        return None


def _lost(folder: Path, shard: Shard) -> int:
    try:
        return open_index(index_path(folder / f"{shard.key}.tar")).lost
    except UserError:  # evicted meanwhile
        return 0


def _identify(tars: list[str], cache: CacheSettings) -> Iterable[ShardEntry]:
    if not tars:
        return []
    hint = "`python -m data_tools index` writes indexes beside the tars, for good"
    print(f"{len(tars)} remote tars without an index are read whole to count their samples; {hint}", file=sys.stderr)
    opened = Cache(cache)

    def identify(tar: str) -> ShardEntry:
        samples, shard = opened.identify(tar)
        return ShardEntry(tar, samples, shard.size, shard.hash, describe_loss(_lost(opened.folder, shard), samples))

    shards = []
    with Progress("indexing", len(tars), "tars") as progress, ThreadPoolExecutor(_WALKS) as pool:
        for shard in pool.map(identify, tars):
            shards.append(shard)
            progress.update(len(shards))
    return shards
