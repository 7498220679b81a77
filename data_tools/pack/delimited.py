"""CSV and TSV files: every physical line becomes a row, a part of one, or an error that names it."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from data_tools.errors import UserError
from data_tools.media.image import SUFFIXES

LINE_LIMIT = 1 << 24  # characters of a line, and of a field over several lines
_ROWLIKE = 2  # continued lines with as many delimiters as a row has, from which on a quote counts as misplaced
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_PEEKED = 1 << 16
_EXCEL_HINT = re.compile(r'"?sep=(.)"?\s*')


@dataclass(frozen=True)
class Dialect:
    """How double quotes are read. `quoted` None: as quoting in a .csv, as characters in a .tsv. `multiline`: fields may
    hold lines that look like rows."""

    quoted: bool | None = None
    multiline: bool = False


class Record(NamedTuple):
    """One row of a table: where it stands, its values by column, and why it is bad if it is."""

    source: str
    values: dict
    fault: str | None = None


def read_delimited(
    path: Path, file: IO[bytes], tabs: bool, dialect: Dialect, wanted: tuple[str, ...], notes: list[str]
) -> Iterator[Record]:
    """The records below the header. Its delimiter is the one that yields the `wanted` columns, the image's first, by
    preference the one that the file's name promises; `notes` receives how the lines add up.

    Raises UserError, with the line: text that is not UTF-8 (or UTF-16 with its mark), a quote left open, and a field in
    quotes that swallows what looks like rows.
    """
    csv.field_size_limit(LINE_LIMIT)
    quoted = not tabs if dialect.quoted is None else dialect.quoted
    lines = _Lines(path, _decoded(file), quoted and not dialect.multiline)
    promised = "\t" if tabs else ","
    delimiter = _delimiter(lines, promised, quoted, wanted)
    if delimiter != promised:
        notes.append(f"columns of {path.name} are separated by {_DELIMITERS.get(delimiter, repr(delimiter))}")
    records = _parsed(lines, csv.reader(lines, delimiter=delimiter, strict=True, quoting=_quoting(quoted)))
    header: list[str] = []
    rows = blank = continued = in_quotes = 0
    for first, fields, fault in records:
        if not header:
            header = _header(path, fields, fault)
            lines.expect(delimiter, header, wanted[0])
            top = lines.number
            continue
        blank += not fields and not fault
        if not fields and not fault:
            continue
        rows, continued = rows + 1, continued + lines.number - first
        in_quotes += not quoted and any(_is_quoted(value) for value in fields)
        if not fault and len(fields) != len(header):
            fault = f"{len(fields)} fields, the header has {len(header)}"
        yield Record(f"{path.name}:{first}", dict(zip(header, fields, strict=False)), fault)
    if header:
        more = f", {continued} further lines of fields in quotes" if continued else ""
        blanks = f", {blank} blank" if blank else ""
        notes.append(f"read {lines.number} lines of {path.name}: {rows} rows, {top} of header{more}{blanks}")
    if in_quotes:
        notes.append(f"{in_quotes} rows have fields in double quotes, which stay in them; --quotes csv removes them")


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] == '"'


def _decoded(file: IO[bytes]) -> IO[str]:
    """The text of a file by its byte order mark, line ends as they are; bytes that are not UTF-8 become surrogates.

    Where lines end in line feeds a lone carriage return is no line end: it would cut a caption in two.
    """
    start = file.peek(_PEEKED)  # type: ignore[attr-defined]
    newline = "" if b"\r" in start and b"\n" not in start else "\n"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return io.TextIOWrapper(file, "utf-16", newline=newline)
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=newline)


def _quoting(quoted: bool) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE


class _Lines:
    """Feeds a csv.reader line by line. What it asks for within a record lies inside a field in quotes."""

    def __init__(self, path: Path, file: IO[str], guarded: bool):
        self.path, self.number, self.first, self.ended, self.null = path, 0, 1, False, False
        self._file, self._guarded = file, guarded
        self._pushed: str | None = None
        self._delimiter, self._width, self._image, self._rowlike = ",", 0, 0, 0

    def expect(self, delimiter: str, header: list[str], image: str) -> None:
        """What a row looks like; before this is known, none is looked for."""
        self._delimiter, self._width = delimiter, len(header)
        self._image = header.index(image) if image in header else 0

    def begin(self) -> None:
        """The next line begins a record."""
        self.first, self._rowlike, self.null = self.number + 1, 0, False

    def push(self, line: str) -> None:
        """Give a line back."""
        self._pushed, self.number = line, self.number - 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, self._pushed = self._pushed, None
        if line is None:
            line = self._read()
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        self.null = self.null or "\0" in line
        if self.number > self.first and self._guarded:
            self._look_for_rows(line)
        return line

    def _read(self) -> str:
        try:
            line = self._file.readline(LINE_LIMIT)
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {self.path} behind line {self.number}", got=error, expected="UTF-8") from None
        number = self.number + 1
        if len(line) >= LINE_LIMIT:
            got = f"{LINE_LIMIT} characters and more"
            raise UserError(f"line {number} of {self.path} is too long", got=got, expected="rows on lines")
        alien = None if line.isascii() else _NOT_UTF8.search(line)
        if alien:
            got = f"byte 0x{ord(alien[0]) - 0xDC00:x} after {line[max(0, alien.start() - 20) : alien.start()]!r}"
            remedy = "convert the file, for example with `iconv -f windows-1252 -t utf-8`"
            raise UserError(f"line {number} of {self.path} cannot be read", got=got, expected="UTF-8", remedy=remedy)
        return line

    def _look_for_rows(self, line: str) -> None:
        """Raise UserError when the field that goes on here has swallowed rows."""
        end = _closing_quote(line)
        cells = line[:end].rstrip("\r\n").split(self._delimiter)
        if len(cells) == self._width:
            self._rowlike += 1
            if self._rowlike >= _ROWLIKE or cells[self._image].strip().lower().endswith(tuple(SUFFIXES)):
                raise self.misplaced(f"line {self.number} inside of it, which looks like a row")
        if end is not None:
            self._rowlike = 0

    def misplaced(self, got: str) -> UserError:
        """The error of a quote that opens a field in the record being read, and should not."""
        return UserError(
            f"line {self.first} of {self.path}: a double quote opens a field that does not end on this line",
            got=got,
            expected="a field in quotes that ends in a quote, with the quotes inside doubled",
            remedy="mend the line, or add --quotes none where quotes are characters, --multiline where fields hold such"
            " lines",
        )


def _closing_quote(line: str) -> int | None:
    """Where the field ends in whose middle the line begins; None when it goes on. Two quotes in a row stand for one."""
    at = line.find('"')
    while at >= 0 and line[at + 1 : at + 2] == '"':
        at = line.find('"', at + 2)
    return at if at >= 0 else None


def _delimiter(lines: _Lines, promised: str, quoted: bool, wanted: tuple[str, ...]) -> str:
    """Of the header. The first line stays to be read, unless it is Excel's `sep=;`."""
    lines.begin()
    for line in lines:
        if not line.strip():
            continue
        hint = _EXCEL_HINT.fullmatch(line)
        if hint:
            return hint[1]
        lines.push(line)
        split = {mark: set(_names(line, mark, quoted)) for mark in (promised, *_DELIMITERS)}
        fitting = [mark for mark, names in split.items() if names.issuperset(wanted)]
        return fitting[0] if fitting else max(split, key=lambda mark: len(split[mark]))
    return promised


