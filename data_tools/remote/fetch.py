"""A whole object into an open file, by parallel ranges."""

import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from data_tools.errors import UserError
from data_tools.redaction import redact
from data_tools.remote.http_range import Span, Stat
from data_tools.remote.retry import Limits, RemoteError
from data_tools.remote.store import read_span, stat

PART = 16 << 20
CONNECTIONS = 8


def checked_stat(url: str, expected: int | None, limits: Limits) -> Stat:
    """The stat of an object, its length known and as expected. Raises RemoteError where it is not."""
    found = stat(url, limits)
    size = expected if found.size is None else found.size
    if size is None:
        raise RemoteError(f"the server tells no length of {redact(url)}", remedy="serve it with a Content-Length")
    if expected is not None and size != expected:
        raise RemoteError(
            f"size of shard {redact(url)} changed",
            got=f"{size} bytes",
            expected=f"{expected}, as in its manifest or index",
            remedy="upload the shard again, or its manifest or index if the shard is right",
        )
    return found._replace(size=size)


def fetch(url: str, found: Stat, descriptor: int, limits: Limits, part: int = PART) -> None:
    """Write all bytes of an object into a file. Raises RemoteError when it cannot be had in time, UserError when the
    disk takes no more."""
    size = found.size or 0
    until = time.monotonic() + limits.seconds(size)
    abandoned = threading.Event()

    def write(at: int, data: bytes) -> None:
        if abandoned.is_set():
            raise RemoteError(f"another part of {redact(url)} failed")
        _write(descriptor, at, data)

    step = part if found.ranges else max(size, 1)
    spans = [Span(start, min(start + step, size), write) for start in range(0, size, step)]
    with ThreadPoolExecutor(max(1, min(CONNECTIONS, len(spans))), "fetch") as pool:
        parts = [pool.submit(read_span, url, span, limits, until) for span in spans]
        try:
            done, _ = wait(parts, return_when=FIRST_EXCEPTION)
            fault = next((part.exception() for part in done if part.exception()), None)
            if fault is not None:
                raise fault from None
        except BaseException:  # an interrupt too, which would else wait for the deadline
            abandoned.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write(descriptor: int, at: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(descriptor, view, at)
            view, at = view[written:], at + written
    except OSError as error:
        remedy = "free space there, or set data.cache_dir to a larger disk or data.cache_gib to what it holds"
        raise UserError("cannot write into the shard cache", got=error.strerror, remedy=remedy) from None
