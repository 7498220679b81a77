"""Rows of a table as a file that spreadsheets and scripts read."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools.errors import UsageError
from data_tools.format.commit import atomic_write

_SUFFIXES = (".csv", ".jsonl")


def check_output(path: Path) -> None:
    """Raises UsageError for an --output that `write_rows` does not write."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError("--output has another suffix", got=path.name, expected=" ".join(_SUFFIXES))
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent}", remedy="make it, or name another file with --output")


def write_rows(path: Path, columns: list[str], rows: Iterator[dict]) -> int:
    """Commit `rows` as a .csv or .jsonl of these columns; returns how many there were."""
    as_csv, count = path.suffix.lower() == ".csv", 0
    with atomic_write(path) as file:
        if as_csv:
            file.write(_csv_line(columns))
        for row in rows:
            values = {name: row[name] for name in columns}
            json_line = json.dumps(values, ensure_ascii=False) + "\n"
            file.write(_csv_line(map(text_of, values.values())) if as_csv else json_line.encode())
            count += 1
    return count


def _csv_line(cells: Iterable[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()


def text_of(value: object) -> str:
    """A value as a cell shows it."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
