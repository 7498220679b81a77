"""The pictures that predictions are asked for, in order: of a folder, a table, one file, or shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from data_tools.corpus import Corpus, ShardReader, open_corpus
from data_tools.corpus.sources import holds_shards
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.files import read_file
from data_tools.media.image import is_image_name
from data_tools.media.members import DEFAULT_FIELDS
from data_tools.pack.delimited import Dialect
from data_tools.pack.folder import read_folder
from data_tools.pack.records import read_records, table_suffix
from data_tools.pack.rows import clean
from data_tools.remote.urls import is_remote
from pretrain.stream.samples import read_sample
from pretrain.stream.transform import ImageTransform

_MOST_BYTES = 100_000_000  # of a file, as packing has it by default


class Pictures(Protocol):
    """Pictures by number. Picklable: loader processes read them."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> tuple[str, Callable[[], bytes]]:
        """The id of a picture and what reads its bytes, which raises BadSampleError."""


@dataclass(frozen=True)
class Files:
    """Files by name: `ids` as they are shown, `paths` to be opened, None for a row that names none."""

    ids: list[str]
    paths: list[str | None]
    faults: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, number: int) -> tuple[str, Callable[[], bytes]]:
        """See `Pictures`."""
        return self.ids[number], lambda: self._bytes(number)

    def _bytes(self, number: int) -> bytes:
        path = self.paths[number]
        if path is None:
            raise BadSampleError("bad_row", self.faults.get(number, "the row names no image"))
        try:
            return read_file(path, _MOST_BYTES)
        except OSError as error:
            raise BadSampleError("unreadable_file", error.strerror or type(error).__name__) from error
        except BadSampleError:
            raise
        except ValueError as error:  # a null byte in the path
            raise BadSampleError("unreadable_file", str(error)) from error


class Shards:
    """The samples of a corpus; their ids are their keys."""

    def __init__(self, corpus: Corpus):
        self.reader = ShardReader(corpus)

    def __len__(self) -> int:
        return self.reader.corpus.num_samples

    def read(self, number: int) -> tuple[str, Callable[[], bytes]]:
        """See `Pictures`."""
        shard, index = self.reader.corpus.locate(number)
        try:
            sample = read_sample(self.reader, shard, index)
        except BadSampleError as error:
            return f"sample {index} of {os.path.basename(self.reader.corpus.paths[shard])}", _raising(error)
        return sample.key, lambda: DEFAULT_FIELDS.image_bytes(sample)


def _raising(error: Exception) -> Callable[[], bytes]:
    def read() -> bytes:
        raise error

    return read


def open_pictures(source: str, image_column: str = "image", image_root: str | None = None) -> Pictures:
    """The pictures that `source` means: a folder of pictures, of shards or of a packed corpus, a table, one picture,
    tars, a pattern of tars, or URLs of these.

    Raises:
        UserError: nothing there, no picture in it, or a table without that column.
    """
    path = Path(source)
    if is_remote(source):
        return Shards(open_corpus(source))
    if path.is_dir():
        return Shards(open_corpus(source)) if holds_shards(path) else _of_folder(path)
    if table_suffix(path) is not None:
        return _of_table(path, image_column, Path(image_root) if image_root else None)
    if is_image_name(path.name) and path.exists():
        return Files([clean(path.name)], [str(path)])
    if not path.exists() and path.suffix != ".tar" and not set(source) & set("*?[{"):
        expected = "a folder of pictures, a picture, a table (.csv, .tsv, .jsonl, .parquet), or shards"
        raise UserError(f"no input at {source}", expected=expected, remedy="check the path")
    return Shards(open_corpus(source))


def _of_folder(root: Path) -> Files:
    rows = read_folder(root, labels=True, follow_links=True).rows  # captions beside the pictures do not matter here
    return Files([clean(row.image) for row in rows], [str(root / row.image) for row in rows])


def _of_table(path: Path, column: str, image_root: Path | None) -> Files:
    if not path.is_file():
        raise UserError(f"no table at {path}", remedy="check the path")
    ids: list[str] = []
    images: list[str | None] = []
    faults: dict[int, str] = {}
    for source, values, fault in read_records(path, Dialect(), (column,), []):
        if fault is None and column not in values:
            remedy = "name the column of image paths with --image-column"
            raise UserError(f"no column {column!r} in {path}", got=", ".join(map(str, values)), remedy=remedy)
        image = None if fault else values.get(column)
        if image is not None and not isinstance(image, str):
            image, fault = None, f"{type(image).__name__} in {column}, where the path of an image is due"
        if fault:
            faults[len(ids)] = fault
        name = (image or "").strip()
        ids.append(clean(name) or source)
        images.append(name or None)
    if not ids:
        raise UserError(f"no rows in {path}", expected="a row a picture")
    root = image_root or _root(path.parent, next(filter(None, images), ""))
    return Files(ids, [image and str(root / image) for image in images], faults)


def _root(folder: Path, first: str) -> Path:
    """Where a table's paths begin: its folder, or the `images/` in it."""
    beside = folder / "images"
    return beside if (beside / first).is_file() and not (folder / first).is_file() else folder


@dataclass(frozen=True)
class PictureBatch:
    """Pictures ready for the tower; one that could not be read is black and has its `errors` entry."""

    ids: list[str]
    images: torch.Tensor  # uint8 [n, 3, size, size]
    errors: list[str | None]

    def pin_memory(self) -> PictureBatch:
        """The same with page-locked images; the loader calls it."""
        return PictureBatch(self.ids, self.images.pin_memory(), self.errors)


@dataclass(frozen=True)
class BatchBuilder:
    """Builds batch `number` of `batch` pictures, in a loader process."""

    pictures: Pictures
    transform: ImageTransform
    batch: int

    def __call__(self, number: int) -> PictureBatch:
        first = number * self.batch
        count = min(self.batch, len(self.pictures) - first)
        size = self.transform.settings.size
        images = torch.zeros((count, 3, size, size), dtype=torch.uint8)
        ids, errors = [], []
        for row in range(count):
            name, read = self.pictures.read(first + row)
            reason = None
            try:
                images[row] = torch.tensor(self.transform.evaluate(read())).permute(2, 0, 1)
            except BadSampleError as error:
                reason = f"{error.kind}: {error.reason}"
            ids.append(name)
            errors.append(reason)
        return PictureBatch(ids, images, errors)
