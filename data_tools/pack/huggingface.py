"""Datasets of Hugging Face on disk, as records like those of a table: Parquet files with pictures in them, and what
`save_to_disk` writes. The library itself is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import UsageError, UserError
from data_tools.format.files import opened, read_small, read_span
from data_tools.media.image import SNIFFED, sniff
from data_tools.pack.delimited import Record
from data_tools.pack.inside import Boundary
from data_tools.pack.span import Span, Spool

if TYPE_CHECKING:
    import pyarrow

WORDS = "a Hugging Face dataset"
PATH = "image_path"  # what a dataset says of where a picture came from
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"
_MAX_JSON = 1 << 24
_BATCH = 64  # rows that become Python objects at once; pyarrow itself holds a row group
_PART = re.compile(r"(.+?)-\d+-of-\d+\.parquet")


def is_dataset(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes, or holds Parquet files with pictures; whether a file is one.
    Raises UserError for a Parquet file that cannot be read."""
    if path.is_dir():
        if (path / _DICT).is_file() or ((path / _STATE).is_file() and (path / _INFO).is_file()):
            return True
        parts = _parquets(path)
        return bool(parts) and is_dataset(parts[0])
    if path.suffix.lower() != ".parquet":
        return False
    schema = _parquet(path).schema_arrow
    pictures = _picture_columns(schema)
    return bool(pictures) and ("image" in pictures or "image" not in schema.names)  # else `image` has paths: a table


def read_dataset(path: Path, image: str, spool: Spool, boundary: Boundary, notes: list[str]) -> Iterator[Record]:
    """A record a row. Column `image` becomes a Span, or a path where the dataset has no bytes; class numbers become
    their names, and `split` is the part of the dataset unless a column is called so.

    Raises UserError for what cannot be read, UsageError where `image` is no column of pictures.
    """
    rows = 0
    for split, file in _files(path, boundary):
        place = file.relative_to(path).as_posix() if path.is_dir() else file.name
        batches = _arrow_batches(file, image) if file.suffix == ".arrow" else _parquet_batches(file, image, spool)
        for number, (values, picture, names) in enumerate(_rows(file, batches), 1):
            yield _record(f"{place}:{number}", values, picture, names, image, split)
            rows += 1
    spool.flush()
    notes.append(f"read {rows} rows of {path.name}")


def _rows(file: Path, batches: Iterator[tuple[Any, list[Span | str], dict]]) -> Iterator[tuple[dict, Span | str, dict]]:
    import pyarrow

    try:
        for batch, pictures, names in batches:
            for values, picture in zip(batch.to_pylist(), pictures, strict=True):
                yield values, picture, names
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"cannot read {file}", got=error, remedy="fetch or save the dataset again") from None


def _record(place: str, values: dict, picture: Span | str, names: dict, image: str, split: str | None) -> Record:
    path = (values.pop(image) or {}).get("path")
    others = {PATH: path} if isinstance(picture, Span) and path else {}
    fault = None
    for column, classes in names.items():
        number = values[column]
        if number is not None and not -1 <= number < len(classes):
            fault = f"class {number} in {column!r}, which has {len(classes)}"
        values[column] = None if fault or number in (None, -1) else classes[number]
    return Record(place, {image: picture, **({"split": split} if split else {}), **others, **values}, fault)


def _files(path: Path, boundary: Boundary) -> list[tuple[str | None, Path]]:
    """(split, file) of a dataset in order."""
    if not path.is_dir():
        return [(None, path)]
    if (path / _DICT).is_file():
        splits = _names(path / _DICT, _listed(path / _DICT, "splits"))
        found: list[tuple[str | None, Path]] = [(one, file) for one in splits for file in _saved(path / one)]
    elif (path / _STATE).is_file():
        found = [(None, file) for file in _saved(path)]
    else:
        found = [(part[1] if (part := _PART.fullmatch(file.name)) else None, file) for file in _parquets(path)]
    for _, file in found:
        if fault := boundary.fault(file.relative_to(path).as_posix()):
            raise UserError(f"{path} leads to files elsewhere", got=fault[1], remedy="add --follow-links")
    return found


def _saved(folder: Path) -> list[Path]:
    parts = _listed(folder / _STATE, "_data_files")
    names = [part.get("filename") if isinstance(part, dict) else None for part in parts]
    return [folder / name for name in _names(folder / _STATE, names)]


def _listed(path: Path, name: str) -> list:
    try:
        content = json.loads(read_small(path, _MAX_JSON))
    except FileNotFoundError:
        raise UserError(f"no {path}", expected="a folder written by save_to_disk") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON", got=error) from None
    listed = content.get(name) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{path} has no list {name!r}", expected="a folder written by save_to_disk")
    return listed


def _names(path: Path, names: list) -> list[str]:
    for name in names:
        if not isinstance(name, str) or not name or name in (".", "..") or "/" in name or "\0" in name:
            raise UserError(f"{path} names no file beside it", got=repr(name)[:80], expected="a plain name")
    return names


