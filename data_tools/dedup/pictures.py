"""The hashes of all pictures of a corpus, and the classes of those that nothing tells apart.

Arrays over the whole corpus are few and let go as soon as they can be: at 1e8 pictures each takes 0.4 or 0.8 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow

from data_tools.columns.column import read_column
from data_tools.corpus import Corpus
from data_tools.dedup.near import either
from data_tools.format.index import index_path, open_index
from data_tools.hashing.maker import NAME
from data_tools.progress import Progress

_FIELDS = ("sha256", "phash", "width", "height", "caption_length")
_CAPTION_BITS = 20
_PARTS = 16  # into which hashes are cut to be numbered, so that sorting them takes little memory
_CHUNK = 1 << 24  # positions that are looked at at once
NONE = -1  # of a sample without a picture: it has no class


@dataclass
class Pictures:
    """n samples in the corpus's order.

    Attributes:
        looks: uint64 [n], the hash in the form of `near.either`; 0 where `known` is not.
        known: bool [n], whether there is such a hash.
        rank: uint64 [n], larger for the better copy: more pixels, then a longer caption.
        unhashed: the sha256 of those with a picture and without a hash, by their position.
    """

    looks: np.ndarray
    known: np.ndarray
    rank: np.ndarray
    unhashed: dict[int, bytes] = field(default_factory=dict)


def read_pictures(corpus: Corpus) -> Pictures:
    """Raises UserError where a shard has no column of hashes, or one of other bytes."""
    n = corpus.num_samples
    found, at = Pictures(np.zeros(n, np.uint64), np.zeros(n, bool), np.zeros(n, np.uint64)), 0
    for table in tables(corpus, _FIELDS):
        here = slice(at, at + len(table))
        known = table["phash"].is_valid().to_numpy()
        found.known[here] = known
        found.looks[here] = np.where(known, either(_whole(table, "phash")), 0)
        found.rank[here] = _rank(table)
        without = np.flatnonzero(~known)
        sha256 = table["sha256"].take(without).to_pylist()
        found.unhashed |= {at + row: one for row, one in zip(without.tolist(), sha256, strict=True) if one is not None}
        at += len(table)
    return found


def tables(corpus: Corpus, fields: tuple[str, ...]) -> Iterator[pyarrow.Table]:
    """These fields of the column of hashes, of one shard after the other."""
    with Progress("reading hashes", len(corpus.paths), "shards") as progress:
        for number, path in enumerate(corpus.paths):
            ids = open_index(index_path(Path(path))).key_hashes
            yield read_column(Path(path), NAME, corpus.tar_hash(number), fields, ids)
            progress.update(number + 1)


def _whole(table: pyarrow.Table, name: str) -> np.ndarray:
    return table[name].fill_null(0).to_numpy().astype(np.uint64)


def _rank(table: pyarrow.Table) -> np.ndarray:
    pixels = _whole(table, "width") * _whole(table, "height")
    caption = np.minimum(_whole(table, "caption_length"), np.uint64((1 << _CAPTION_BITS) - 1))
    return (np.minimum(pixels, np.uint64((1 << 40) - 1)) << np.uint64(_CAPTION_BITS)) | caption


@dataclass
class Classes:
    """Pictures that nothing tells apart.

    Attributes:
        of: int [n], the class of each sample; NONE without a picture.
        looks: uint64 [hashed], rising: the hash of each of the first classes; the others have none.
        rank: uint64 [classes], the highest of each.
        best: int [classes], the position of the first picture of that rank.
    """

    of: np.ndarray
    looks: np.ndarray
    rank: np.ndarray
    best: np.ndarray


def classes_of(pictures: Pictures) -> Classes:
    """Pictures of one hash; of those without a hash the ones of the same bytes. It empties `pictures`."""
    place = np.int32 if len(pictures.looks) < 2**31 else np.int64
    of, looks = np.full(len(pictures.looks), NONE, place), np.empty(np.count_nonzero(pictures.known), np.uint64)
    count, shift = 0, np.uint64(64 - _PARTS.bit_length() + 1)
    for part in range(_PARTS):
        here = np.flatnonzero(pictures.known & (pictures.looks >> shift == part))
        values, numbers = np.unique(pictures.looks[here], return_inverse=True)
        of[here] = count + numbers
        looks[count : count + len(values)] = values
        count += len(values)
    pictures.looks = pictures.known = np.empty(0)
    looks.resize(count, refcheck=False)
    numbers_of = {value: count + number for number, value in enumerate(dict.fromkeys(pictures.unhashed.values()))}
    for position, sha256 in pictures.unhashed.items():
        of[position] = numbers_of[sha256]
    rank, best = _best(of, pictures.rank, count + len(numbers_of))
    pictures.rank = np.empty(0)
    return Classes(of, looks, rank, best)


def _best(of: np.ndarray, rank: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    highest, best = np.zeros(count, np.uint64), np.empty(count, of.dtype)
    for here in chunks(len(of)):
        there = of[here] != NONE
        np.maximum.at(highest, of[here][there], rank[here][there])
    for here in reversed(chunks(len(of))):
        found = here.start + np.flatnonzero(of[here] != NONE)[::-1]
        found = found[rank[found] == highest[of[found]]]
        best[of[found]] = found  # of several that are written, the last stays: the first picture
    return highest, best


def chunks(count: int) -> list[slice]:
    """Of so many positions, one after the other."""
    return [slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
