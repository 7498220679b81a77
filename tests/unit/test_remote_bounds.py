"""What a server may not do: fill the memory, or lead elsewhere."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc

import pytest
from yarl import URL

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.remote import redirects
from data_tools.remote.retry import RemoteError
from data_tools.remote.store import read_bytes, stat
from remote_servers import HURRIED, claiming, claiming_whole, http_as_s3, http_server, status, whole

CONTENT = bytes(range(250)) * 1200
TERABYTE = 1 << 40


@pytest.fixture
def server():
    with http_server() as server:
        server.files |= {"/a.tar": CONTENT, "/set/manifest.json": CONTENT}
        yield server


@pytest.fixture
def s3_faults(server, monkeypatch):
    server.files["/bucket/a.tar"] = CONTENT
    with http_as_s3(server, monkeypatch) as endpoint:
        yield endpoint


def redirect(location, code=302):
    return status(code, Location=location)


@pytest.mark.parametrize("fault", [claiming(TERABYTE), claiming_whole(TERABYTE)])
def test_object_of_a_terabyte_is_not_held_in_memory(server, fault):
    server.always = fault
    tracemalloc.start()
    with pytest.raises(
        RemoteError, match=rf"too large; got {TERABYTE} bytes; expected at most 67108864; remedy: check"
    ):
        read_bytes(server.url("a.tar"), HURRIED)
    assert len(server.requests) == 1
    assert read_bytes(server.url("a.tar"), HURRIED, 0, 1000) == bytes(1000)  # and no more is read than asked for
    with pytest.raises(UserError, match=rf"manifest\.json is too large; got {TERABYTE} bytes"):
        open_corpus(server.url("set"))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_s3_endpoint_that_sends_more_than_asked_for_fills_no_memory(s3_faults):
    s3_faults.always = claiming(TERABYTE)
    tracemalloc.start()
    assert read_bytes("s3://bucket/a.tar", HURRIED, 5, 1000) == bytes(995)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_s3_endpoint_that_ignores_ranges_is_no_source_of_bytes(s3_faults):
    s3_faults.always = whole
    with pytest.raises(RemoteError, match="another range than asked for"):
        read_bytes("s3://bucket/a.tar", HURRIED, 5, 1000)


@pytest.mark.parametrize(
    "location",
    [
        *("file:///etc/passwd", "FILE:///etc/passwd", "ftp://host/a", "data:,x", "javascript:1", "s3://bucket/a"),
        *("http://[::1/a", "http://", "http://host:99999/", "gopher://127.0.0.1:70/1"),
    ],
)
def test_redirect_to_another_scheme_is_refused_at_once(server, location):
    for code in (301, 302, 303, 307, 308):
        server.requests, server.always = [], redirect(location, code)
        with pytest.raises(
            RemoteError, match=r"a\.tar redirects elsewhere; got .*; expected .*;|InvalidUrlRedirectClientError"
        ):
            stat(server.url("a.tar"), HURRIED)
        assert len(server.requests) == 1


def test_redirects_that_lead_nowhere_end_at_once(server):
    server.always = redirect("/a.tar")
    with pytest.raises(RemoteError, match="TooManyRedirects"):
        stat(server.url("a.tar"), HURRIED)
    assert len(server.requests) == 10
    server.requests, server.always = [], status(302)
    with pytest.raises(RemoteError, match="HTTP 302 without a Location"):
        stat(server.url("a.tar"), HURRIED)
    assert len(server.requests) == 1
    server.faults, server.always = [redirect("b.tar"), redirect(server.url("a.tar"))], None
    server.files["/b.tar"] = b"b"
    assert stat(server.url("a.tar"), HURRIED).size == len(CONTENT)  # one that leads somewhere is followed


@pytest.mark.parametrize(
    ("origin", "location", "fault"),
    [
        ("http://public.example/a", "http://169.254.169.254/latest/meta-data", "a public address"),
        ("https://public.example/a", "https://127.0.0.1/a", "a public address"),
        ("http://public.example/a", "http://[::1]/a", "a public address"),
        ("http://public.example/a", "http://[::ffff:10.0.0.1]/a", "a public address"),
        ("http://public.example/a", "http://inside.example/a", "a public address"),
        ("http://public.example/a", "//both.example/a", "a public address"),
        ("http://public.example/a", "http://0/a", "a public address"),
        ("https://public.example/a", "http://public.example/b", "https://"),
        ("http://public.example/a", "https://other.example/b?sig=secret", None),
        ("http://public.example/a", "http://unknown.example/b", None),  # a proxy may find it
        ("http://inside.example/a", "http://127.0.0.1/b", None),
        ("http://127.0.0.1/a", "https://public.example/b", None),
        ("http://public.example/a", "b/c", None),
    ],
)
def test_redirects_lead_from_no_public_host_into_the_network(monkeypatch, origin, location, fault):
    known = {
        "public.example": ["93.184.216.34", "2606:2800:220:1::1"],
        "other.example": ["93.184.216.35"],
        "inside.example": ["10.1.2.3"],
        "both.example": ["93.184.216.34", "fe80::1%eth0"],
    }

    async def resolve(host, ask=redirects.addresses):
        if host == "unknown.example":
            raise OSError("not known")
        return known.get(host) or await ask(host)

    monkeypatch.setattr(redirects, "addresses", resolve)
    check = redirects.check_redirect(URL(origin), location)
    if fault is None:
        asyncio.run(check)
        return
    with pytest.raises(RemoteError, match=rf"{origin} redirects elsewhere; got .*; expected {fault}"):
        asyncio.run(check)


def test_compressed_bodies_are_refused(server):
    server.always = lambda handler, content, *_: handler.answer(
        200, gzip.compress(content), {"Content-Encoding": "gzip"}
    )
    with pytest.raises(RemoteError, match="got a body in gzip; expected plain"):
        read_bytes(server.url("a.tar"), HURRIED, 0, 1000)
