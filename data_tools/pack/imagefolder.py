"""Hugging Face's imagefolder: pictures, and a metadata table whose column `file_name` names them."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import UserError
from data_tools.pack.delimited import Dialect
from data_tools.pack.folder import read_folder
from data_tools.pack.records import CAPTION_COLUMNS, read_records
from data_tools.pack.rows import Row, Source

WORDS = "an imagefolder"
FILE_COLUMN, TEXT_COLUMN = "file_name", "text"
_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def metadata_of(folder: Path) -> Path | None:
    """The metadata table of an imagefolder; None for another folder."""
    tables = (folder / name for name in _NAMES)
    return next((table for table in tables if table.is_file() and FILE_COLUMN in _first(table)), None)


def caption_column(table: Path) -> str | None:
    """`text`, as the library's examples call it, unless a column is called as elsewhere."""
    found = _first(table)
    return TEXT_COLUMN if TEXT_COLUMN in found and not set(CAPTION_COLUMNS) & set(found) else None


def add_unlisted(source: Source, follow_links: bool) -> None:
    """Add a row for each picture of the folder that the metadata do not name."""
    listed = {row.image for row in source.rows}
    found = read_folder(source.root, False, follow_links)
    source.rows += [Row(row.source, row.image, fault=row.fault) for row in found.rows if row.image not in listed]


def _first(table: Path) -> dict:
    try:
        return next((record.values for record in read_records(table, Dialect(), (FILE_COLUMN,), [])), {})
    except UserError:
        return {}
