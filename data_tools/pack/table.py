"""Input adapter: a CSV, TSV, JSONL or Parquet table with an image path and captions or a label per row."""

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UsageError, UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import as_texts
from data_tools.media.image import SNIFFED, SUFFIXES, sniff
from data_tools.pack.annotations import ANNOTATIONS, image_roots
from data_tools.pack.delimited import Dialect
from data_tools.pack.huggingface import read_dataset
from data_tools.pack.inside import PATH_MAX, Boundary
from data_tools.pack.labels import class_name, in_order
from data_tools.pack.records import CAPTION_COLUMNS, read_records
from data_tools.pack.rows import Row, Source
from data_tools.pack.span import Span, Spool

_PROBED = 32
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]{0,30}://|data:[a-z]+/")
_IS_URL = "url"
_FETCH = "fetch the pictures first; img2dataset writes tars, which `python -m data_tools index` takes"


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


@dataclass(frozen=True)
class Held:
    """How pictures within the files of a dataset are taken."""

    spool: Spool
    follow_links: bool = False


_PLAIN = Dialect()


def read_table(
    path: Path,
    columns: Columns,
    image_root: Path | None,
    dialect: Dialect = _PLAIN,
    annotations: str | None = None,
    held: Held | None = None,
) -> Source:
    """Read every row that passes the filter: of a table, of the caption file that `annotations` names, or of a dataset
    whose pictures are `held` in its files. Class names come from all rows, so that splits share their numbers; with a
    label column captions are optional.

    Raises UserError for a file that cannot be read, and for a column of pictures or URLs where paths are needed.
    """
    rows, labels, total = [], set(), 0
    caption = None
    notes: list[str] = []
    kind = ANNOTATIONS[annotations] if annotations else None
    if held:
        boundary = Boundary(path if path.is_dir() else path.parent, held.follow_links)
        records = read_dataset(path, columns.image, held.spool, boundary, notes)
    else:
        records = kind.records(path) if kind else read_records(path, dialect, columns.wanted, notes)
    for source, values, fault in records:
        total += 1
        if fault:
            rows.append(Row(source, "", fault=("bad_row", fault)))
            continue
        if caption is None:
            caption = _check_columns(path, values, columns)
        row = _row(source, values, columns, caption)
        if row.label:
            labels.add(row.label)
        if all(_same(values.get(name), wanted) for name, wanted in columns.where):
            rows.append(row)
    filters = " ".join(f"{name}={value}" for name, value in columns.where)
    if not rows:
        raise UserError(
            f"no rows in {path}", got=f"{total} rows, 0 of them with {filters}" if total else "an empty table"
        )
    if filters:
        notes.append(f"kept {len(rows)} of {total} rows, those with {filters}")
    _check_urls(path, columns.image, rows)
    folder = path if path.is_dir() else path.parent
    root = image_root or _image_root(image_roots(path) if kind else (folder, folder / "images"), rows)
    for row in rows:
        row.image = row.image if row.span else _relative(row.image, root)
    names = in_order(labels) if columns.label else None
    return Source(
        root,
        rows,
        captioned=bool(caption) and not columns.label,
        labels=names,
        notes=notes,
        spool=held.spool if held else None,
    )


def _check_columns(path: Path, values: dict, columns: Columns) -> str:
    """The caption column, "" for none; raises UsageError for a column that the table lacks, UserError for one that
    holds no paths."""
    found = ", ".join(map(str, values))
    named = {"--image-column": columns.image, "--caption-column": columns.caption, "--label-column": columns.label}
    for option, name in [*named.items(), *(("--where", name) for name, _ in columns.where)]:
        if name is not None and name not in values:
            remedy = _instead(values, name, option)
            raise UsageError(f"no column {name!r} in {path}", got=found, remedy=remedy)
    kind = _pictures_in(values[columns.image])
    if kind:
        raise UserError(
            f"column {columns.image!r} of {path} holds {kind}",
            expected="paths of image files",
            remedy="write the pictures to files, and a table with their paths",
        )
    caption = columns.caption or next((name for name in CAPTION_COLUMNS if name in values), "")
    if not caption and not columns.label:
        raise UsageError(f"no column 'caption' in {path}", got=found, remedy="name it with --caption-column")
    return caption


