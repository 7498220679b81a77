"""What a user may name as a corpus on this machine, for all verbs and for training alike: here it becomes tars."""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UsageError, UserError
from data_tools.format import MAX_SHARDS
from data_tools.format import manifest as manifests
from data_tools.format.files import read_small
from data_tools.remote.urls import expand_braces

KINDS = "a packed folder, its manifest.json, a folder of tars, a tar, or a brace or glob pattern of these"
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4")
SHARD_COUNT, CLASS_NAMES = "nshards.txt", "classnames.txt"  # of CLIP_benchmark's folders
_MAX_TEXT = 16 << 20
_SHOWN = 8


class Found(NamedTuple):
    """What a source names: a manifest, or tars in their order. `classes`: class names that lie beside the tars."""

    manifest: Path | None
    tars: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()


def find(source: str, splits: bool = False) -> list[Found]:
    """Resolve one source that is no URL. No tar is opened; one that a pattern or a file beside it names may be missing.

    Of a folder whose subfolders hold the shards, as in CLIP_benchmark's layout, `splits` takes all of them, for work on
    single tars; without it there must be only one, because training and test samples do not belong together.
    Raises UserError where nothing is found.
    """
    if not source.strip():
        raise UsageError("an empty name for a corpus", expected=KINDS)
    named = os.path.expanduser(source)
    if os.path.lexists(named):
        return _at(Path(named), splits)
    found = []
    for name in expand_braces(named):
        matches = _matches(name) if glob.has_magic(name) and not os.path.lexists(name) else [name]
        for match in matches:
            found += _at(Path(match), splits)
    return found


def missing(tar: Path) -> UserError:
    """The error for a tar that is not there, or for what was to be one."""
    if tar.suffix != ".tar":
        remedy = "check the path; `data_tools pack` makes one"
        return UserError(f"no corpus at {tar}", expected=KINDS, remedy=remedy)
    return UserError(f"missing shard {tar}", remedy="check the path or pattern, or copy the shard back")


def holds_shards(folder: Path) -> bool:
    """Whether there are shards in a folder or in the folders in it, and not pictures to be packed."""
    return bool(_directly(folder)) or any(_directly(path) for path in _children(folder) if path.is_dir())


def natural(path: Path) -> list:
    """Sorts 2.tar before 10.tar."""
    return [(int(part), part) if part.isdigit() else (-1, part) for part in re.split("([0-9]+)", path.name)]


def _matches(pattern: str) -> list[str]:
    """What a glob pattern matches, in natural order; of several kinds of files only tars and folders."""
    found = sorted(map(Path, glob.iglob(pattern, recursive=True)), key=lambda path: (str(path.parent), natural(path)))
    chosen = [path for path in found if path.suffix == ".tar" or path.is_dir()] or found
    if not chosen:
        raise UserError(f"no shards match {pattern}", expected=KINDS, remedy="check the pattern, and quote it")
    return [str(path) for path in chosen]


def _at(path: Path, splits: bool) -> list[Found]:
    if path.is_dir():
        return _in_folder(path.absolute(), splits)
    if path.name == manifests.FILE_NAME:
        return [Found(path.absolute())]
    if path.suffix == ".idx":
        raise UserError(f"{path} is an index", expected=KINDS, remedy=f"name its tar, {path.with_suffix('.tar')}")
    return [Found(None, (path.absolute(),))]


def _in_folder(folder: Path, splits: bool) -> list[Found]:
    found = _directly(folder)
    if found:
        return [found]
    names = sorted((path for path in _children(folder) if path.is_dir()), key=natural)
    below = [(name, found) for name in names if (found := _directly(name))]
    if below and (splits or len(below) == 1):
        return [found for _, found in below]
    if below:
        listed = ", ".join(f"{name.name}/" for name, _ in below[:_SHOWN]) + (", ..." if len(below) > _SHOWN else "")
        remedy = f"name one of its folders, such as {below[0][0]}"
        raise UserError(f"{folder} has several folders of shards", got=listed, expected="one corpus", remedy=remedy)
    raise UserError(
        f"no {manifests.FILE_NAME} and no tars in {folder}",
        expected=KINDS,
        remedy="check the path; `python -m data_tools pack` makes shards of pictures and tables",
    )


def _directly(folder: Path) -> Found | None:
    """The shards that lie in the folder itself."""
    if os.path.lexists(folder / manifests.FILE_NAME):  # a link to nowhere is a fault, and no folder of tars
        return Found(folder / manifests.FILE_NAME)
    files = sorted((path for path in _children(folder) if not path.is_dir()), key=natural)
    packed = [path for path in files if path.name.endswith(COMPRESSED)]
    if packed:
        remedy = "unpack them (gunzip, zstd -d), for samples are read from any place of a shard"
        got = f"{len(packed)} such as {packed[0].name}"
        raise UserError(f"{folder} holds compressed tars", got=got, expected="plain tars", remedy=remedy)
    if (folder / SHARD_COUNT).exists():
        tars = tuple(folder / f"{number}.tar" for number in range(_shard_count(folder / SHARD_COUNT)))
    else:
        tars = tuple(path for path in files if path.suffix == ".tar")
    return Found(None, tars, _class_names(folder)) if tars else None


def _children(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        remedy = "check its permissions"
        raise UserError(f"cannot read the folder {folder}", got=error.strerror, remedy=remedy) from None


def _shard_count(path: Path) -> int:
    text = read_small(path, _MAX_TEXT).strip()
    if not re.fullmatch(rb"[0-9]{1,7}", text) or not 1 <= int(text) <= MAX_SHARDS:
        remedy = "write the number of tars into it, or take it away"
        raise UserError(f"{path} is no count of shards", got=text.decode("utf-8", "replace"), remedy=remedy)
    return int(text)


def _class_names(folder: Path) -> tuple[str, ...]:
    """CLIP_benchmark's class names: beside the tars, or beside the split that they are."""
    places = [folder, folder.parent] if (folder / SHARD_COUNT).exists() else [folder]
    path = next((place / CLASS_NAMES for place in places if (place / CLASS_NAMES).exists()), None)
    if path is None:
        return ()
    try:
        names = tuple(line.strip() for line in read_small(path, _MAX_TEXT).decode("utf-8").rstrip().split("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the class names {path}", got=error, expected="UTF-8") from None
    if not all(names):
        raise UserError(f"an empty class name in {path}", expected="one name a line, in the order of the labels")
    return names
