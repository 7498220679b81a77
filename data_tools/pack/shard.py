"""Packing one shard: check every image, write tar, index and the parquet that accounts for every input row."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import shown
from data_tools.format.manifest import ShardRecord
from data_tools.format.writer import write_shard
from data_tools.media.bad import BadSampleError
from data_tools.media.files import read_file
from data_tools.pack.accounts import Accounts, Outcome, to_json
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
    accounts = Accounts()
    index = write_shard(task.folder / f"{task.name}.tar", _samples(task, accounts, advance))
    record = ShardRecord(task.name, index.num_samples, index.tar_bytes, index.tar_hash.hex())
    return accounts.commit(task.folder, record, task.digest)


def _samples(task: ShardTask, accounts: Accounts, advance: Callable[[int], None]) -> Iterator[tuple[str, dict]]:
    waiting = 0
    for item in task.items:
        rows = [row for row in item.rows if not row.fault]
        outcome = _check(item, rows, task)
        accounts.add(item, outcome)
        waiting += len(item.rows)
        if waiting >= _ADVANCE_EVERY:
            advance(waiting)
            waiting = 0
        if outcome.image and not outcome.error:
            yield item.key, _members(item, rows, outcome.image, outcome.sha256 or "", task)
    advance(waiting)


def _check(item: Item, rows: list[Row], task: ShardTask) -> Outcome:
    if not rows:
        return Outcome()
    try:
        image = check_image(read_file(task.root / item.image, task.limits.file_bytes), task.limits)
    except BadSampleError as error:
        return Outcome((error.kind, error.reason))
    except (FileNotFoundError, NotADirectoryError):
        return Outcome(("missing_file", f"no file {shown(item.image)}"))
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        return Outcome(("unreadable_file", str(error.strerror if isinstance(error, OSError) else error)))
    return Outcome(None, image, hashlib.sha256(image.data).hexdigest())


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
