"""Objects by URL: stat, ranges and small files, each repeated until it is whole or its time is up.

HTTP goes through fsspec's session but reads its own streams: fsspec would hold whole bodies in memory and takes a busy
server for a missing file. All other file systems are asked for ranges of bounded size.
"""

import time
from collections.abc import Callable
from typing import Any

from data_tools.errors import UsageError
from data_tools.redaction import redact
from data_tools.remote.http_range import Span, Stat, check_range, read_http, stat_http, too_short
from data_tools.remote.redirects import redirect_trace
from data_tools.remote.retry import Limits, RemoteError, TransientError, persist
from data_tools.remote.urls import check_url, is_http

MOST_IN_MEMORY = 64 << 20  # bytes of a manifest, of some 400,000 shards
_REQUEST = 8 << 20  # bytes of one request where bodies cannot be streamed
_CHUNK = 1 << 18
_VERSIONS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime")
_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
}


def stat(url: str, limits: Limits) -> Stat:
    """Length and version of an object."""
    fs = _file_system(url, limits)
    until = time.monotonic() + limits.seconds(0)
    if is_http(url):
        return persist(url, lambda left: _run(fs, stat_http, left, fs, url, limits.idle), limits, until)

    def ask(left: float) -> Stat:
        info = _call(fs, "info", left, fs._strip_protocol(url), **({"refresh": True} if _is_s3(fs) else {}))
        if info.get("type") == "directory":
            raise IsADirectoryError(url)
        version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        size = info.get("size")
        return Stat(size if isinstance(size, int) and size >= 0 else None, version, True)

    return persist(url, ask, limits, until)


def read_span(url: str, span: Span, limits: Limits, until: float) -> None:
    """Bring what is left of `span`; after a fault it goes on at the first byte that is missing."""
    fs = _file_system(url, limits)

    def read(left: float) -> None:
        span.put(b"")  # raises where nobody wants the rest any more
        ends = time.monotonic() + left
        if is_http(url):
            _run(fs, read_http, left, fs, url, span, limits.idle)
            return
        if _is_s3(fs):
            _run(fs, _read_s3, left, fs, url, span)
            return
        while span.left:
            stop = min(span.stop, span.at + _REQUEST)
            data = _call(fs, "cat_file", ends - time.monotonic(), fs._strip_protocol(url), start=span.at, end=stop)
            wanted = stop - span.at
            span.put(data[:wanted])
            if len(data) < wanted:
                raise too_short(url, span.at, span)

    persist(url, read, limits, until, lambda: span.at)


def read_bytes(url: str, limits: Limits, start: int = 0, stop: int | None = None) -> bytes:
    """A small object, or a range of one, in memory. `stop` None: to the end. Raises RemoteError for a large one."""
    if stop is None:
        stop = stat(url, limits).size
        if stop is None:
            remedy = "serve it with a Content-Length"
            raise RemoteError(f"the server tells no length of {redact(url)}", remedy=remedy)
    if stop - start > MOST_IN_MEMORY:
        raise RemoteError(
            f"{redact(url)} is too large",
            got=f"{stop - start} bytes",
            expected=f"at most {MOST_IN_MEMORY}",
            remedy="check the URL and the server: a manifest has some 150 bytes a shard",
        )
    parts: list[bytes] = []
    until = time.monotonic() + limits.seconds(stop - start)
    read_span(url, Span(start, stop, lambda _, data: parts.append(data)), limits, until)
    return b"".join(parts)


async def _read_s3(fs: Any, url: str, span: Span) -> None:
    """One request for what is left of `span`, streamed like HTTP: an endpoint may send more than it was asked for."""
    bucket, key, version = fs.split_path(fs._strip_protocol(url))
    words = {"VersionId": version} if version else {}
    words |= {"Bucket": bucket, "Key": key, "Range": f"bytes={span.at}-{span.stop - 1}"}
    response = await fs._call_s3("get_object", **words)
    body = response["Body"]
    try:
        check_range(url, response.get("ContentRange", ""), span)
        while span.left:
            data = await body.read(min(_CHUNK, span.left))
            if not data:
                raise TransientError(f"the body ends {span.left} bytes early")
            span.put(data)
    finally:
        body.close()


def write_bytes(url: str, data: bytes, limits: Limits) -> None:
    """Make a small object whole; object stores show it only then."""
    fs = _file_system(url, limits)
    if is_http(url):
        remedy = "write it where the files are served from, and upload it beside them"
        raise RemoteError(f"cannot write {redact(url)}", got="HTTP, which is read only", remedy=remedy)
    until = time.monotonic() + limits.seconds(len(data))
    persist(url, lambda left: _call(fs, "pipe_file", left, fs._strip_protocol(url), data), limits, until)


def _file_system(url: str, limits: Limits) -> Any:
    """fsspec's instance for a URL, shared within the process; credentials come from its protocol's own environment."""
    import fsspec  # late: `--help` must answer at once

    check_url(url)
    scheme = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            # trust_env: proxies and ~/.netrc. A percent sign says that the URL is encoded, perhaps signed, as it is.
            client = {"trust_env": True, "auto_decompress": False, "trace_configs": [redirect_trace()]}
            options = {"client_kwargs": client, "encoded": "%" in url}
        elif scheme in ("s3", "s3a"):
            timeouts = {"connect_timeout": limits.idle, "read_timeout": limits.idle}
            options = {"config_kwargs": {"retries": {"total_max_attempts": 1}, **timeouts}}
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "the package of this protocol")
        remedy = f"pip install {package}" + (", or 'dualstream[remote]'" if package in ("aiohttp", "s3fs") else "")
        raise UsageError(f"cannot read {redact(url)}", got=error, remedy=remedy) from None
    except ValueError as error:
        raise UsageError(f"cannot read {redact(url)}", got=error, expected="s3:// http:// gs:// hf://") from None
    if _is_s3(fs):
        fs.retries = 1  # `persist` repeats, and knows the deadline
    return fs


def _is_s3(fs: Any) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,))


def _call(fs: Any, method: str, seconds: float, *args: Any, **options: Any) -> Any:
    """A method of a file system, within `seconds` where it is asynchronous; others have time limits of their own."""
    if fs.async_impl:
        return _run(fs, getattr(fs, "_" + method), seconds, *args, **options)
    return getattr(fs, method)(*args, **options)


def _run(fs: Any, function: Callable, seconds: float, *args: Any, **options: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, function, *args, timeout=seconds, **options)
