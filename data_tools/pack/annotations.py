"""Caption files of datasets, as records like those of a table: an image, its captions, and what else is said.

COCO's captions (images and annotations), Karpathy's splits (images with sentences) and Flickr's token files
(`name.jpg#0<TAB>caption`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.errors import UserError
from data_tools.format.files import opened, read_small, read_span
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import check_depth
from data_tools.pack.delimited import Record

_MAX_JSON = 512 << 20  # bytes; COCO's captions have 92 million, Karpathy's 144
_MAX_TOKENS = 1 << 30
_TOKEN = re.compile(rb"([^\t\r\n]*\.[A-Za-z0-9]+)#([0-9]+)\t")
_SNIFFED = 1 << 12
_SUFFIXES = (".json", ".token", ".txt")


@dataclass(frozen=True)
class Annotations:
    """A kind of caption file: how it is called, whether a file is one, and its records."""

    words: str
    is_one: Callable[[Path], bool]
    records: Callable[[Path], Iterator[Record]]


def recognised(path: Path) -> str | None:
    """The name in ANNOTATIONS of what a file is; None: none of these. Raises UserError for a .json that cannot be
    read."""
    if path.suffix.lower() not in _SUFFIXES:
        return None
    return next((name for name, kind in ANNOTATIONS.items() if kind.is_one(path)), None)


def image_roots(path: Path) -> tuple[Path, ...]:
    """Where the pictures of such a file may lie: beside it, or beside its folder, in a folder that its name ends
    with (`annotations/captions_train2017.json`, `train2017/`)."""
    folder, part = path.parent, path.stem.rsplit("_", 1)[-1]
    above = folder.absolute().parent
    return folder, folder / "images", folder / part, above, above / "images", above / part, above / "images" / part


def _is_coco(path: Path) -> bool:
    content = _content(path)
    return _lists(content, "images", "annotations") and _first(content["annotations"], "caption", "image_id")


def _is_karpathy(path: Path) -> bool:
    content = _content(path)
    return _lists(content, "images") and _first(content["images"], "sentences", "filename")


def _is_tokens(path: Path) -> bool:
    if path.suffix.lower() == ".json":
        return False
    with opened(path) as file:
        return bool(_TOKEN.match(read_span(file, 0, _SNIFFED)))


def _lists(content: Any, *names: str) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(name), list) for name in names)


def _first(items: list, *names: str) -> bool:
    return bool(items) and isinstance(items[0], dict) and all(name in items[0] for name in names)


def _coco(path: Path) -> Iterator[Record]:
    """A record an annotation; an image without one is a record without captions."""
    content = _content(path)
    names, seen = {}, Counter[object]()
    for number, image in enumerate(content["images"]):
        if isinstance(image, dict) and isinstance(image.get("id"), int) and isinstance(image.get("file_name"), str):
            names[image["id"]] = image
        else:
            yield Record(f"{path.name}:images[{number}]", {}, "an image without a number `id` and a text `file_name`")
    for number, annotation in enumerate(content["annotations"]):
        place = f"{path.name}:annotations[{number}]"
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(identity, int) or identity not in names:
            yield Record(place, {}, "an annotation of no image that the file lists")
            continue
        seen[identity] += 1
        yield Record(place, _coco_values(names[identity], annotation.get("caption")))
    for identity, image in names.items():
        if not seen[identity]:
            yield Record(f"{path.name}:image {identity}", _coco_values(image, None))


def _coco_values(image: dict, caption: object) -> dict:
    others = {name: value for name, value in image.items() if name not in ("file_name", "id")}
    return {"image": image["file_name"], "caption": caption, "image_id": image["id"], **others}


def _karpathy(path: Path) -> Iterator[Record]:
    """A record an image, with all its sentences as they were written."""
    for number, image in enumerate(_content(path)["images"]):
        place = f"{path.name}:images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield Record(place, {}, "an image without a text `filename`")
            continue
        sentences = image.get("sentences")
        captions = [one.get("raw") if isinstance(one, dict) else None for one in sentences or ()]
        folder = image.get("filepath")
        file = f"{folder}/{image['filename']}" if isinstance(folder, str) and folder else image["filename"]
        others = {name: value for name, value in image.items() if name not in ("filename", "filepath", "sentences")}
        yield Record(place, {"image": file, "captions": captions, **others})


def _tokens(path: Path) -> Iterator[Record]:
    """A record a line."""
    for number, line in enumerate(read_small(path, _MAX_TOKENS).splitlines(), 1):
        place, found = f"{path.name}:{number}", _TOKEN.match(line)
        if not line.strip():
            continue
        try:
            name = found[1].decode() if found else ""
            caption = line[found.end() :].decode() if found else ""
        except UnicodeDecodeError as error:
            yield Record(place, {}, str(error))
            continue
        fault = None if found else "not a line of name.jpg#NUMBER, a tab and a caption"
        yield Record(place, {"image": name, "caption": caption} if found else {}, fault)


@lru_cache(maxsize=1)
def _content(path: Path) -> Any:
    """What a .json holds; None for another file."""
    if path.suffix.lower() != ".json":
        return None
    try:
        content = json.loads(read_small(path, _MAX_JSON))
        check_depth(content)
    except BadSampleError as error:
        raise UserError(f"{path} cannot be used", got=error.reason) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON", got=error, remedy="fetch the file again") from None
    return content


ANNOTATIONS = {
    "coco": Annotations("COCO captions", _is_coco, _coco),
    "karpathy": Annotations("Karpathy's splits", _is_karpathy, _karpathy),
    "flickr": Annotations("Flickr tokens", _is_tokens, _tokens),
}