def _parquets(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".parquet" and file.is_file())


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}", got=error) from None


def _parquet_batches(
    path: Path, image: str, spool: Spool
) -> Iterator[tuple[pyarrow.RecordBatch, list[Span | str], dict]]:
    file = _parquet(path)
    kept, names = _columns(path, file.schema_arrow, image)
    for batch in file.iter_batches(_BATCH, columns=kept):
        column = batch.column(batch.schema.names.index(image))
        pictures = [
            spool.add(value["bytes"]) if value and value["bytes"] else (value or {}).get("path") or ""
            for value in column.to_pylist()
        ]
        yield _without_bytes(batch, kept, image), pictures, names


def _arrow_batches(path: Path, image: str) -> Iterator[tuple[pyarrow.RecordBatch, list[Span | str], dict]]:
    """Pictures lie in such a file as they are, so nothing is copied: a Span is where the bytes of a batch stand."""
    import pyarrow

    with opened(path) as descriptor, pyarrow.OSFile(str(path)) as file:
        schema = pyarrow.ipc.read_schema(file)
        kept, names = _columns(path, schema, image)
        while True:
            try:
                message = pyarrow.ipc.read_message(file)
            except EOFError:
                return
            body = message.body
            batch = pyarrow.ipc.read_record_batch(message, schema)
            batch.validate(full=True)  # offsets of an untrusted file
            column = batch.column(schema.names.index(image))
            spans = _spans(path, column, file.tell() - body.size, body)
            paths = column.field("path").to_pylist()
            pictures = [
                _span(path, descriptor, *span) if span else name or "" for span, name in zip(spans, paths, strict=True)
            ]
            yield _without_bytes(batch, kept, image), pictures, names


def _spans(path: Path, column: Any, start: int, body: Any) -> list[tuple[int, int] | None]:
    """(offset in the file, size) of the bytes of each row, None for a row without; `body` stands at `start`."""
    import pyarrow.types as types

    held = column.field("bytes")
    _, ends, data = held.buffers()
    if data is None or not data.size:
        return [None] * len(held)
    if not body.address <= data.address <= body.address + body.size - data.size:
        raise UserError(f"{path} is compressed", expected="arrow files as save_to_disk writes them")
    start += data.address - body.address
    offsets = memoryview(ends).cast("q" if types.is_large_binary(held.type) else "i")[held.offset :].tolist()
    there = zip(column.is_valid().to_pylist(), held.is_valid().to_pylist(), strict=True)
    return [
        (start + offsets[row], offsets[row + 1] - offsets[row])
        if all(valid) and offsets[row + 1] > offsets[row]
        else None
        for row, valid in enumerate(there)
    ]


def _span(path: Path, descriptor: int, start: int, size: int) -> Span:
    return Span(str(path), start, size, sniff(read_span(descriptor, start, start + min(SNIFFED, size))))


def _without_bytes(batch: pyarrow.RecordBatch, kept: list[str], image: str) -> pyarrow.RecordBatch:
    """The columns to keep, the pictures' with its paths alone."""
    import pyarrow

    columns = [batch.column(batch.schema.names.index(name)) for name in kept]
    paths = [
        pyarrow.StructArray.from_arrays([column.field("path")], ["path"]) if name == image else column
        for name, column in zip(kept, columns, strict=True)
    ]
    return pyarrow.RecordBatch.from_arrays(paths, kept)


def _columns(path: Path, schema: Any, image: str) -> tuple[list[str], dict[str, list[str]]]:
    """The columns to read, without other bytes, and the class names of those that are classes."""
    pictures = _picture_columns(schema)
    if image not in pictures:
        remedy = f"add --image-column {pictures[0]}" if pictures else None
        raise UsageError(f"no pictures in column {image!r} of {path}", got=", ".join(schema.names), remedy=remedy)
    from data_tools.pack.records import holds_bytes

    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"columns of {path} cannot be used", got="a name twice", remedy="rename columns")
    kept = [field.name for field in schema if field.name == image or not holds_bytes(field.type)]
    return kept, {name: classes for name, classes in _classes(schema).items() if name in kept}


def _picture_columns(schema: Any) -> list[str]:
    import pyarrow.types as types

    def is_picture(kind: Any) -> bool:
        if not types.is_struct(kind) or {kind.field(n).name for n in range(kind.num_fields)} != {"bytes", "path"}:
            return False
        return types.is_binary(kind.field("bytes").type) or types.is_large_binary(kind.field("bytes").type)

    return [field.name for field in schema if is_picture(field.type)]


def _classes(schema: Any) -> dict[str, list[str]]:
    """The names of classes by column, as the dataset's features say."""
    import pyarrow.types as types

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
    found = {}
    for name, feature in features:
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        whole = name in schema.names and types.is_integer(schema.field(name).type)
        if whole and isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = names
    return found
