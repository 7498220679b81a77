"""Pictures that lie within another file, such as a table: where each is, and how it is read again."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import UserError
from data_tools.format.files import opened, read_span
from data_tools.media.bad import BadSampleError
from data_tools.media.image import SNIFFED, sniff


@dataclass(frozen=True, slots=True)
class Span:
    """A picture's bytes within a file; `format` is the extension for its first bytes, None for no known image."""

    file: str
    start: int
    size: int
    format: str | None

    def read(self, limit: int) -> bytes:
        """The bytes. Raises BadSampleError: `too_large` above `limit`, `unreadable_file` where the file has changed."""
        if self.size > limit:
            raise BadSampleError("too_large", f"{self.size} bytes, the limit is {limit}")
        try:
            with opened(Path(self.file)) as file:
                data = read_span(file, self.start, self.start + self.size)
        except UserError as error:
            raise BadSampleError("unreadable_file", str(error)) from None
        if len(data) < self.size:
            raise BadSampleError("unreadable_file", "the table ends within the picture")
        return data


class Spool:
    """Pictures of a table that cannot be entered in the middle, copied one after the other into a file without a name:
    the system frees it when the process ends, however it ends. `folder` need not exist yet."""

    def __init__(self, folder: Path):
        above = (one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
        self._file = tempfile.TemporaryFile(dir=next(above))  # noqa: SIM115 - workers read it until the pack ends
        self._size = 0

    def add(self, data: bytes) -> Span:
        """Keep a picture. Raises UserError where the disk has no room."""
        try:
            self._file.write(data)
        except OSError as error:
            raise self._full(error) from None
        # processes of the same user reach an open file by its number
        span = Span(f"/proc/{os.getpid()}/fd/{self._file.fileno()}", self._size, len(data), sniff(data[:SNIFFED]))
        self._size += len(data)
        return span

    def flush(self) -> None:
        """Let workers see all that was added. Raises UserError where the disk has no room."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> UserError:
        what = "the pictures of the table cannot be copied beside the output"
        return UserError(what, got=error.strerror, remedy="make room there for all of them, while the pack runs")
