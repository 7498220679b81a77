"""Servers on this machine that remote shards are read from: an HTTP server that misbehaves on request, and S3."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_tools.format.manifest import Manifest, ShardRecord, write_manifest
from data_tools.format.writer import write_shard
from data_tools.remote.retry import Limits

HURRIED = Limits(idle=1.0, deadline=15.0, min_rate=1e9, attempts=4, backoff=0.01, max_backoff=0.05, space=2.0)
BUCKET = "corpora"
_CHUNK = 1 << 16
_ENDLESS_SECONDS = 20.0

Fault = Callable[["_Handler", bytes, int, int], None]  # (handler, content, start, stop) -> answers in its own way


class HttpServer(ThreadingHTTPServer):
    """Serves `files` by path, with ranges. `faults` are used up, one by each request; `always` answers the others."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.requests: list[tuple[str, int, int]] = []  # path, start, stop
        self.sent = 0  # bytes of bodies that the network took
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()

    def url(self, name: str, credentials: str = "") -> str:
        return f"http://{credentials}127.0.0.1:{self.server_port}/{name}"

    def serve(self, folder: Path, at: str = "") -> None:
        """Put the files of a folder under the path `at`."""
        self.files |= {f"/{at}{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def asked(self, suffix: str) -> list[tuple[int, int]]:
        """Ranges asked of files that end in `suffix`; those of one byte (stat) left out."""
        return [(start, stop) for path, start, stop in self.requests if path.endswith(suffix) and stop - start > 1]

    def hang_up(self) -> None:
        """End connections that clients keep: a later server on this port would be taken for this one."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: HttpServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        content = self.server.files.get(path)
        if content is None:
            self.answer(404, b"")
            return
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(content))
        with self.server.lock:
            self.server.requests.append((path, start, stop))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        (fault or in_order)(self, content, start, stop)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.send(body)

    def send(self, body: bytes) -> None:
        for at in range(0, len(body), _CHUNK):
            self.wfile.write(body[at : at + _CHUNK])
            with self.server.lock:
                self.server.sent += len(body[at : at + _CHUNK])

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _range(content: bytes, start: int, stop: int) -> dict[str, str]:
    stop = min(stop, len(content))
    return {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}", "ETag": f'"{hash(content)}"'}


def in_order(handler: _Handler, content: bytes, start: int, stop: int) -> None:
    if start >= len(content):
        handler.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    else:
        handler.answer(206, content[start:stop], _range(content, start, stop))


def status(code: int, **headers: str) -> Fault:
    """An answer without content, such as status(429, Retry_After="1")."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, *_: handler.answer(code, b"", named)


def cut(after: int) -> Fault:
    """The body ends early."""

    def fault(handler: _Handler, content: bytes, start: int, stop: int) -> None:
        body = content[start:stop]
        handler.answer(206, body[:after], _range(content, start, stop) | {"Content-Length": str(len(body))})
        handler.close_connection = True

    return fault


def stall(handler: _Handler, content: bytes, start: int, stop: int) -> None:
    """Headers and a byte, then nothing."""
    handler.answer(
        206, content[start : start + 1], _range(content, start, stop) | {"Content-Length": str(stop - start)}
    )
    handler.server.closing.wait(_ENDLESS_SECONDS)


def whole(handler: _Handler, content: bytes, start: int, stop: int) -> None:
    """As if no range had been asked for."""
    handler.answer(200, content)


def endless(handler: _Handler, content: bytes, start: int, stop: int) -> None:
    """A body without length or end, as fast as it is taken."""
    handler.send_response(200)
    _pour(handler, bytes(1 << 20), 0.0)


def dripping(handler: _Handler, content: bytes, start: int, stop: int) -> None:
    """A body without length or end, a byte now and then."""
    handler.send_response(200)
    _pour(handler, b"x", 0.05)


def claiming(size: int) -> Fault:
    """The asked range of an object of `size` bytes, and then more and more of it."""

    def fault(handler: _Handler, content: bytes, start: int, stop: int) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        handler.send_header("Content-Length", str(size))
        _pour(handler, bytes(1 << 20), 0.0)

    return fault


def claiming_whole(size: int) -> Fault:
    """An object of `size` bytes from its first on, as if no range had been asked for."""

    def fault(handler: _Handler, content: bytes, start: int, stop: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(size))
        _pour(handler, bytes(1 << 20), 0.0)

    return fault


def _pour(handler: _Handler, piece: bytes, pause: float) -> None:
    handler.send_header("Connection", "close")
    handler.end_headers()
    until = time.monotonic() + _ENDLESS_SECONDS
    while time.monotonic() < until and not handler.server.closing.is_set():
        handler.send(piece)
        handler.wfile.flush()
        time.sleep(pause)


@contextmanager
def http_server() -> Iterator[HttpServer]:
    """A running server; its threads end with it."""
    server = HttpServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.hang_up()
        server.server_close()


@contextmanager
def http_as_s3(server: HttpServer, environment) -> Iterator[HttpServer]:
    """`server` as the S3 endpoint of this process, with all its faults; a bucket is a folder of it.

    `environment`: pytest's MonkeyPatch.
    """
    import s3fs

    environment.setenv("AWS_ENDPOINT_URL", server.url("").rstrip("/"))
    environment.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server(environment) -> Iterator[str]:
    """A running S3 server with an empty bucket, as the standard AWS environment points to it; yields `s3://BUCKET`.

    `environment`: pytest's MonkeyPatch.
    """
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        environment.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    try:
        S3FileSystem().makedirs(BUCKET, exist_ok=True)  # servers of one process share their content
        yield f"s3://{BUCKET}"
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def write_shards(folder: Path, count: int, samples: int = 4, size: int = 10_000, manifest: bool = True) -> Path:
    """A packed folder of `count` shards of incompressible samples, about `samples * size` bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        content = [(f"{number:03d}-{k}", {"bin": os.urandom(size)}) for k in range(samples)]
        index = write_shard(folder / f"s-{number:03d}.tar", content)
        records.append(ShardRecord(f"s-{number:03d}", samples, index.tar_bytes, index.tar_hash.hex()))
    if manifest:
        write_manifest(Manifest({}, "digest", {}, tuple(records), ("cat", "dog"), {}), folder)
    return folder


def upload(folder: Path, at: str) -> None:
    """Put the files of a folder under `s3://BUCKET/at`."""
    from s3fs import S3FileSystem

    for path in folder.iterdir():
        S3FileSystem().pipe_file(f"{BUCKET}/{at}/{path.name}", path.read_bytes())
