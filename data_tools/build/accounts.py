"""The account of a shard: one parquet row per input row, packed or skipped, and the shard's record in its footer."""

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import xxhash

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write
from data_tools.format.index import index_header, index_path
from data_tools.format.manifest import FILE_NAME, ShardRecord, read_manifest
from data_tools.media.captions import clean

PACKED, SKIPPED = "packed", "skipped"
_RECORD = b"dualstream.shard"
_BATCH = 4096

# Frozen: later verbs fill columns in, they do not add or rename any.
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),  # of the sample: path of its image, and `#n` for caption n under --pairs
        ("key", pyarrow.string()),  # of the sample in the tar
        ("source", pyarrow.string()),  # of the row: image path, or table:line
        ("status", pyarrow.string()),  # packed | skipped
        ("error_class", pyarrow.string()),
        ("error", pyarrow.string()),
        ("width", pyarrow.int32()),  # of the stored image, as are the next three
        ("height", pyarrow.int32()),
        ("bytes", pyarrow.int64()),
        ("sha256", pyarrow.string()),
        ("phash", pyarrow.uint64()),  # perceptual hash, null until de-duplication
        ("captions", pyarrow.list_(pyarrow.string())),
        ("label", pyarrow.string()),
        ("metadata", pyarrow.string()),  # JSON
    ]
)


def write_account(folder: Path, record: ShardRecord, digest: str, rows: list[dict]) -> ShardRecord:
    """Commit the account of a shard that was made under the plan `digest`: a dict for each input row, in the order of
    its samples, by the names of SCHEMA. Returns the completed record."""
    classes = Counter(row["error_class"] for row in rows if row["error_class"])
    record = replace(record, rows=len(rows), skipped=dict(sorted(classes.items())))
    footer = {_RECORD: json.dumps({**asdict(record), "digest": digest}, sort_keys=True)}
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows, SCHEMA.with_metadata(footer))
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    with atomic_write(folder / f"{record.name}.parquet") as file:
        file.write(data)
    return replace(record, parquet_xxh3_128=xxhash.xxh3_128_hexdigest(data))


def committed_record(folder: Path, name: str, digest: str) -> ShardRecord | None:
    """The record of a shard that an earlier run of the same plan committed; None if it has to be packed."""
    path, tar = folder / f"{name}.parquet", folder / f"{name}.tar"
    try:
        footer = json.loads((pq.read_schema(path).metadata or {})[_RECORD])
        found = index_header(index_path(tar))
        same_plan = footer.pop("digest") == digest
        record = ShardRecord(**{**footer, "parquet_xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes())})
        sound = found == (record.samples, tar.stat().st_size, bytes.fromhex(record.xxh3_128), False)
    except (OSError, KeyError, TypeError, ValueError, UserError, pyarrow.ArrowException):
        return None
    return record if same_plan and sound else None


def account_paths(folder: Path) -> list[Path]:
    """The accounts of a packed folder by its manifest; of one in which nothing was packed those that lie there."""
    if (folder / FILE_NAME).exists():
        return [folder / f"{record.name}.parquet" for record in read_manifest(folder / FILE_NAME).shards]
    return [path for path in sorted(folder.glob("*.parquet")) if _is_account(path)]


def remove_orphans(folder: Path) -> None:
    """Delete the accounts that stand alone, which a pack that packed nothing has left; the caller holds the folder."""
    for path in folder.glob("*.parquet"):
        if _is_account(path) and not path.with_suffix(".tar").exists():
            path.unlink()


def _is_account(path: Path) -> bool:
    try:
        return _RECORD in (pq.read_schema(path).metadata or {})
    except (OSError, pyarrow.ArrowException):
        return False


def read_account(path: Path, columns: list[str]) -> pyarrow.Table:
    """Columns of an account. Raises UserError when it is missing, damaged or none."""
    remedy = "delete it and run the same pack again"
    try:
        table = pq.read_table(path, columns=columns, partitioning=None)
    except FileNotFoundError:
        raise UserError(f"no account {path}", remedy="run the same pack again, it makes up what is missing") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read the account {path}", got=error, remedy=remedy) from None
    expected = pyarrow.schema([SCHEMA.field(name) for name in columns])
    if not table.schema.equals(expected):
        what, got = f"{path} is no account of a pack", ", ".join(map(str, table.schema)) or "none of its columns"
        raise UserError(what, got=got, expected=", ".join(map(str, expected)), remedy=remedy)
    return table


def read_accounts(folder: Path) -> Iterator[dict]:
    """Every row of a packed folder, by the columns of SCHEMA. Raises UserError where there is no account."""
    paths = account_paths(folder) if folder.is_dir() else []
    if not paths:
        what = f"no account of rows in {folder}" if folder.is_dir() else f"no such folder: {folder}"
        raise UserError(what, expected="a folder that `data_tools pack` wrote")
    for path in paths:
        for batch in read_account(path, SCHEMA.names).to_batches(_BATCH):
            yield from batch.to_pylist()


def to_json(value: object) -> str:
    """Strict JSON, one way to write each value: sorted keys, null for infinities, text for what JSON cannot hold."""
    text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return clean(text)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
