"""One column of one shard: a parquet beside the tar, a row a sample in the tar's order, and in its footer what it was
made of and by.

A column belongs to the bytes of its shard: it is joined by (hash of the tar, row), and the ids are compared as well,
since keys repeat in corpora of other tools. One that was made of other bytes is stale, and never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import xxhash

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write, remove_temporaries

ID = pyarrow.field("id", pyarrow.uint64())  # xxh3-64 of the sample's key
ERROR = pyarrow.field("error", pyarrow.string())  # the kind of fault of a sample without values, null of all others
WEIGHT = "sample_weight"  # of a column that says how likely a sample is taken: 0 never, 1 always
_FOOTER = b"dualstream.column"
_NAME = re.compile("[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Footer:
    """What a column file says of itself.

    Attributes:
        tar_xxh3_128: of the shard that it belongs to, in hex.
        samples: rows, one a sample.
        made_by: what the values follow from, beside the shard.
        values_xxh3_128: of the rows, in hex; "" where it is not yet known.
    """

    tar_xxh3_128: str
    samples: int
    made_by: dict
    values_xxh3_128: str = ""


def column_path(tar: Path, name: str) -> Path:
    """Where the column `name` of a shard lies. Raises ValueError for what is no name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"no name of a column: {name!r}")
    return tar.with_suffix(f".{name}.parquet")


def remove_unfinished(folder: Path, name: str) -> None:
    """Delete what killed writers of the column `name` left in a folder."""
    remove_temporaries(folder, f".{name}.parquet")


def write_column(tar: Path, name: str, footer: Footer, rows: pyarrow.Table) -> None:
    """Commit a column of a shard: `rows` begin with ID and end with ERROR."""
    text = json.dumps({**asdict(footer), "values_xxh3_128": _hash(rows)}, sort_keys=True)
    sink = pyarrow.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({_FOOTER: text}), sink, compression="zstd")
    with atomic_write(column_path(tar, name)) as file:
        file.write(sink.getvalue())


def read_footer(tar: Path, name: str) -> Footer | None:
    """What a column file says of itself; None where it is missing, damaged or something else."""
    try:
        found = json.loads((pq.read_schema(column_path(tar, name)).metadata or {})[_FOOTER])
        return Footer(**found)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, pyarrow.ArrowException):
        return None


def read_column(tar: Path, name: str, tar_hash: bytes, fields: Sequence[str], ids: np.ndarray) -> pyarrow.Table:
    """These fields of a column, a row for each sample of the shard.

    Args:
        tar: the shard.
        tar_hash: the xxh3-128 of its bytes, by its index or manifest.
        ids: of its samples, uint64 [samples], by its index.

    Raises:
        UserError: the column is missing, damaged, or was made of other bytes than the shard has.
    """
    path, remedy = column_path(tar, name), f"run `python -m data_tools {name}` on the shards again"
    try:
        table = pq.read_table(path, columns=[ID.name, *fields], partitioning=None)
    except FileNotFoundError:
        raise UserError(f"shard {tar} has no column {name}", expected=path.name, remedy=remedy) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read the column {path}", got=error, remedy=remedy) from None
    footer = read_footer(tar, name)
    if footer is None or table.column_names != [ID.name, *fields]:
        expected = ", ".join([ID.name, *fields])
        raise UserError(f"{path} is no such column", got=table.column_names, expected=expected, remedy=remedy)
    if footer.tar_xxh3_128 != tar_hash.hex():
        what = f"the column {path} was made of another shard"
        raise UserError(what, got=footer.tar_xxh3_128, expected=tar_hash.hex(), remedy=remedy)
    if not np.array_equal(table[ID.name].to_numpy(), ids):
        raise UserError(f"the column {path} names other samples than its shard has", remedy=remedy)
    return table.drop_columns([ID.name])


def _hash(rows: pyarrow.Table) -> str:
    """Hex xxh3-128 of the rows themselves, however a file compresses them."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows.combine_chunks())
    return xxhash.xxh3_128_hexdigest(sink.getvalue())
