"""What goes, as a column beside each shard and as a list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import xxhash

from data_tools.columns.column import ERROR, ID, WEIGHT, Footer, read_footer, remove_unfinished, write_column
from data_tools.columns.make import folders_of, register
from data_tools.corpus import Corpus, ShardReader
from data_tools.dedup.find import Goes
from data_tools.format.index import index_path, open_index
from data_tools.hashing import maker
from data_tools.listing import write_rows
from data_tools.progress import Progress

NAME = "dedup"
_RULE = 1
SCHEMA = pyarrow.schema(
    [
        (WEIGHT, pyarrow.float32()),  # 0 of what goes, 1 of what stays
        ("kept_shard", pyarrow.string()),  # xxh3-128 of the tar of what stays instead, in hex; null of what stays
        ("kept_row", pyarrow.int32()),  # of it in that shard
        ("distance", pyarrow.uint8()),  # bits between the two
        ("same_bytes", pyarrow.bool_()),
    ]
)
_LISTED = ("shard", "row", "key", "kept_shard", "kept_row", "kept_key", "distance", "same_bytes")


def write_columns(corpus: Corpus, goes: Goes, same: np.ndarray, radius: int) -> None:
    """Commit the column of every shard, then tell the manifests. What is found follows from all hashes together, so the
    column is another where any of them is. `same`: of `same_bytes`."""
    tars = [Path(path) for path in corpus.paths]
    hashes = "".join(footer.values_xxh3_128 for tar in tars if (footer := read_footer(tar, maker.NAME)))
    made_by = {"rule": _RULE, "radius": radius, "hashes": xxhash.xxh3_128_hexdigest(hashes.encode())}
    for folder in folders_of(corpus):
        remove_unfinished(folder, NAME)
    edges = np.concatenate([[0], np.cumsum(corpus.counts)])
    with Progress("writing", len(tars), "shards") as progress:
        for number, tar in enumerate(tars):
            first, last = np.searchsorted(goes.position, edges[number : number + 2])
            rows = goes.position[first:last] - edges[number]
            told = _told(corpus, Goes(rows, goes.kept[first:last], goes.distance[first:last]), same[first:last])
            footer = Footer(corpus.tar_hash(number).hex(), int(corpus.counts[number]), made_by)
            write_column(tar, NAME, footer, _spread(told, rows, open_index(index_path(tar)).key_hashes))
            progress.update(number + 1)
    register(corpus, NAME)


def _told(corpus: Corpus, goes: Goes, same: np.ndarray) -> dict[str, list]:
    """Of those that go, the values by field."""
    places = [corpus.locate(position) for position in goes.kept.tolist()]
    return {
        WEIGHT: [0.0] * len(places),
        "kept_shard": [corpus.tar_hash(shard).hex() for shard, _ in places],
        "kept_row": [row for _, row in places],
        "distance": goes.distance.tolist(),
        "same_bytes": same.tolist(),
    }


def _spread(told: dict[str, list], rows: np.ndarray, ids: np.ndarray) -> pyarrow.Table:
    """A row for each sample of a shard, of which these rows go."""
    place = np.full(len(ids), -1)
    place[rows] = np.arange(len(rows))
    where = pyarrow.array(place, mask=place < 0)
    columns = [pyarrow.array(ids)]
    for field in SCHEMA:
        values = pyarrow.array(told[field.name], field.type).take(where)
        columns.append(values.fill_null(1.0) if field.name == WEIGHT else values)
    columns.append(pyarrow.nulls(len(ids), ERROR.type))
    return pyarrow.table(columns, schema=pyarrow.schema([ID, *SCHEMA, ERROR]))


def write_list(path: Path, corpus: Corpus, goes: Goes, same: np.ndarray) -> None:
    """A row for everything that goes, in the corpus's order, as .csv or .jsonl."""
    write_rows(path, list(_LISTED), _listed(corpus, goes, same))


def _listed(corpus: Corpus, goes: Goes, same: np.ndarray) -> Iterator[dict]:
    with ShardReader(corpus) as reader:
        for one, position in enumerate(goes.position.tolist()):
            (shard, row), (kept_shard, kept_row) = corpus.locate(position), corpus.locate(int(goes.kept[one]))
            keys = reader.key(shard, row), reader.key(kept_shard, kept_row)
            yield {
                "shard": corpus.paths[shard],
                "row": row,
                "key": keys[0],
                "kept_shard": corpus.paths[kept_shard],
                "kept_row": kept_row,
                "kept_key": keys[1],
                "distance": int(goes.distance[one]),
                "same_bytes": bool(same[one]),
            }