def _names(line: str, delimiter: str, quoted: bool) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter, quoting=_quoting(quoted)), [])]
    except csv.Error:  # said when the header is read
        return []


def _parsed(lines: _Lines, reader) -> Iterator[tuple[int, list[str], str | None]]:
    """(first line, fields, fault) of every record, blank ones too."""
    while True:
        lines.begin()
        fields, fault = [], None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended:
                raise lines.misplaced(f"the end of the file, line {lines.number}, with the quote still open") from None
            if lines.number > lines.first:
                raise lines.misplaced(f"{error} on line {lines.number}") from None
            fault = _explained(str(error))
        if lines.null:
            fault = "a null byte in the line"
        yield lines.first, fields, fault


def _explained(message: str) -> str:
    """What the csv module has against a line by itself, in words that help."""
    if "expected after" in message:
        return "text behind the closing quote of a field: double the quotes inside, or --quotes none"
    return "a carriage return within the line" if "new-line" in message else message


def _header(path: Path, fields: list[str], fault: str | None) -> list[str]:
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if fault or twice:
        got = fault or f"{', '.join(twice)} more than once"
        expected = "a name for each column, as UTF-8 text"
        raise UserError(
            f"the header of {path} cannot be used", got=got, expected=expected, remedy="mend its first line"
        )
    return names