def _instead(values: dict, name: str, option: str) -> str:
    """The remedy for a missing column, by what the first row holds."""
    if f'"{name}"' in values:
        return "add --quotes csv"
    if any(other.strip().lower().endswith(tuple(SUFFIXES)) for other in map(str, values)):
        return "write the names of the columns into the first line"
    same = next((other for other in values if str(other).strip().lower() == name.lower()), None)
    if same:
        return f"add {option} {same}"
    if option == "--image-column":
        for other, value in values.items():
            if kind := _pictures_in(value):
                return f"column {other!r} holds {kind}: write them to files, and a table with their paths"
        urls = [other for other, value in values.items() if isinstance(value, str) and _URL.match(value.strip())]
        if urls:
            return f"column {urls[0]!r} holds URLs, which pack does not fetch: {_FETCH}"
    return f"name the right one with {option}"


def _pictures_in(value: object) -> str:
    """What a value holds that is, or has in it, the bytes of a file; "" for any other value."""
    if isinstance(value, dict):
        inner = next((kind for item in value.values() if (kind := _pictures_in(item))), "")
        keys = ", ".join(map(str, value))
        return f"{inner or 'pictures'} within an object ({keys})" if inner or "bytes" in value else ""
    if isinstance(value, (bytes, bytearray, memoryview)):
        picture = sniff(bytes(value[:SNIFFED]))
        return f"pictures as bytes ({picture}, {len(value)} bytes in the first row)" if picture else "bytes"
    return ""


def _check_urls(path: Path, column: str, rows: list[Row]) -> None:
    """Raise UserError when all images of a table are URLs."""
    faults = [row.fault for row in rows if row.image or row.fault]
    if faults and all(fault and fault[0] == _IS_URL for fault in faults):
        what = f"column {column!r} of {path} holds URLs"
        raise UserError(what, expected="paths of image files", remedy=_FETCH)


def _row(source: str, values: dict, columns: Columns, caption: str) -> Row:
    used = {columns.image, caption, columns.label}
    row = Row(source, "")
    row.metadata = {name: value for name, value in values.items() if name not in used}
    try:
        row.label = class_name(values.get(columns.label)) if columns.label else None
    except ValueError as error:
        row.fault = ("bad_label", str(error))
    try:
        picture = values.get(columns.image)
        row.span = picture if isinstance(picture, Span) else None
        row.image = source if row.span else _image(picture)
        row.captions = [] if not caption or _is_nan(values.get(caption)) else as_texts(values.get(caption))
    except BadSampleError as error:
        row.fault = ("bad_row", error.reason)
    if _URL.match(row.image):
        row.image, row.fault = row.image[:PATH_MAX], (_IS_URL, "the image is a URL, which pack does not fetch")
    return row


def _image(value: object) -> str:
    """The path in an image column, "" for none. Raises BadSampleError for anything but text or a whole number."""
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        kind = _pictures_in(value) or f"a {type(value).__name__}"
        raise BadSampleError("bad_row", f"the image must be a path, got {kind}")
    text = str(value).strip()
    if len(text) >= PATH_MAX and not _URL.match(text):
        raise BadSampleError("bad_row", f"the image must be a path, got a text of {len(text)} characters")
    return text


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value


def _same(value: object, wanted: str) -> bool:
    """Whether a filter's value is meant: as text, in any spelling of its letters, or as the same number."""
    if isinstance(value, float) and value.is_integer() and wanted == str(int(value)):
        return True
    text = "" if value is None else str(value).strip()
    return text == wanted or unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", wanted)


def _image_root(roots: tuple[Path, ...], rows: list[Row]) -> Path:
    """The one that holds most of the first files, the first of several."""
    probed = [row.image for row in rows if row.image][:_PROBED]
    return max(roots, key=lambda root: sum(os.path.isfile(root / image) for image in probed))


def _relative(image: str, root: Path) -> str:
    if not image:
        return ""
    if os.path.isabs(image) and Path(image).is_relative_to(root.absolute()):
        image = os.path.relpath(image, root.absolute())
    return os.path.normpath(image)
