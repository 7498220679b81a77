"""Which shards a run reads: manifests, folders, tars and patterns, resolved to one ordered list."""

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from data_tools.corpus.remote_sources import ShardEntry, describe_loss, resolve_url
from data_tools.corpus.sources import find, missing
from data_tools.errors import UserError
from data_tools.format import manifest as manifests
from data_tools.format.index import IndexHeader, index_header, index_path, open_index, write_index
from data_tools.format.survey import build_index
from data_tools.redaction import redact_source
from data_tools.remote.settings import CacheSettings, Shard, default_settings
from data_tools.remote.urls import is_remote


@dataclass(frozen=True, eq=False)
class Corpus:
    """An ordered list of shards.

    Attributes:
        paths: absolute tar paths; of remote shards the URLs without credentials, to be shown.
        counts: samples per shard, int64 [shards]; every count is positive.
        tar_bytes: size of each tar.
        digest: hex xxh3-128 over the ordered (samples, bytes, content hash): it names the content, not the place.
        classes: class names, () when the shards carry no labels.
        damaged: a line for each shard that lost samples, naming it; reading a lost sample raises TarDamageError.
        urls: where the shards are read from; `paths` itself where no URL holds credentials.
        hashes: the 16 bytes of each tar's xxh3-128, one after the other.
        cache: where remote shards are kept; None for a corpus of local ones.
    """

    paths: tuple[str, ...]
    counts: np.ndarray
    tar_bytes: tuple[int, ...]
    digest: str
    classes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    hashes: bytes = b""
    cache: CacheSettings | None = None

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return int(self.counts.sum())

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)])  # [shards + 1]

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, number within it) of the sample at `position`, shards one after the other. Raises IndexError."""
        if not 0 <= position < self._edges[-1]:
            raise IndexError(f"sample {position} of {self._edges[-1]}")
        shard = int(np.searchsorted(self._edges, position, "right")) - 1
        return shard, int(position - self._edges[shard])

    def tar_hash(self, shard: int) -> bytes:
        """The xxh3-128 that the tar of a shard should have."""
        return self.hashes[16 * shard : 16 * shard + 16]

    def remote(self, shard: int) -> Shard | None:
        """What the cache needs to know of a remote shard; None for a local one."""
        if self.cache is None or not is_remote(self.urls[shard]):
            return None
        return Shard(self.urls[shard], self.tar_bytes[shard], self.tar_hash(shard))


def open_corpus(urls: str | os.PathLike | Iterable[str | os.PathLike], cache: CacheSettings | None = None) -> Corpus:
    """Resolve a source (see `sources.find`) or a list of them; each may be a URL.

    A tar of another tool is indexed on first use, a remote one in the cache (default: in the user's cache folder). For
    packed folders the cost is one stat per shard, for remote ones one small file in all.
    Raises UserError for a shard that is missing, grown or named twice, a tar in which nothing can be read, a damaged
    index or manifest, and an empty corpus.
    """
    sources = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    settings = cache or default_settings()
    shards: list[ShardEntry] = []
    classes: tuple[str, ...] = ()
    for source in sources:
        found, names = _resolve(os.fspath(source), settings)
        shards += found
        if names and classes and names != classes:
            raise UserError(
                f"class names of {redact_source(os.fspath(source))} differ from those of the sources before",
                got=names,
                expected=classes,
            )
        classes = classes or names
    if not shards:
        named = ", ".join(redact_source(os.fspath(source)) for source in sources)
        raise UserError("the corpus is empty", got=named or "no source", expected="a sample or more")
    _refuse_twice(shards)
    content = b"".join(struct.pack("<QQ16s", shard.samples, shard.tar_bytes, shard.digest) for shard in shards)
    places = tuple(shard.place for shard in shards)
    paths = tuple(map(redact_source, places))
    return Corpus(
        paths=paths,
        counts=np.array([shard.samples for shard in shards], np.int64),
        tar_bytes=tuple(shard.tar_bytes for shard in shards),
        digest=xxhash.xxh3_128_hexdigest(content),
        classes=classes,
        damaged=tuple(f"{redact_source(shard.place)} {shard.damage}" for shard in shards if shard.damage),
        urls=paths if paths == places else places,
        hashes=b"".join(shard.digest for shard in shards),
        cache=settings if any(map(is_remote, places)) else None,
    )


def join_corpora(corpora: Sequence[Corpus]) -> Corpus:
    """The shards of several corpora, one after the other; the digest also tells where each begins."""
    if len(corpora) == 1:
        return corpora[0]
    named = {corpus.classes for corpus in corpora if corpus.classes}
    if len(named) > 1:
        first, other = sorted(named)[:2]
        raise UserError("the sources have different class names", got=other, expected=first)
    return Corpus(
        paths=tuple(path for corpus in corpora for path in corpus.paths),
        counts=np.concatenate([corpus.counts for corpus in corpora]),
        tar_bytes=tuple(size for corpus in corpora for size in corpus.tar_bytes),
        digest=xxhash.xxh3_128_hexdigest("".join(corpus.digest for corpus in corpora).encode()),
        classes=next(iter(named), ()),
        damaged=tuple(line for corpus in corpora for line in corpus.damaged),
        urls=tuple(url for corpus in corpora for url in corpus.urls),
        hashes=b"".join(corpus.hashes for corpus in corpora),
        cache=next((corpus.cache for corpus in corpora if corpus.cache), None),
    )


def _refuse_twice(shards: list[ShardEntry]) -> None:
    """Its samples would count twice, and an epoch would no longer be each sample once."""
    seen: dict[object, str] = {}
    for shard in shards:
        file = shard.identity or shard.place
        first = seen.get(file)
        if first is not None:
            got = "the same path again" if first == shard.place else f"the same file as {redact_source(first)}"
            remedy = "name it once; data.train.N.repeat and weight let a source count more"
            raise UserError(f"shard {redact_source(shard.place)} is named twice", got=got, remedy=remedy)
        seen[file] = shard.place


def _resolve(url: str, cache: CacheSettings) -> tuple[list[ShardEntry], tuple[str, ...]]:
    if is_remote(url):
        return resolve_url(url, cache)
    shards: list[ShardEntry] = []
    names: tuple[str, ...] = ()
    for found in find(url):
        if found.manifest:
            entries, classes = _from_manifest(found.manifest)
        else:
            entries, classes = [_from_tar(tar) for tar in found.tars], found.classes
        if names and classes and names != classes:
            raise UserError(f"the folders of {url} have different class names", got=classes, expected=names)
        shards, names = shards + entries, names or classes
    return shards, names


def _from_manifest(path: Path) -> tuple[list[ShardEntry], tuple[str, ...]]:
    manifest = manifests.read_manifest(path)
    shards = []
    for record in manifest.shards:
        tar = path.parent / f"{record.name}.tar"
        if record.samples:  # every row of a shard may have been skipped
            remedy = f"run `python -m data_tools verify {path.parent}`"
            identity, is_cut = _measure(tar, record.bytes, f"recorded in {path}", remedy)
            digest, damage = bytes.fromhex(record.xxh3_128), "is cut" if is_cut else ""
            shards.append(ShardEntry(str(tar), record.samples, record.bytes, digest, damage, identity))
    return shards, manifest.classes


def _from_tar(tar: Path) -> ShardEntry:
    if not tar.exists():
        raise missing(tar)
    index = index_path(tar)
    if not index.exists():
        built = build_index(tar)
        try:
            write_index(built, index)
        except OSError as error:
            remedy = "copy the shards to a folder you may write to, or run `python -m data_tools index` there"
            raise UserError(f"cannot write the index of {tar} beside it", got=error.strerror, remedy=remedy) from None
    header = index_header(index)
    remedy = f"run `python -m data_tools index {tar}` if the tar is right"
    identity, is_cut = _measure(tar, header.tar_bytes, f"recorded in {index}", remedy)
    if header.samples == 0:
        raise UserError(f"no samples in {tar}", expected="members named KEY.EXTENSION", remedy="leave this tar out")
    damage = "is cut" if is_cut else _damage(index, header)
    return ShardEntry(str(tar), header.samples, header.tar_bytes, header.tar_hash, damage, identity)


def _damage(index: Path, header: IndexHeader) -> str:
    if not header.damaged:
        return ""
    return describe_loss(open_index(index).lost, header.samples)


def _measure(tar: Path, size: int, recorded: str, remedy: str) -> tuple[tuple[int, int], bool]:
    """What file the tar is, under any name, and whether it is shorter than recorded: the samples that it still holds
    can be read."""
    try:
        found = tar.stat()
    except FileNotFoundError:
        raise missing(tar) from None
    except OSError as error:
        raise UserError(f"cannot read shard {tar}", got=error.strerror, remedy="check the disk or mount") from None
    if found.st_size > size:
        got = f"{found.st_size} bytes"
        raise UserError(f"size of shard {tar} changed", got=got, expected=f"{size} {recorded}", remedy=remedy)
    return (found.st_dev, found.st_ino), found.st_size < size
