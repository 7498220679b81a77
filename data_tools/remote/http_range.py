"""Ranges over HTTP, streamed: what a server sends beyond what was asked for is never read, let alone held in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from data_tools.redaction import redact
from data_tools.remote.retry import RemoteError, TransientError, retry_after

if TYPE_CHECKING:
    import aiohttp

_CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Stat(NamedTuple):
    """An object: its length (None where the server does not tell), its version, and whether ranges can be read."""

    size: int | None
    version: str
    ranges: bool


class Span:
    """The bytes `at`..`stop` of an object that are still to come; `put` hands them on in order."""

    def __init__(self, start: int, stop: int, write: Callable[[int, bytes], None]):
        self.at, self.stop, self._write = start, stop, write

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return self.stop - self.at

    def put(self, data: bytes) -> None:
        """Take the next bytes; those beyond `stop` are dropped."""
        data = data[: self.left]
        self._write(self.at, data)
        self.at += len(data)


def too_short(url: str, size: int, span: Span) -> RemoteError:
    """The error of an object that ends inside the span: no repetition makes it longer."""
    remedy = "upload the file again"
    return RemoteError(f"{redact(url)} is too short", got=f"{size} bytes", expected=f">= {span.stop}", remedy=remedy)


def check_range(url: str, header: str, span: Span) -> None:
    """Whether a Content-Range begins where `span` goes on. Raises TransientError, or RemoteError for a short object."""
    found = _CONTENT_RANGE.match(header)
    if not found or found[1] is None or int(found[1]) != span.at:
        raise TransientError(f"another range than asked for: {header or 'no Content-Range'}, from {span.at}")
    if found[3] != "*" and int(found[3]) < span.stop:
        raise too_short(url, int(found[3]), span)


async def stat_http(fs: Any, url: str, idle: float) -> Stat:
    """Length and version from the headers of a one-byte range: unlike HEAD it works with URLs signed for reading."""
    async with await _get(fs, url, 0, 1, idle) as response:
        version = str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        if response.status in (206, 416):
            size = int(found[3]) if found and found[3] != "*" else None
            ranges = response.status == 206
        else:
            size, ranges = response.content_length, False
        response.close()  # the body is not wanted, however long it is
        return Stat(size, version, ranges)


async def read_http(fs: Any, url: str, span: Span, idle: float) -> None:
    """One request for what is left of `span`. A server that ignores ranges is read from its first byte on."""
    async with await _get(fs, url, span.at, span.stop, idle) as response:
        skip = 0
        if response.status == 206:
            check_range(url, response.headers.get("Content-Range", ""), span)
        elif response.status == 416:
            raise too_short(url, span.at, span)
        else:
            skip = span.at
        async for chunk in response.content.iter_chunked(_CHUNK):
            dropped = min(skip, len(chunk))
            skip -= dropped
            span.put(chunk[dropped:])
            if not span.left:
                break
        response.close()  # more may be coming
    if span.left:
        raise TransientError(f"the body ends {span.left} bytes early")


async def _get(fs: Any, url: str, start: int, stop: int, idle: float) -> aiohttp.ClientResponse:
    """The response to a range request, its status judged. Raises FileNotFoundError, PermissionError, TransientError."""
    import aiohttp

    session = await fs.set_session()
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=idle, sock_read=idle)
    response = await session.get(fs.encode_url(url), headers=headers, timeout=timeout)
    status = response.status
    if status in (200, 206, 416):
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() == "identity":
            return response
        response.close()
        remedy = "serve it without a Content-Encoding"
        raise RemoteError(f"cannot read {redact(url)}", got=f"a body in {encoding}", expected="plain", remedy=remedy)
    after = retry_after(response.headers.get("Retry-After"))
    response.close()
    if status in (301, 302, 303, 307, 308):  # it leads nowhere, or would have been followed
        raise RemoteError(f"cannot read {redact(url)}", got=f"HTTP {status} without a Location", remedy="check the URL")
    if status in (404, 410):
        raise FileNotFoundError(f"HTTP {status}")
    if status in (401, 403, 407):
        raise PermissionError(f"HTTP {status}")
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(f"HTTP {status}", after)
    raise RemoteError(f"cannot read {redact(url)}", got=f"HTTP {status}", remedy="check the URL")
