"""Input adapter: a CSV, TSV, JSONL or Parquet table with an image path and captions or a label per row."""

import os
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UsageError, UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import as_texts
from data_tools.pack.delimited import Dialect
from data_tools.pack.records import read_records
from data_tools.pack.rows import Row, Source

_PROBED = 32


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and the filter: `where` holds (column, value) pairs that all must hold."""

    image: str = "image"
    caption: str | None = None
    label: str | None = None
    where: tuple[tuple[str, str], ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that the table must have, the image's first."""
        named = (self.image, self.caption, self.label, *(name for name, _ in self.where))
        return tuple(name for name in named if name)


_PLAIN = Dialect()


def read_table(path: Path, columns: Columns, image_root: Path | None, dialect: Dialect = _PLAIN) -> Source:
    """Read every row that passes the filter. Class names come from all rows, so that splits share their numbers."""
    rows, labels, total = [], set(), 0
    caption = None
    notes: list[str] = []
    for source, values, fault in read_records(path, dialect, columns.wanted, notes):
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
    return Source(root, rows, captioned=bool(caption), labels=names, notes=notes)


def _check_columns(path: Path, values: dict, columns: Columns) -> str:
    """The caption column, "" for none; raises UsageError for a column that the table lacks."""
    found = ", ".join(values)
    named = {"--image-column": columns.image, "--caption-column": columns.caption, "--label-column": columns.label}
    for option, name in [*named.items(), *(("--where", name) for name, _ in columns.where)]:
        if name is not None and name not in values:
            remedy = "add --quotes csv" if f'"{name}"' in values else f"name the right one with {option}"
            raise UsageError(f"no column {name!r} in {path}", got=found, remedy=remedy)
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
