"""Which adapter reads an input, and what to do with an input that none reads."""

import itertools
import os
import re
from pathlib import Path

from data_tools.corpus.sources import CLASS_NAMES, COMPRESSED, SHARD_COUNT
from data_tools.errors import UsageError, UserError, shown
from data_tools.format.files import opened, read_span
from data_tools.format.manifest import FILE_NAME
from data_tools.media.image import SUFFIXES as PICTURES
from data_tools.pack import huggingface, imagefolder
from data_tools.pack.annotations import ANNOTATIONS, recognised
from data_tools.pack.huggingface import is_dataset
from data_tools.pack.imagefolder import metadata_of
from data_tools.pack.records import SUFFIXES as TABLES
from data_tools.pack.records import table_suffix
from data_tools.redaction import redact

FOLDER, TABLE, DATASET, IMAGEFOLDER = "folder", "table", "huggingface", "imagefolder"
KINDS = {
    FOLDER: "a folder of pictures",
    TABLE: "a table",
    DATASET: huggingface.WORDS,
    IMAGEFOLDER: imagefolder.WORDS,
    **{name: one.words for name, one in ANNOTATIONS.items()},
}
_ARCHIVES = (".zip", ".7z", ".rar", *COMPRESSED)
_CAPTIONS_TXT = b"image,caption"  # its header
_PATTERN = set("*?[{")
_URL = re.compile("[a-zA-Z][a-zA-Z0-9+.-]+:/")
_EXPECTED = (
    f"a folder of pictures, a table ({' '.join(TABLES)}), a dataset of Hugging Face,"
    " or captions of COCO, Karpathy or Flickr"
)
_INDEX = "these are samples already: `python -m data_tools index {}`"


def single_input(inputs: list[Path]) -> Path:
    """The one input of a pack. Raises UsageError for several: a shell has expanded a pattern."""
    if len(inputs) == 1:
        return inputs[0]
    folder = shown(os.path.commonpath([path.absolute().parent for path in inputs]))
    tars = all(path.suffix == ".tar" for path in inputs)
    raise UsageError(
        "pack takes one input",
        got=f"{len(inputs)}: {', '.join(map(str, inputs[:3]))}{', ...' if len(inputs) > 3 else ''}",
        expected=_EXPECTED,
        remedy=_INDEX.format(folder) if tars else f"name their folder: {folder}",
    )


def kind_of(path: Path, named: str | None) -> str:
    """What the input is, a key of KINDS: what --format has `named`, or what it looks like. Raises UserError for an
    input that is none of them, or another than named."""
    found = _recognised(path)
    if named is None and found is None:
        raise UsageError(f"not a table: {path}", expected=_EXPECTED, remedy=_remedy(path))
    if named is None or found == named or _may_be(named, path, found):
        return named or str(found)
    looks = f"what looks like {KINDS[found]}" if found else "something else"
    raise UsageError(f"{path} is not what --format says", got=looks, expected=KINDS[named], remedy="leave --format out")


def _may_be(named: str, path: Path, found: str | None) -> bool:
    """Whether an input can be read as named though it looks like something more."""
    if named == FOLDER:
        return found == IMAGEFOLDER
    return named == TABLE and (found is None or (found == DATASET and path.is_file()))


def _recognised(path: Path) -> str | None:
    if path.is_dir():
        if is_dataset(path):
            return DATASET
        if metadata_of(path):
            return IMAGEFOLDER
        _check_folder(path)
        return FOLDER
    if not path.exists():
        raise _missing(path)
    if not path.is_file():
        raise UserError(f"{path} is no regular file", expected=_EXPECTED, remedy="write it to a file first")
    if is_dataset(path):
        return DATASET
    return recognised(path) or (TABLE if table_suffix(path) or _is_captions_txt(path) else None)


def _is_captions_txt(path: Path) -> bool:
    """Whether a file is the table that Flickr8k comes with from some places."""
    if path.suffix.lower() != ".txt":
        return False
    with opened(path) as file:
        return read_span(file, 0, len(_CAPTIONS_TXT) + 2).split(b"\n")[0].rstrip(b"\r") == _CAPTIONS_TXT


def _missing(path: Path) -> UserError:
    if _URL.match(str(path)):
        remedy = "copy it to this machine; tars of samples may stay there: `python -m data_tools index URL`"
        url = redact(str(path).replace(":/", "://", 1))
        return UserError(f"no such input: {url}", expected=f"{_EXPECTED}, on this machine", remedy=remedy)
    fixed = list(itertools.takewhile(lambda part: not set(part) & _PATTERN, path.parts))
    if len(fixed) < len(path.parts):
        remedy = _INDEX.format(repr(str(path))) if path.suffix == ".tar" else f"name the folder: {Path(*fixed)}"
        return UserError(f"no such input: {path}, a pattern", expected=_EXPECTED, remedy=remedy)
    return UserError(f"no such input: {path}", expected=_EXPECTED)


def _remedy(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith(".tar"):
        return _INDEX.format(path)
    if name.endswith(_ARCHIVES):
        return "unpack it, and name the folder; of a .tar.gz of samples gunzip it and index the tar"
    if path.suffix.lower() in PICTURES:
        return f"name its folder: {path.absolute().parent}"
    if name.endswith(".json"):
        return "write one object per image a line, as .jsonl; `jq -c '.[]'` does so with an array"
    if name == FILE_NAME:
        return "the folder is packed already"
    return None


def _check_folder(path: Path) -> None:
    """Raise UserError for a folder of samples or tables: nothing of it would be packed."""
    with os.scandir(path) as entries:
        # the entry's own `is_dir` raises for a link to itself
        names = {entry.name: os.path.isdir(entry.path) for entry in entries}
    files = sorted(name for name, folder in names.items() if not folder)
    folders = sorted(name for name, folder in names.items() if folder)
    split = next((name for name in folders if (path / name / SHARD_COUNT).is_file()), None)
    if split or {CLASS_NAMES, SHARD_COUNT} & set(files):
        what, remedy = f"{path} lies in CLIP_benchmark's layout", _INDEX.format(path / (split or ""))
        raise UserError(what, expected=_EXPECTED, remedy=remedy)
    if folders or any(os.path.splitext(name)[1].lower() in PICTURES for name in files):
        return
    tables = [name for name in files if table_suffix(Path(name))]
    if any(name.endswith(".tar") for name in files):
        remedy = "name the folder of pictures" if FILE_NAME in files else _INDEX.format(path)
        kind = "a packed corpus" if FILE_NAME in files else "tars"
        raise UserError(f"{path} holds {kind}", expected=_EXPECTED, remedy=remedy)
    if tables:
        remedy = f"name the table: {path / tables[0]}"
        raise UserError(f"{path} holds tables, no pictures", got=", ".join(tables), expected=_EXPECTED, remedy=remedy)
