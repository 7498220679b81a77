"""Which redirects are followed: HTTP to HTTP, never from HTTPS to bare HTTP, never from a public host to a private one.

A server that holds shards could else make a node of the cluster ask for its own files or for the services of its
network, or send credentials where they can be read on the way.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from functools import cache
from typing import TYPE_CHECKING

from data_tools.redaction import redact
from data_tools.remote.retry import RemoteError

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL


@cache  # one for all sessions: fsspec tells its instances apart by what they are made with
def redirect_trace() -> aiohttp.TraceConfig:
    """What makes an aiohttp session look at each redirect before it follows it."""
    import aiohttp  # late: `--help` must answer at once

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_look)
    return trace


async def _look(session: object, context: object, params: aiohttp.TraceRequestRedirectParams) -> None:
    location = params.response.headers.get("Location")
    if location is not None:
        try:
            await check_redirect(params.url, location)
        except RemoteError:
            params.response.close()
            raise


async def check_redirect(url: URL, location: str) -> None:
    """Raises RemoteError where `location`, as a server gave it in answer to `url`, is not to be followed."""
    from yarl import URL

    try:
        target = url.join(URL(location))
    except ValueError:
        raise _refusal(url, location, "a URL") from None
    if target.scheme not in ("http", "https") or not target.host:
        raise _refusal(url, location, "http:// or https://")
    if url.scheme == "https" and target.scheme == "http":
        raise _refusal(url, location, "https://, as before")
    if target.host != url.host and await _public(url.host or "") and not await _public(target.host):
        raise _refusal(url, location, "a public address, as before")


async def _public(host: str) -> bool:
    """Whether all addresses of a host are public. One that this machine cannot find is: a proxy may find it."""
    try:
        found = await addresses(host)
    except OSError:
        return True
    return all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in found)


async def addresses(host: str) -> list[str]:
    """The addresses of a host, by this machine's own resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _refusal(url: URL, location: str, expected: str) -> RemoteError:
    return RemoteError(
        f"{redact(str(url))} redirects elsewhere",
        got=redact(location),
        expected=expected,
        remedy="name the URL that it leads to, if you trust it",
    )
