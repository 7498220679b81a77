"""The rows of a table file, whatever its format: CSV, TSV, JSON lines or Parquet."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import check_depth
from data_tools.pack.delimited import LINE_LIMIT, Dialect, Record, read_delimited

CAPTION_COLUMNS = ("caption", "captions")  # taken where none is named
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_GZIP, _ZSTD, _ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
_COMPRESSED = (".gz", ".zst")
_OTHERS = (
    (b"BZh", "compressed with bzip2", "bunzip2 it"),
    (b"\xfd7zX", "compressed with xz", "unpack it with xz -d"),
    (b"PAR1", "a Parquet table", "name it .parquet"),
    (b"\xd0\xcf\x11\xe0", "a workbook of an old Excel", "export it as CSV with UTF-8"),
)
_BATCH = 4096


def table_suffix(path: Path) -> str | None:
    """The suffix that says a table's format, in lower case and without .gz or .zst; None: not a table."""
    name = path.name.lower()
    bare = next((name.removesuffix(one) for one in _COMPRESSED if name.endswith(one)), name)
    suffix = next((suffix for suffix in SUFFIXES if bare.endswith(suffix)), None)
    return None if suffix == ".parquet" and bare != name else suffix


def read_records(path: Path, dialect: Dialect, wanted: tuple[str, ...], notes: list[str]) -> Iterator[Record]:
    """The records of a table; `wanted` are the columns that it must have, the image's first.

    `notes` receives, a line each, what a user should know of the reading once it has ended.
    Raises UserError when the file cannot be read; a single bad row is a record with a fault.
    """
    suffix = table_suffix(path) or ".csv"
    if suffix == ".parquet":
        yield from _read_parquet(path, wanted, notes)
        return
    with _opened(path) as file:
        if suffix in (".csv", ".tsv"):
            yield from read_delimited(path, file, suffix == ".tsv", dialect, wanted, notes)
        else:
            yield from _read_jsonl(path, file, notes)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file, or what it holds compressed by gzip or zstd."""
    with open(path, "rb") as file:
        magic = file.peek(4)[:4]
        if magic == _ZIP:
            remedy = "export it as CSV with UTF-8, or unzip it"
            raise UserError(f"{path} is a zip archive, as Excel writes it", expected="a table as text", remedy=remedy)
        for start, what, remedy in _OTHERS:
            if magic.startswith(start):
                raise UserError(f"{path} is {what}", expected="a table as text", remedy=remedy)
        if magic == _ZSTD:
            yield from _unpacked(path)
            return
        if not magic.startswith(_GZIP):
            yield file
            return
        try:
            with gzip.open(file) as unzipped:
                yield cast(IO[bytes], unzipped)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"cannot unzip {path}", got=error, remedy="fetch the file again") from None


def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    import pyarrow

    try:
        with pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd") as stream:
            yield cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, stream)))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot unpack {path}", got=error, remedy="fetch the file again") from None


def _read_jsonl(path: Path, file: IO[bytes], notes: list[str]) -> Iterator[Record]:
    number = rows = 0
    while line := file.readline(LINE_LIMIT):
        number += 1
        if number == 1:
            _check_start(path, line)
        if len(line) >= LINE_LIMIT:
            raise UserError(f"line {number} of {path} is too long", got=f"{LINE_LIMIT} bytes and more")
        if not line.strip():
            continue
        rows += 1
        values, fault = _parsed(line)
        yield Record(f"{path.name}:{number}", values, fault)
    blanks = f", {number - rows} blank" if number > rows else ""
    notes.append(f"read {number} lines of {path.name}: {rows} rows{blanks}")


def _check_start(path: Path, line: bytes) -> None:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16", expected="UTF-8, one JSON object a line")
    start = line.removeprefix(b"\xef\xbb\xbf").strip()
    if start.startswith(b"["):
        raise UserError(
            f"{path} is one JSON array", expected="one JSON object a line", remedy="`jq -c '.[]'` writes it"
        )
    if start == b"{":
        raise UserError(
            f"objects of {path} go over several lines", expected="one JSON object a line", remedy="`jq -c .` writes it"
        )


def _parsed(line: bytes) -> tuple[dict, str | None]:
    try:
        values = json.loads(line, object_pairs_hook=_unique)
        check_depth(values)
    except BadSampleError as error:
        return {}, error.reason
    except (ValueError, RecursionError) as error:  # no JSON, or nested without end
        return {}, f"not JSON: {error}"
    return (values, None) if isinstance(values, dict) else ({}, "not a JSON object")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name twice in one object")
    return values


def _read_parquet(path: Path, wanted: tuple[str, ...], notes: list[str]) -> Iterator[Record]:
    """Columns of bytes are left out, unless one of the `wanted` is such, or missing: then the first row tells."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        binary = {field.name for field in file.schema_arrow if holds_bytes(field.type)}
        if twice:
            remedy = "rename columns"
            raise UserError(f"columns of {path} cannot be used", got=f"{', '.join(twice)} twice", remedy=remedy)
        told = binary and (binary & {*wanted, *CAPTION_COLUMNS} or not set(wanted) <= set(names))
        kept = None if told else [name for name in names if name not in binary]
        if binary and not told:
            notes.append(f"left out columns of bytes of {path.name}: {', '.join(sorted(binary))}")
        number = 0
        for batch in file.iter_batches(1 if told else _BATCH, columns=kept):
            for values in batch.to_pylist():
                number += 1
                # a column `image` brings one called `image.bytes` along
                yield Record(f"{path.name}:{number}", {name: values[name] for name in kept} if kept else values)
        notes.append(f"read {number} rows of {path.name}")
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # ValueError: no text, no date
        raise UserError(f"cannot read {path}", got=error) from None


def holds_bytes(kind: Any) -> bool:
    """Whether values of a column have bytes in them, at whatever depth."""
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    if types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    return any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields))
