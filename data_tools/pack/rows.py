"""What is to be packed: input rows, grouped into samples."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from data_tools.errors import shown
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import clean, usable
from data_tools.media.files import MISSING, look
from data_tools.media.image import SNIFFED, sniff
from data_tools.pack.inside import Boundary
from data_tools.pack.span import Span, Spool

_KINDS = 6  # of ignored files that are shown


@dataclass(slots=True)
class Row:
    """One input row.

    Attributes:
        source: where it stands in the input: the image's path, or `table:line`.
        image: path of the image, relative to the root of the input; empty when the row names none.
        captions: as found; may hold blanks.
        fault: (error class, detail) of a row that cannot be packed whatever its image is.
        span: where the picture's bytes are when they lie within another file; `image` is then a mere name.
    """

    source: str
    image: str
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    metadata: dict = field(default_factory=dict)
    fault: tuple[str, str] | None = None
    span: Span | None = None


@dataclass(slots=True)
class Item:
    """The rows that become one sample. `id` names it in the source; `size` is the image file's, MISSING without one;
    `format` is the extension for its first bytes, None for no known image."""

    id: str
    image: str
    rows: list[Row]
    size: int = MISSING
    format: str | None = None

    @property
    def span(self) -> Span | None:
        """Where the picture lies within another file; None: in a file of its own."""
        return self.rows[0].span

    @property
    def key(self) -> str:
        """The sample's name in the tar: dot-free, and the same wherever its row stands."""
        return xxhash.xxh3_128_hexdigest(self.id.encode())


@dataclass
class Source:
    """Everything read from an input. `labels` are the class names in order; `ignored` counts files that are no rows,
    by suffix; `notes` are what the summary says of the reading, a line each; `spool` is kept open for the spans in
    it."""

    root: Path
    rows: list[Row]
    captioned: bool
    labels: tuple[str, ...] | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    spool: Spool | None = None


def kinds_of(ignored: Counter[str]) -> str:
    """The suffixes of ignored files with their counts, for a message; "" for none."""
    listed = ", ".join(
        f"{count} {shown(suffix or 'without suffix', 20)}" for suffix, count in ignored.most_common(_KINDS)
    )
    return f": {listed}{', ...' if len(ignored) > _KINDS else ''}" if listed else ""


def group(source: Source, pairs: bool) -> list[Item]:
    """Rows of one image make one sample; with `pairs` every caption makes one. Order of first appearance."""
    rows = _split_captions(source.rows) if pairs else source.rows
    seen: Counter[str] = Counter()
    items: dict[str, Item] = {}
    for row in rows:
        _check_texts(row, source)
        name = clean(row.image or row.source)
        if pairs:
            seen[name] += 1
            name = f"{name}#{seen[name] - 1}"
        item = items.get(name)
        if item is None:
            items[name] = Item(name, row.image, [row])
        else:
            _check_label(row, item.rows)
            item.rows.append(row)
    return list(items.values())


def measure(items: Iterable[Item], boundary: Boundary) -> None:
    """Fill in the size and the format of every image file; rows of a file outside the boundary become faults, and it is
    not read."""
    for item in items:
        if item.span:
            item.size, item.format = item.span.size, item.span.format
            continue
        fault = boundary.fault(item.image)
        if fault:
            _refuse(item, fault)
            continue
        if item.image:
            item.size, start = look(boundary.root / item.image, SNIFFED)
            item.format = sniff(start)


def _refuse(item: Item, fault: tuple[str, str]) -> None:
    for row in item.rows:
        row.fault = row.fault or fault


def _split_captions(rows: list[Row]) -> Iterable[Row]:
    for row in rows:
        for caption in row.captions or [""]:
            yield Row(row.source, row.image, [caption], row.label, row.metadata, row.fault, row.span)


def _check_texts(row: Row, source: Source) -> None:
    try:
        row.captions = usable(row.captions)
    except BadSampleError as error:
        row.captions, row.fault = [], row.fault or (error.kind, error.reason)
    if row.fault:
        return
    if not row.image:
        row.fault = ("missing_file", "the row names no image")
    elif source.captioned and not row.captions:
        row.fault = ("empty_caption", "no caption")
    elif source.labels is not None and not row.label:
        row.fault = ("empty_label", "no label")


def _check_label(row: Row, others: list[Row]) -> None:
    first = next((other.label for other in others if not other.fault), row.label)
    if not row.fault and row.label != first:
        row.fault = ("conflicting_label", f"{row.label!r} here, {first!r} in a row before")
