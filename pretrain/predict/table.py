"""The file of predictions: the same columns as CSV or Parquet, whole or absent, written batch by batch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write

METADATA = "dualstream"  # the key in a Parquet file's metadata


class Writer(Protocol):
    """Takes columns of equal length, None where there is no value."""

    def write(self, columns: Mapping[str, Sequence]) -> None:
        """Append rows."""


def column_names(classes: Sequence[str], top_k: int) -> dict[str, type]:
    """The columns in order and their types."""
    columns: dict[str, type] = {"id": str, "prediction": str, "probability": float}
    for place in range(2, top_k + 1):
        columns |= {f"prediction_{place}": str, f"probability_{place}": float}
    columns["error"] = str
    return columns | {f"p_{name}": float for name in classes}


@contextmanager
def open_table(path: Path, columns: Mapping[str, type], metadata: Mapping) -> Iterator[Writer]:
    """A writer of a .csv or .parquet file at `path`, which is replaced at a clean end and else left as it was.

    `metadata` goes into the Parquet file under `METADATA`, as JSON; of a CSV file into a .json beside it.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            make = _Parquet if path.suffix.lower() == ".parquet" else _Csv
            writer = make(file, columns, metadata)
            yield writer
            writer.close()
        if path.suffix.lower() == ".csv":
            with atomic_write(path.with_name(f"{path.name}.json")) as file:
                file.write(json.dumps(metadata, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"predictions {path} cannot be written", got=error.strerror) from None


class _Csv:
    def __init__(self, file: BinaryIO, columns: Mapping[str, type], _metadata: Mapping):
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self._rows = csv.writer(self._text, lineterminator="\n")
        self._rows.writerow(columns)

    def write(self, columns: Mapping[str, Sequence]) -> None:
        for row in zip(*columns.values(), strict=True):
            self._rows.writerow(f"{value:.7g}" if isinstance(value, float) else value for value in row)

    def close(self) -> None:
        self._text.flush()
        self._text.detach()


class _Parquet:
    def __init__(self, file: BinaryIO, columns: Mapping[str, type], metadata: Mapping):
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {str: pa.string(), float: pa.float32()}
        fields = [pa.field(name, kinds[kind]) for name, kind in columns.items()]
        self._schema = pa.schema(fields, metadata={METADATA: json.dumps(metadata, ensure_ascii=False)})
        self._table, self._writer = pa.table, pq.ParquetWriter(file, self._schema)

    def write(self, columns: Mapping[str, Sequence]) -> None:
        self._writer.write_table(self._table(dict(columns), schema=self._schema))

    def close(self) -> None:
        self._writer.close()
