"""Input adapter: a folder of images with .txt or .json beside them, or one sub-folder per class."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import (
    MAX_JSON_BYTES,
    MAX_TEXT_BYTES,
    as_texts,
    captions_of_text,
    check_depth,
    parse_json,
)
from data_tools.media.files import read_file
from data_tools.media.image import SUFFIXES
from data_tools.pack.inside import Boundary
from data_tools.pack.labels import folder_class, folder_classes
from data_tools.pack.rows import Row, Source, kinds_of

# Pictures of formats that nothing here decodes. One without another version of itself beside it is a row of its own.
_UNREAD = {".heic", ".heif", ".jxl", ".svg", ".psd", ".eps", ".tga", ".ico"}
_UNREAD |= {".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2"}  # of cameras
_UNREAD |= {".czi", ".nd2", ".lif", ".svs", ".dcm"}  # of microscopes and scanners
_TEXTS = (".txt", ".json")
_ALIEN = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN")  # thumbnails and bins of file servers and systems


@dataclass
class _Folder:
    """One folder: its path with a slash behind it, below the root, the names of its files, and linked folders that lead
    out of the input."""

    prefix: str
    names: set[str]
    outside: list[str]

    def __post_init__(self) -> None:
        stems: set[str] = set()
        self.texts: dict[tuple[str, str], str] = {}
        for name in sorted(self.names):  # of a.TXT and a.txt the latter stays
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in _TEXTS and not name.startswith("."):
                self.texts[_alike(stem), suffix.lower()] = name
            elif suffix.lower() in SUFFIXES:
                stems.add(_alike(stem))
        self.stems = frozenset(stems)

    def text(self, stem: str, suffix: str) -> str | None:
        """The text beside a picture: of its very name, else one that prints alike."""
        exact = stem + suffix
        return exact if exact in self.names else self.texts.get((_alike(stem), suffix))


def _alike(stem: str) -> str:
    """One spelling of a name: archives of macOS decompose its accents."""
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem)


def read_folder(root: Path, labels: bool, follow_links: bool = False, lines: bool = False) -> Source:
    """Every image under `root` is a row; with `labels` its first sub-folder is its class, and captions are optional.

    With `lines` every line of a .txt is a caption; else it is one. Without `follow_links` nothing outside the folder is
    read: an image or a text that a link leads to there is a faulty row, and so is a linked folder.
    """
    boundary = Boundary(root, follow_links)
    rows: list[Row] = []
    ignored: Counter[str] = Counter()
    for folder in _folders(boundary):
        for name in sorted(name for name in folder.names if not name.startswith(".")):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES:
                rows.append(_row(boundary, folder, name, labels, lines))
            elif suffix.lower() in _UNREAD and _alike(stem) not in folder.stems:
                rows.append(Row(folder.prefix + name, folder.prefix + name, fault=_unread(suffix)))
            elif not (suffix.lower() in _TEXTS and _alike(stem) in folder.stems):
                ignored[suffix.lower()] += 1
        rows += [Row(path, path, fault=boundary.fault(path)) for path in folder.outside]
    if not rows:
        expected = "images (" + ", ".join(sorted(SUFFIXES)) + ")"
        raise UserError(
            f"no images in {root}", got=f"{ignored.total()} other files{kinds_of(ignored)}", expected=expected
        )
    classes = None
    if labels:
        classes = folder_classes((row.label for row in rows if row.label), root)
    return Source(root, rows, captioned=not labels, labels=classes, ignored=ignored)


def _folders(boundary: Boundary) -> Iterator[_Folder]:
    """The folders below the root in sorted order, each once however many links lead to it; hidden ones and those of
    thumbnails are left out."""
    root = boundary.root
    seen = {_identity(root)}
    for place, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        base = os.path.relpath(place, root)
        prefix = "" if base == "." else f"{base}/"
        inside, outside = [], []
        for name in sorted(name for name in folders if not name.startswith(".") and name not in _ALIEN):
            path = prefix + name
            if boundary.fault(path):
                outside.append(path)
            elif not _comes_as_itself(root / path, root) and (identity := _identity(root / path)) not in seen:
                seen.add(identity)
                inside.append(name)
        folders[:] = inside
        yield _Folder(prefix, set(names), outside)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(error) from None
    return status.st_dev, status.st_ino


def _comes_as_itself(folder: Path, root: Path) -> bool:
    """Whether a link leads to a folder that the walk meets under its own name."""
    if not folder.is_symlink():
        return False
    below = os.path.relpath(os.path.realpath(folder), os.path.realpath(root)).split(os.sep)
    return below[0] != ".." and not any(name.startswith(".") and name != "." for name in below)


def _raise(error: OSError) -> NoReturn:
    raise _unreadable(error) from None


def _unreadable(error: OSError) -> UserError:
    return UserError(f"cannot read the folder {error.filename}", got=error.strerror, remedy="make it readable")


def _unread(suffix: str) -> tuple[str, str]:
    return "unread_format", f"{suffix} is not read: convert it, to JPEG for example"


def _row(boundary: Boundary, folder: _Folder, name: str, labels: bool, lines: bool) -> Row:
    path = folder.prefix + name
    row = Row(path, path)
    if labels and folder.prefix:
        row.label = folder_class(path.split("/", 1)[0])
    stem = os.path.splitext(name)[0]
    texts = [beside for suffix in _TEXTS if (beside := folder.text(stem, suffix))]
    for beside in texts:
        row.fault = row.fault or boundary.fault(folder.prefix + beside)
    if row.fault:
        return row
    try:
        for beside in texts:
            _read_text(row, boundary.root / (folder.prefix + beside), lines)
    except BadSampleError as error:
        row.fault = ("huge_text" if error.kind == "huge_text" else "bad_row", f"text beside the image: {error.reason}")
    except OSError as error:
        row.fault = ("bad_row", f"text beside the image: {error.strerror}")
    return row


def _read_text(row: Row, path: Path, lines: bool) -> None:
    """Captions of a .txt; captions and metadata of a .json, whose captions count before."""
    if path.suffix.lower() == ".txt":
        row.captions = captions_of_text(read_file(path, MAX_TEXT_BYTES), lines)
        return
    content = parse_json(read_file(path, MAX_JSON_BYTES))
    if not isinstance(content, dict):
        raise BadSampleError("bad_json", f"{path.name} is not a JSON object")
    check_depth(content)
    several, one = content.pop("captions", None), content.pop("caption", None)
    captions = as_texts(several)
    if not any(text.strip() for text in captions):
        captions = as_texts(one)
    row.captions = captions or row.captions
    row.metadata = content
