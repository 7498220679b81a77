"""Which shards a run reads: manifests, tars and brace patterns, resolved to one ordered list."""

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.errors import UserError
from data_tools.redaction import redact, redact_source
from data_tools.remote.settings import CacheSettings, Shard, default_settings
from data_tools.remote.urls import expand_braces, is_remote
from data_tools.shards import manifest as manifests
from data_tools.shards.index import build_index, index_header, index_path, write_index
from data_tools.shards.remote_sources import ShardEntry, resolve_url


@dataclass(frozen=True, eq=False)
class Corpus:
    """An ordered list of shards.

    Attributes:
        paths: absolute tar paths; of remote shards the URLs without credentials, to be shown.
        counts: samples per shard, int64 [shards]; every count is positive.
        tar_bytes: size of each tar.
        digest: hex xxh3-128 over the ordered (samples, bytes, content hash): it names the content, not the place.
        classes: class names, () when the shards carry no labels.
        cut: those of `paths` whose tars are shorter than they were; reading a lost sample raises TarDamageError.
        urls: where the shards are read from; `paths` itself where no URL holds credentials.
        hashes: the 16 bytes of each tar's xxh3-128, one after the other.
        cache: where remote shards are kept; None for a corpus of local ones.
    """

    paths: tuple[str, ...]
    counts: np.ndarray
    tar_bytes: tuple[int, ...]
    digest: str
    classes: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    hashes: bytes = b""
    cache: CacheSettings | None = None

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return int(self.counts.sum())

    def remote(self, shard: int) -> Shard | None:
        """What the cache needs to know of a remote shard; None for a local one."""
        if self.cache is None or not is_remote(self.urls[shard]):
            return None
        return Shard(self.urls[shard], self.tar_bytes[shard], self.hashes[16 * shard : 16 * shard + 16])


def open_corpus(urls: str | os.PathLike | Iterable[str | os.PathLike], cache: CacheSettings | None = None) -> Corpus:
    """Resolve a folder with a manifest, a manifest, a tar, a brace pattern of tars, or a list of these; each may be a
    URL.

    A tar of another tool is indexed on first use, a remote one in the cache (default: in the user's cache folder). For
    packed folders the cost is one stat per shard, for remote ones one small file in all.
    Raises UserError for a missing or grown shard, a damaged tar without index, a damaged index, and an empty corpus.
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
    content = b"".join(struct.pack("<QQ16s", shard.samples, shard.tar_bytes, shard.digest) for shard in shards)
    places = tuple(shard.place for shard in shards)
    paths = tuple(map(redact_source, places))
    return Corpus(
        paths=paths,
        counts=np.array([shard.samples for shard in shards], np.int64),
        tar_bytes=tuple(shard.tar_bytes for shard in shards),
        digest=xxhash.xxh3_128_hexdigest(content),
        classes=classes,
        cut=tuple(shard.place for shard in shards if shard.cut),
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
        cut=tuple(path for corpus in corpora for path in corpus.cut),
        urls=tuple(url for corpus in corpora for url in corpus.urls),
        hashes=b"".join(corpus.hashes for corpus in corpora),
        cache=next((corpus.cache for corpus in corpora if corpus.cache), None),
    )


def tar_paths(url: str) -> list[Path]:
    """Expand one local source that is not a manifest: a tar or a brace pattern. Nothing is opened."""
    if is_remote(url):
        raise UserError(
            f"cannot read {redact(url)}", expected="local files", remedy="copy the shards to a local or mounted folder"
        )
    return [Path(path).absolute() for path in expand_braces(url)]


def _resolve(url: str, cache: CacheSettings) -> tuple[list[ShardEntry], tuple[str, ...]]:
    if is_remote(url):
        return resolve_url(url, cache)
    path = Path(url)
    if path.name == manifests.FILE_NAME or path.is_dir():
        return _from_manifest(path if path.name == manifests.FILE_NAME else path / manifests.FILE_NAME)
    return [_from_tar(tar) for tar in tar_paths(url)], ()


def _from_manifest(path: Path) -> tuple[list[ShardEntry], tuple[str, ...]]:
    manifest = manifests.read_manifest(path)
    folder = path.parent.absolute()
    shards = []
    for record in manifest.shards:
        tar = folder / f"{record.name}.tar"
        if record.samples:  # every row of a shard may have been skipped
            remedy = f"run `python -m data_tools verify {folder}`"
            is_cut = _is_cut(tar, record.bytes, f"recorded in {path}", remedy)
            shards.append(ShardEntry(str(tar), record.samples, record.bytes, bytes.fromhex(record.xxh3_128), is_cut))
    return shards, manifest.classes


def _from_tar(tar: Path) -> ShardEntry:
    if not tar.exists():
        raise _missing(tar)
    index = index_path(tar)
    if not index.exists():
        built = build_index(tar)
        try:
            write_index(built, index)
        except OSError as error:
            remedy = "copy the shards to a folder you may write to, or run `python -m data_tools index` there"
            raise UserError(f"cannot write the index of {tar} beside it", got=error.strerror, remedy=remedy) from None
    samples, size, digest = index_header(index)
    is_cut = _is_cut(tar, size, f"recorded in {index}", f"run `python -m data_tools index {tar}` if the tar is right")
    if samples == 0:
        raise UserError(f"no samples in {tar}", expected="members named KEY.EXTENSION", remedy="leave this tar out")
    return ShardEntry(str(tar), samples, size, digest, is_cut)


def _is_cut(tar: Path, size: int, recorded: str, remedy: str) -> bool:
    """Whether the tar is shorter than recorded: the samples that it still holds can be read."""
    try:
        found = tar.stat().st_size
    except FileNotFoundError:
        raise _missing(tar) from None
    if found > size:
        raise UserError(
            f"size of shard {tar} changed", got=f"{found} bytes", expected=f"{size} {recorded}", remedy=remedy
        )
    return found < size


def _missing(tar: Path) -> UserError:
    if tar.suffix != ".tar":
        expected = "a packed folder, its manifest.json, a tar or a brace pattern of tars"
        return UserError(f"no corpus at {tar}", expected=expected, remedy="check the path; `data_tools pack` makes one")
    return UserError(f"missing shard {tar}", remedy="check the path or pattern, or copy the shard back")
