"""Input adapter: a CSV, TSV, JSONL or Parquet table with an image path and captions or a label per row."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UsageError, UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import as_texts
from data_tools.pack.rows import Row, Source

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_PROBED = 32
_FIELD_LIMIT = 1 << 24


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and the filter: `where` holds (column, value) pairs that all must hold."""

    image: str = "image"
    caption: str | None = None
    label: str | None = None
    where: tuple[tuple[str, str], ...] = ()


def read_table(path: Path, columns: Columns, image_root: Path | None) -> Source:
    """Read every row that passes the filter. Class names come from all rows, so that splits share their numbers."""
    records = _READERS[path.suffix.lower()](path)
    rows, labels, total = [], set(), 0
    caption = None
    for source, values, fault in records:
        total += 1
        if fault:
            rows.append(Row(source, "", fault=("bad_row", fault)))
            continue
        if caption is None:
            caption = _check_columns(path, values, columns)
        label = _text(values.get(columns.label)) if columns.label else None
        labels.add(label)
        if all(_text(values.get(name)) == wanted for name, wanted in columns.where):
            rows.append(_row(source, values, columns, caption, label))
    if not rows:
        filters = " ".join(f"{name}={value}" for name, value in columns.where)
        raise UserError(
            f"no rows in {path}", got=f"{total} rows, 0 of them with {filters}" if total else "an empty table"
        )
    root = image_root or _image_root(path.parent, rows)
    for row in rows:
        row.image = _relative(row.image, root)
    names = _ordered({label for label in labels if label}) if columns.label else None
    return Source(root, rows, captioned=bool(caption), labels=names)


def _check_columns(path: Path, values: dict, columns: Columns) -> str:
    """The caption column, "" for none; raises UsageError for a column that the table lacks."""
    found = ", ".join(values)
    named = {"--image-column": columns.image, "--caption-column": columns.caption, "--label-column": columns.label}
    for option, name in [*named.items(), *(("--where", name) for name, _ in columns.where)]:
        if name is not None and name not in values:
            raise UsageError(f"no column {name!r} in {path}", got=found, remedy=f"name the right one with {option}")
    caption = columns.caption or next((name for name in ("caption", "captions") if name in values), "")
    if not caption and not columns.label:
        raise UsageError(f"no column 'caption' in {path}", got=found, remedy="name it with --caption-column")
    return caption


def _row(source: str, values: dict, columns: Columns, caption: str, label: str | None) -> Row:
    used = {columns.image, caption, columns.label}
    row = Row(source, _text(values.get(columns.image)), label=label)
    row.metadata = {name: value for name, value in values.items() if name not in used}
    try:
        row.captions = as_texts(values.get(caption)) if caption else []
    except BadSampleError as error:
        row.fault = ("bad_row", error.reason)
    return row


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _ordered(labels: set[str]) -> tuple[str, ...]:
    """By name; numbers by value, so that labels 0..9 keep their numbers."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _image_root(folder: Path, rows: list[Row]) -> Path:
    """The table's folder, or its `images/` where that holds more of the first files."""
    probed = [row.image for row in rows if row.image][:_PROBED]
    roots = (folder, folder / "images")
    return max(roots, key=lambda root: sum((root / image).is_file() for image in probed))


def _relative(image: str, root: Path) -> str:
    if not image:
        return ""
    if os.path.isabs(image) and Path(image).is_relative_to(root.absolute()):
        image = os.path.relpath(image, root.absolute())
    return os.path.normpath(image)


Record = tuple[str, dict, str | None]


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(_FIELD_LIMIT)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            yield from _csv_records(reader, path.name)
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"{path} near line {reader.line_num + 1}"
            raise UserError(f"cannot read {where}", got=error, expected="UTF-8") from None


def _csv_records(reader: Any, name: str) -> Iterator[Record]:
    header: list[str] = next(reader, [])
    line = reader.line_num + 1
    for fields in reader:
        source, line = f"{name}:{line}", reader.line_num + 1
        if not fields:
            continue
        fits = len(fields) == len(header)
        fault = None if fits else f"{len(fields)} fields, the header has {len(header)}"
        yield source, dict(zip(header, fields, strict=False)), fault


def _read_jsonl(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            source, values, fault = f"{path.name}:{number}", {}, None
            try:
                values = json.loads(line)
                fault = None if isinstance(values, dict) else "not a JSON object"
            except (ValueError, RecursionError) as error:  # no JSON, or nested without end
                fault = f"not JSON: {error}"
            yield source, values, fault


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield f"{path.name}:{number}", values, None
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read {path}", got=error) from None


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
