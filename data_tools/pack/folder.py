"""Input adapter: a folder of images with .txt or .json beside them, or one sub-folder per class."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UserError
from data_tools.pack.image import SUFFIXES
from data_tools.pack.rows import Row, Source


def read_folder(root: Path, labels: bool) -> Source:
    """Every image under `root` is a row; with `labels` its first sub-folder is its class, and captions are optional."""
    rows, ignored = [], 0
    for relative, siblings in _files(root):
        stem, suffix = os.path.splitext(relative)
        if suffix.lower() in SUFFIXES:
            rows.append(_row(root, relative, stem, siblings, labels))
        elif not (suffix in (".txt", ".json") and _has_image(stem, siblings)):
            ignored += 1
    if not rows:
        expected = "images (" + ", ".join(sorted(SUFFIXES)) + ")"
        raise UserError(f"no images in {root}", got=f"{ignored} other files", expected=expected)
    classes = tuple(sorted({row.label for row in rows if row.label})) if labels else None
    return Source(root, rows, captioned=not labels, labels=classes, ignored=ignored)


def _files(root: Path) -> Iterator[tuple[str, set[str]]]:
    """(path relative to root, names in its folder) in sorted order, hidden ones left out."""
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(folder).relative_to(root)
        siblings = set(names)
        for name in sorted(names):
            if not name.startswith("."):
                yield (base / name).as_posix(), siblings


def _has_image(stem: str, siblings: set[str]) -> bool:
    name = os.path.basename(stem)
    return any(f"{name}{suffix}" in siblings or f"{name}{suffix.upper()}" in siblings for suffix in SUFFIXES)


def _row(root: Path, relative: str, stem: str, siblings: set[str], labels: bool) -> Row:
    row = Row(relative, relative)
    if labels and "/" in relative:
        row.label = relative.split("/", 1)[0]
    name = os.path.basename(stem)
    try:
        if f"{name}.txt" in siblings:
            row.captions = [(root / f"{stem}.txt").read_text("utf-8-sig")]
        if f"{name}.json" in siblings:
            _read_json(row, root / f"{stem}.json")
    except (ValueError, RecursionError, OSError) as error:
        row.fault = ("bad_row", f"text beside the image: {error}")
    return row


def _read_json(row: Row, path: Path) -> None:
    content = json.loads(path.read_text("utf-8-sig"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    captions = as_captions(content.pop("captions", content.pop("caption", None)))
    row.captions = captions or row.captions
    row.metadata = content


def as_captions(value: object) -> list[str]:
    """A caption, a list of captions or nothing, as a list; raises ValueError for anything else."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(caption, str) for caption in value):
        return value
    raise ValueError(f"captions must be text or a list of texts, got {str(value)[:60]!r}")
