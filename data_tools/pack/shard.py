"""Packing one shard: check every image, write tar, index and the parquet that accounts for every input row."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.build.accounts import PACKED, SKIPPED, to_json, write_account
from data_tools.errors import shown
from data_tools.format.manifest import ShardRecord
from data_tools.format.writer import write_shard
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import clean
from data_tools.media.files import read_file
from data_tools.pack.image import CheckedImage, Limits, check_image
from data_tools.pack.rows import Item, Row

_ADVANCE_EVERY = 32
_STORED_FIELDS = ("captions", "id", "label", "width", "height", "sha256", "orientation")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. `extension` is that of all images, None for that of their format; `classes` maps a label to
    its number, None packs no labels."""

    folder: Path
    name: str
    root: Path
    items: list[Item]
    limits: Limits
    extension: str | None
    classes: dict[str, int] | None
    digest: str


def pack_shard(task: ShardTask, advance: Callable[[int], None]) -> ShardRecord:
    """Commit tar, then index, then parquet; the shard counts as packed when its parquet is there."""
    rows: list[dict] = []
    index = write_shard(task.folder / f"{task.name}.tar", _samples(task, rows, advance))
    record = ShardRecord(task.name, index.num_samples, index.tar_bytes, index.tar_hash.hex())
    return write_account(task.folder, record, task.digest, rows)


@dataclass
class _Outcome:
    """What became of a sample's image: an error (class, detail), or the checked image and the sha256 of its bytes."""

    error: tuple[str, str] | None = None
    image: CheckedImage | None = None
    sha256: str | None = None


def _samples(task: ShardTask, accounts: list[dict], advance: Callable[[int], None]) -> Iterator[tuple[str, dict]]:
    waiting = 0
    for item in task.items:
        rows = [row for row in item.rows if not row.fault]
        outcome = _check(item, rows, task)
        accounts += [_account(item, row, outcome) for row in item.rows]
        waiting += len(item.rows)
        if waiting >= _ADVANCE_EVERY:
            advance(waiting)
            waiting = 0
        if outcome.image and not outcome.error:
            yield item.key, _members(item, rows, outcome.image, outcome.sha256 or "", task)
    advance(waiting)


def _check(item: Item, rows: list[Row], task: ShardTask) -> _Outcome:
    if not rows:
        return _Outcome()
    try:
        limit = task.limits.file_bytes
        data = item.span.read(limit) if item.span else read_file(task.root / item.image, limit)
        image = check_image(data, task.limits)
    except BadSampleError as error:
        return _Outcome((error.kind, error.reason))
    except (FileNotFoundError, NotADirectoryError):
        return _Outcome(("missing_file", f"no file {shown(item.image)}"))
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        return _Outcome(("unreadable_file", str(error.strerror if isinstance(error, OSError) else error)))
    return _Outcome(None, image, hashlib.sha256(image.data).hexdigest())


def _account(item: Item, row: Row, outcome: _Outcome) -> dict:
    error = row.fault or outcome.error
    image = None if error else outcome.image
    return {
        "id": item.id,
        "key": item.key,
        "source": clean(row.source),
        "status": SKIPPED if error else PACKED,
        "error_class": error[0] if error else None,
        "error": clean(error[1]) if error else None,
        "width": image.width if image else None,
        "height": image.height if image else None,
        "bytes": len(image.data) if image else None,
        "sha256": outcome.sha256 if image else None,
        "phash": None,
        "captions": row.captions,
        "label": row.label,
        "metadata": to_json(row.metadata),
    }


def _members(item: Item, rows: list[Row], image: CheckedImage, sha256: str, task: ShardTask) -> dict[str, bytes]:
    """Captions of all rows of the sample; metadata of its first row."""
    captions = [caption for row in rows for caption in row.captions]
    fields: dict[str, object] = {
        "captions": captions,
        "id": item.id,
        "width": image.width,
        "height": image.height,
        "sha256": sha256,
        "orientation": image.orientation,
    }
    members = {task.extension or image.extension: image.data}
    if captions:
        members["txt"] = captions[0].encode()
    if task.classes is not None:
        fields["label"] = label = rows[0].label or ""
        members["cls"] = str(task.classes[label]).encode()
    for name, value in rows[0].metadata.items():
        fields[f"input_{name}" if name in _STORED_FIELDS else name] = value
    members["json"] = to_json(fields).encode()
    return members
