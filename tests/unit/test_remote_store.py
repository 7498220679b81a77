"""Reading objects by URL: faults that pass are outlasted, others end in time with one line, and no credential shows."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from data_tools.errors import UsageError, UserError
from data_tools.remote.fetch import checked_stat, fetch
from data_tools.remote.http_range import Span
from data_tools.remote.retry import DeniedError, MissingError, RemoteError, retry_after
from data_tools.remote.store import read_bytes, read_span, stat, write_bytes
from data_tools.remote.urls import child, index_url, name_of, parent
from remote_servers import (
    HURRIED,
    cut,
    dripping,
    endless,
    http_as_s3,
    http_server,
    in_order,
    s3_server,
    stall,
    status,
    upload,
    whole,
)

CONTENT = os.urandom(300_000)


@pytest.fixture
def server():
    with http_server() as server:
        server.files["/a.tar"] = CONTENT
        yield server


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "a.tar").write_bytes(CONTENT)
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as url:
        upload(folder, "set")
        yield url


def fetched(url, path, limits=HURRIED, size=300_000, part=50_000):
    with open(path, "w+b") as file:
        fetch(url, checked_stat(url, size, limits), file.fileno(), limits, part)
    return path.read_bytes()


def test_object_comes_in_parallel_parts(server, tmp_path):
    assert fetched(server.url("a.tar"), tmp_path / "a") == CONTENT
    assert sorted(server.asked("a.tar")) == [(start, start + 50_000) for start in range(0, 300_000, 50_000)]


def test_reading_goes_on_at_the_missing_byte(server):
    server.faults = [cut(100_000), cut(50_000)]
    assert read_bytes(server.url("a.tar"), HURRIED, 10, 300_000) == CONTENT[10:]
    starts = [start for start, _ in server.asked("a.tar")]
    assert starts[0] == 10
    assert starts[1] >= 10 + 1
    assert starts == sorted(starts)
    assert server.sent < 1.5 * len(CONTENT)


@pytest.mark.parametrize("fault", [stall, status(500), status(503), status(429), status(408)])
def test_faults_that_pass_are_outlasted(server, tmp_path, fault):
    server.faults = [fault, in_order, fault, fault]
    assert fetched(server.url("a.tar"), tmp_path / "a") == CONTENT


def test_failures_count_anew_after_progress(server):
    server.faults = [cut(20_000) for _ in range(3 * HURRIED.attempts)]
    assert read_bytes(server.url("a.tar"), HURRIED, 0, 300_000) == CONTENT


def test_retry_after_is_honoured(server):
    server.faults = [status(429, Retry_After="1")]
    started = time.monotonic()
    assert read_bytes(server.url("a.tar"), HURRIED, 0, 10) == CONTENT[:10]
    assert time.monotonic() - started >= 1
    server.faults = [status(503, Retry_After="3600")]
    with pytest.raises(RemoteError, match=r"giving up on http.*HTTP 503"):
        read_bytes(server.url("a.tar"), HURRIED, 0, 10)
    assert time.monotonic() - started < 8
    assert retry_after("Fri, 31 Dec 2100 23:59:59 GMT") > 1e6
    assert retry_after("soon") == retry_after(None) == retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0


def test_server_without_ranges_sends_the_object_once(server, tmp_path):
    server.always = whole
    assert fetched(server.url("a.tar"), tmp_path / "a") == CONTENT
    assert len(server.asked("a.tar")) == 1
    assert read_bytes(server.url("a.tar"), HURRIED, 1000, 2000) == CONTENT[1000:2000]


def test_endless_body_is_not_swallowed(server, tmp_path):
    server.always = endless
    assert fetched(server.url("a.tar"), tmp_path / "a") == bytes(len(CONTENT))
    time.sleep(0.2)
    assert server.sent < 32 << 20  # what fits in sockets, not what twenty seconds would bring
    with pytest.raises(RemoteError, match="the server tells no length"):
        read_bytes(server.url("a.tar"), HURRIED)


@pytest.mark.parametrize("fault", [dripping, stall])
def test_deadline_holds_for_bodies_that_never_come(server, tmp_path, fault):
    server.faults, server.always = [in_order], fault
    limits = replace(HURRIED, deadline=1.5)
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"giving up on .*a\.tar after \d s .*; got .*; expected .*; remedy: "):
        fetched(server.url("a.tar"), tmp_path / "a", limits)
    assert time.monotonic() - started < 8


def test_parts_end_with_the_first_that_cannot_be_had(server, tmp_path):
    server.faults, server.always = [in_order, status(403)], status(503, Retry_After="2")
    started = time.monotonic()
    with pytest.raises(DeniedError):
        fetched(server.url("a.tar"), tmp_path / "a", HURRIED)
    assert time.monotonic() - started < 8


def test_what_no_repetition_mends_ends_at_once(server):
    for fault, kind, message in (
        (status(404), MissingError, "no such object"),
        (status(403), DeniedError, "is denied"),
        (status(401), DeniedError, "is denied"),
        (status(400), RemoteError, "HTTP 400"),
    ):
        server.requests, server.always = [], fault
        with pytest.raises(kind, match=message):
            stat(server.url("a.tar"), HURRIED)
        assert len(server.requests) == 1
    server.always = None
    with pytest.raises(RemoteError, match=r"size of shard .* changed; got 300000 bytes; expected 7"):
        checked_stat(server.url("a.tar"), 7, HURRIED)
    with pytest.raises(UsageError, match="cannot read nowhere://x"):
        stat("nowhere://x", HURRIED)


@pytest.mark.parametrize("password", ["QQ/QQ", "QQ?QQ", "QQ#QQ", "/QQ/QQ", "QQ://QQ"])
def test_url_whose_host_cannot_be_told_is_refused_unasked(password):
    for call in (stat, read_bytes):
        with pytest.raises(UsageError, match=r"cannot tell the host of .*write / as %2F") as caught:
            call(f"http://QQ:{password}@127.0.0.1:9/a.tar", HURRIED)
        assert "QQ" not in str(caught.value)


def test_dead_server_is_given_up():
    with http_server() as server:
        url = server.url("a.tar")
    with pytest.raises(RemoteError, match="4 failures in a row"):
        stat(url, HURRIED)


@pytest.mark.parametrize("fault", [status(403), status(500), status(404), status(400), stall, cut(5), endless])
def test_credentials_stay_out_of_errors(server, fault, tmp_path):
    server.always = fault
    url = server.url("a.tar", "user:pass-word@") + "?X-Amz-Signature=sig-nature#frag-ment"
    limits = replace(HURRIED, deadline=0.5)
    with pytest.raises(UserError) as caught:
        read_bytes(url, limits)
    error, text = caught.value, ""
    while error is not None:  # what a traceback would print
        text += repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "a.tar" in text
    assert not any(secret in text for secret in ("user", "pass-word", "sig-nature", "frag-ment"))


def test_neighbours_of_a_url():
    assert child("https://h/set/?t=1", "a.tar") == "https://h/set/a.tar?t=1"
    assert parent("https://h/set/manifest.json?t=1") == "https://h/set?t=1"
    assert index_url("https://h/set/a.tar?t=1") == "https://h/set/a.idx?t=1"
    assert index_url("s3://b/what?.tar") == "s3://b/what?.idx"
    assert name_of("https://h/set/a.tar?t=1/2") == "a.tar"


def test_s3_objects_are_read_written_and_missed(bucket, tmp_path):
    url = f"{bucket}/set/a.tar"
    found = stat(url, HURRIED)
    assert (found.size, found.ranges, bool(found.version)) == (len(CONTENT), True, True)
    assert fetched(url, tmp_path / "a") == CONTENT
    write_bytes(f"{bucket}/set/b.idx", b"index", HURRIED)
    assert read_bytes(f"{bucket}/set/b.idx", HURRIED) == b"index"
    for missing in (f"{bucket}/set/c.tar", "s3://no-such-bucket/c.tar"):
        with pytest.raises(MissingError, match="no such object"):
            stat(missing, HURRIED)
        with pytest.raises(MissingError, match="no such object"):
            read_span(missing, Span(0, 5, lambda *_: None), HURRIED, time.monotonic() + 5)


@pytest.fixture
def s3_faults(server, monkeypatch):
    server.files["/bucket/a.tar"] = CONTENT
    with http_as_s3(server, monkeypatch) as endpoint:
        yield endpoint


@pytest.mark.parametrize("fault", [status(503), status(500), status(429), cut(1000), stall])
def test_s3_faults_that_pass_are_outlasted(s3_faults, fault):
    s3_faults.faults = [fault, fault]
    assert read_bytes("s3://bucket/a.tar", HURRIED, 5, 250_000) == CONTENT[5:250_000]
    assert len(s3_faults.requests) == 3  # nobody else repeats


def test_s3_faults_that_stay_end_in_time(s3_faults):
    s3_faults.always = stall
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"giving up on s3://bucket/a\.tar after \d s") as caught:
        read_bytes("s3://bucket/a.tar", replace(HURRIED, deadline=1.0), 0, 1000)
    assert time.monotonic() - started < 8
    assert "secret" not in str(caught.value)
    s3_faults.always = status(403)
    with pytest.raises(DeniedError, match="is denied"):
        read_bytes("s3://bucket/a.tar", HURRIED, 0, 1000)
    s3_faults.always = None
    with pytest.raises(RemoteError, match="is too short; got 300000 bytes"):
        read_bytes("s3://bucket/a.tar", HURRIED, 200_000, 400_000)


def test_other_file_systems_come_through_the_same_door(monkeypatch, tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/set/a.tar", CONTENT)
    assert fetched("memory://set/a.tar", tmp_path / "a") == CONTENT
    write_bytes("memory://set/a.idx", b"index", HURRIED)
    assert read_bytes("memory://set/a.idx", HURRIED) == b"index"
    with pytest.raises(MissingError):
        stat("memory://set/b.tar", HURRIED)

    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UsageError, match=r"Install s3fs.*remedy: pip install s3fs, or 'dualstream\[remote\]'"):
        stat("s3://bucket/a.tar", HURRIED)


def test_s3_without_credentials_says_so(bucket, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DeniedError, match=r"access to s3://.* is denied; got NoCredentialsError.*AWS environment"):
        stat(f"{bucket}/set/a.tar", HURRIED)
    s3fs.S3FileSystem.clear_instance_cache()


def test_http_cannot_be_written(server):
    with pytest.raises(RemoteError, match=r"cannot write http.*a\.idx; got HTTP"):
        write_bytes(server.url("a.idx"), b"", HURRIED)
