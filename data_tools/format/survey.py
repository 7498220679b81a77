"""From a tar to its index: files grouped into samples, what is damaged left out and named, what is no sample counted.

A damaged header ends nothing: the walk goes on at the next sound one. In the index one sample without members stands
for each that is known to be lost, so that training replaces and counts it and evaluation refuses. A sample beside the
damage may have lost members there. It is kept if it has all the members that every other sample has.
"""

import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UserError
from data_tools.format.files import FileBytes, opened
from data_tools.format.index import MAX_SPAN, Index, IndexBuilder, hash_file
from data_tools.format.tar import (
    BLOCK,
    EXTENDING,
    MAGIC,
    TYPE_AT,
    Buffer,
    Entry,
    TarDamageError,
    TarLayoutError,
    has_checksum,
    next_header,
    split_name,
    walk,
)

_BEGIN = 24  # bytes of a file that are shown
_MAX_HOLES = 1 << 30  # bytes
_WHOLE_NAME = 99  # bytes from which on the name in a header may be cut
_KEPT = 5  # names and losses that are remembered to be shown
_RESORT = "unpack it and pack it sorted by name: tar -xf OLD.tar -C FOLDER; tar --sort=name -cf NEW.tar -C FOLDER ."
_RENAME = "give each sample a key of its own and pack the tar anew; unpacking would keep only the last of each name"
_UNCOMPRESS = "unpack it, for samples are read from any place of a shard:"
_UNPACK = "unpack it, and make shards of the folder with `python -m data_tools pack`"
# The beginnings of files that are offered as tars, what they are, and what to do with them.
_OTHERS = {
    b"\x1f\x8b": ("compressed with gzip", f"{_UNCOMPRESS} gunzip -k {{}}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", f"{_UNCOMPRESS} zstd -dk {{}}"),
    b"BZh": ("compressed with bzip2", f"{_UNCOMPRESS} bunzip2 -k {{}}"),
    b"\xfd7zXZ\0": ("compressed with xz", f"{_UNCOMPRESS} xz -dk {{}}"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", f"{_UNCOMPRESS} lz4 -dk {{}}"),
    b"PK\3\4": ("a zip archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!": ("a rar archive", _UNPACK),
    b"PAR1": ("a Parquet table", "name it .parquet, and make shards of it with `python -m data_tools pack`"),
    b"ARROW1": ("an Arrow table", "write it as .parquet, and make shards of that with `python -m data_tools pack`"),
}
# Files about a corpus, which lie in tars beside its samples and are none.
_DOCUMENTS = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "authors"}
_DOCUMENTS |= {"classnames", "nshards", "dataset_type", "zeroshot_classification_templates"}  # CLIP_benchmark's
_DOCUMENT_KINDS = {"md", "rst", "html", "htm", "pdf", "csv", "tsv", "log", "ini", "db"}
_DOCUMENT_KINDS |= {"md5", "sha1", "sha256", "py", "sh", "yaml", "yml", "toml"}


class Loss(NamedTuple):
    """A stretch of a tar that cannot be read: its first byte, the byte behind it, and the fault."""

    start: int
    stop: int
    what: str


@dataclass(frozen=True)
class Survey:
    """What a tar holds. `losses` are the first few damaged stretches of `damages`; `passed` counts the files that
    belong to no sample, and `passed_names` has a few of their names."""

    index: Index
    losses: list[Loss]
    damages: int
    passed: int
    passed_names: list[str]

    def describe_losses(self, tar: object) -> list[str]:
        """A line for each damaged stretch that is remembered, and one for how many there are beside them."""
        lines = [
            f"damaged tar {tar}: {loss.what} at byte {loss.start}; nothing up to byte {loss.stop} can be read"
            for loss in self.losses
        ]
        if self.damages > len(self.losses):
            lines.append(f"damaged tar {tar}: and {self.damages - len(self.losses)} more damaged places")
        return lines


def build_index(tar: Path) -> Index:
    """The index of a tar; see `survey_tar`."""
    return survey_tar(tar).index


def survey_tar(tar: Path) -> Survey:
    """Walk and hash a tar.

    Raises UserError: it is missing, empty, compressed or no tar at all (TarDamageError, where no whole sample is found
    either), or its samples are not contiguous and unique (TarLayoutError).
    """
    try:
        with opened(tar) as file:
            buffer = FileBytes(file)
            _refuse_others(buffer, tar)
            _refuse_holes(file, len(buffer), tar)
            grouping = _Grouping(tar)
            for event in _events(buffer, tar):
                grouping.add(event)
            begin = bytes(buffer[:BLOCK])
            if grouping.is_empty and any(begin) and MAGIC not in begin and not has_checksum(begin):
                remedy = "fetch it again; pictures and tables are packed with `python -m data_tools pack`"
                got = f"a file that begins with {begin[:_BEGIN]!r}"
                raise UserError(f"{tar} is no tar", got=got, expected="a plain tar", remedy=remedy)
            return grouping.finish(len(buffer), hash_file(tar))
    except FileNotFoundError:
        raise UserError(f"missing shard {tar}", remedy="check the path or copy the shard back") from None


def _refuse_others(buffer: Buffer, tar: Path) -> None:
    if not len(buffer):
        raise TarDamageError(tar, 0, "the file is empty")
    begin = bytes(buffer[:BLOCK])
    if has_checksum(begin):  # a tar, whose first file may be called BZh.jpg
        return
    for magic, (what, remedy) in _OTHERS.items():
        if begin.startswith(magic):
            raise UserError(f"{tar} is {what}", expected="a plain tar", remedy=remedy.format(tar))


def _refuse_holes(file: int, size: int, tar: Path) -> None:
    """A file that somebody made large without writing it would be read for hours."""
    at = never_written = 0
    while (hole := os.lseek(file, at, os.SEEK_HOLE)) < size:
        try:
            at = os.lseek(file, hole, os.SEEK_DATA)
        except OSError:  # no data behind it
            at = size
        never_written += at - hole
        if never_written > _MAX_HOLES:
            raise TarDamageError(tar, hole, f"{never_written} bytes that were never written")
        if at >= size:
            return


def _events(buffer: Buffer, tar: Path) -> Iterator[Entry | Loss | int]:
    """The files of a tar and its damaged stretches, in order; last the byte at which its content ends."""
    start: int | None = 0
    before: Loss | None = None
    while start is not None:
        entries = _Returning(walk(buffer, tar, start))
        try:
            yield from _named(entries, buffer, before)
            yield entries.value
            return
        except TarDamageError as error:
            start = next_header(buffer, error.offset + BLOCK)
            before = Loss(error.offset, len(buffer) if start is None else start, error.what)
            yield before
    yield len(buffer)


def _named(entries: Iterable[Entry], buffer: Buffer, before: Loss | None) -> Iterator[Entry | Loss]:
    """The files behind a damage, the first as a part of it if its name may be another one."""
    for entry in entries:
        misnamed = before is not None and _may_be_misnamed(entry, buffer, before)
        yield Loss(entry.start, entry.data + entry.size, "") if misnamed else entry
        before = None


def _may_be_misnamed(entry: Entry, buffer: Buffer, before: Loss) -> bool:
    """Whether the first file behind a damage has the name in its own header only, and the true one was lost: a header
    of a name stood there, or this name looks like what is written where another header has the whole of it."""
    named_here = entry.start == entry.data - BLOCK
    kind = bytes(buffer[before.start + TYPE_AT : before.start + TYPE_AT + 1])
    return named_here and (kind in EXTENDING or "?" in entry.name or len(entry.name) >= _WHOLE_NAME)


class _Returning:
    """Iterates a generator and keeps what it returns."""

    def __init__(self, generator: Generator[Entry, None, int]):
        self._generator = generator
        self.value = 0

    def __iter__(self) -> Iterator[Entry]:
        self.value = yield from self._generator


@dataclass
class _Group:
    """Files of one key that follow each other; `members` has (offset from the start, bytes) by extension."""

    key: str
    start: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    suspect: bool = False  # it lies beside a damage
    broken: bool = False  # a damage lies within it

    @property
    def is_document(self) -> bool:
        """Whether these are files about the corpus and no sample."""
        name = self.key.rsplit("/", 1)[-1].lower()
        return all(kind in _DOCUMENT_KINDS for kind in self.members) or (
            name in _DOCUMENTS and set(self.members) <= {"txt", "json", "md"}
        )


class _Grouping:
    """Groups the files of a tar into samples, as WebDataset does: consecutive files of equal key."""

    def __init__(self, tar: Path):
        self._tar = tar
        self._seen: set[str] = set()
        self._done: list[_Group | Loss] = []
        self._open: _Group | None = None
        self._aside: _Group | None = None  # files that look like documents, between the files of the open sample
        self._end = 0
        self._losses: list[Loss] = []
        self._damages = self._passed = 0
        self._passed_names: list[str] = []

    def add(self, event: Entry | Loss | int) -> None:
        """Take the next thing of the tar."""
        if isinstance(event, Entry):
            self._add_file(event)
        elif isinstance(event, Loss):
            self._add_loss(event)
        else:
            self._end = event

    @property
    def is_empty(self) -> bool:
        """Whether nothing but damage was found."""
        return not (self._open or self._aside or self._passed) and all(isinstance(x, Loss) for x in self._done)

    def finish(self, tar_bytes: int, tar_hash: bytes) -> Survey:
        """The survey; raises TarDamageError where the tar is damaged and has no whole sample."""
        self._close()
        groups = [item for item in self._done if isinstance(item, _Group)]
        whole = [group for group in groups if not group.suspect]
        counts = Counter(extension for group in whole for extension in group.members)
        usual = {extension for extension, count in counts.items() if count == len(whole)}
        for group in groups:
            group.broken = group.broken or (group.suspect and not usual <= set(group.members))
        if self._losses and all(group.broken for group in groups):
            raise TarDamageError(self._tar, self._losses[0].start, self._losses[0].what)
        index = self._index(tar_bytes, tar_hash)
        return Survey(index, self._losses, self._damages, self._passed, self._passed_names)

    def _index(self, tar_bytes: int, tar_hash: bytes) -> Index:
        builder, lost = IndexBuilder(), ""
        for number, item in enumerate(self._done):
            beside = self._done[max(0, number - 1) : number + 2]
            if isinstance(item, Loss):
                if not any(isinstance(other, _Group) and other.broken for other in beside):
                    builder.add_lost(item.start)
            elif not item.broken:
                members = [(extension, at, size) for extension, (at, size) in item.members.items()]
                builder.add(item.key, item.start, members)
            elif item.key != lost:  # else the second part of a sample with the damage within it
                before = beside[0]
                builder.add_lost(before.start if isinstance(before, Loss) else item.start)
                lost = item.key
        return builder.finish(self._end, tar_bytes, tar_hash)

    def _add_loss(self, loss: Loss) -> None:
        self._close()
        last = self._done[-1] if self._done else None
        if isinstance(last, Loss):  # nothing but damage between
            self._done[-1] = last._replace(stop=loss.stop)
            if self._damages <= _KEPT:
                self._losses[-1] = self._losses[-1]._replace(stop=loss.stop)
            return
        if isinstance(last, _Group):
            last.suspect = True
        self._done.append(loss)
        self._damages += 1
        if len(self._losses) < _KEPT:
            self._losses.append(loss)

    def _add_file(self, entry: Entry) -> None:
        name = None if entry.is_link else split_name(entry.name)
        if name is None or not name[1].isprintable():
            self._pass(entry.name)
            return
        key, extension = name
        group = next((group for group in (self._open, self._aside) if group and group.key == key), None)
        if group is None:
            group = self._begin(key, entry.start)
        if extension in group.members:
            raise TarLayoutError(self._tar, entry.start, f"member {entry.name!r} twice in one sample", _RENAME)
        if entry.data + entry.size - group.start >= MAX_SPAN:
            remedy = "pack it anew with smaller samples"
            raise TarLayoutError(self._tar, entry.start, "a sample beyond 4 GiB", remedy)
        group.members[extension] = (entry.data - group.start, entry.size)
        if group is self._aside and not group.is_document:
            self._close(self._aside)

    def _begin(self, key: str, start: int) -> _Group:
        """A new group, aside at first: only its extension tells whether the open sample ends with it."""
        self._drop_aside()
        self._aside = _Group(key, start)
        return self._aside

    def _drop_aside(self) -> None:
        if self._aside:
            self._pass(*(f"{self._aside.key}.{extension}" for extension in self._aside.members))
        self._aside = None

    def _close(self, following: _Group | None = None) -> None:
        """End the open sample; `following` is the next one."""
        if self._aside is following:
            self._aside = None
        self._drop_aside()
        if self._open:
            self._done.append(self._open)
        self._open = following
        if following:
            self._judge(following)

    def _judge(self, group: _Group) -> None:
        """Refuse a key that was there before, but for a sample that a damage has cut in two."""
        before = self._done[-2:]
        group.suspect = bool(before) and isinstance(before[-1], Loss)
        earlier = before[0] if group.suspect and len(before) == 2 else None
        if isinstance(earlier, _Group) and earlier.key == group.key:
            earlier.broken = group.broken = True
        elif group.key in self._seen:
            first = next(item for item in self._done if isinstance(item, _Group) and item.key == group.key)
            twice = any(extension in first.members for extension in group.members)
            what = f"key {group.key!r} again after other samples (first at byte {first.start})"
            raise TarLayoutError(self._tar, group.start, what, _RENAME if twice else _RESORT)
        self._seen.add(group.key)

    def _pass(self, *names: str) -> None:
        self._passed += len(names)
        self._passed_names += names[: max(0, _KEPT - len(self._passed_names))]
