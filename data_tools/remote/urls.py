"""URLs of remote files: which they are, and their siblings."""

import itertools
import re

from data_tools.errors import UsageError, UserError
from data_tools.format import MAX_SHARDS
from data_tools.redaction import redact_source, redact_text

_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")


def is_remote(source: str) -> bool:
    """Whether a source is read through a network file system."""
    return "://" in source


def check_url(url: str) -> None:
    """Refuse an HTTP URL whose user or password hides where the host begins. Raises UsageError."""
    _, _, rest = url.partition("://")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    _, colon, port = re.sub(r"^\[.*\]", "", authority).partition(":")
    if is_http(url) and "@" not in authority and "@" in rest and colon and not port.isdigit():
        raise UsageError(
            f"cannot tell the host of {redact_source(url)}",
            got="a user or password with a raw slash, question mark or hash",
            expected="these percent-encoded",
            remedy="write / as %2F, ? as %3F and # as %23, or put user and password into ~/.netrc",
        )


def is_http(url: str) -> bool:
    """Whether the URL is read over HTTP or HTTPS."""
    return url.lower().startswith(("http://", "https://"))


def split_query(url: str) -> tuple[str, str]:
    """(URL, query with its question mark). Only HTTP has queries: in an object store's key these are plain letters."""
    if is_http(url):
        head, mark, query = url.partition("?")
        return head, mark + query
    return url, ""


def name_of(url: str) -> str:
    """The last part of the path."""
    return split_query(url)[0].rstrip("/").rsplit("/", 1)[-1]


def child(url: str, name: str) -> str:
    """A file in the folder `url`. The query is kept: tokens that open a folder stand there."""
    head, query = split_query(url)
    return f"{head.rstrip('/')}/{name}{query}"


def parent(url: str) -> str:
    """The folder of the file `url`, with its query."""
    head, query = split_query(url)
    return head.rsplit("/", 1)[0] + query


def index_url(tar: str) -> str:
    """Where the index of a remote tar lies: beside it."""
    head, query = split_query(tar)
    return head.removesuffix(".tar") + ".idx" + query


def expand_braces(pattern: str) -> list[str]:
    """`shard-{000..012}.tar` -> 13 names. Raises UserError for a pattern that is not one."""
    import braceexpand  # late: `--help` must answer at once

    try:
        most = max((abs(int(end) - int(start)) for start, end in _RANGE.findall(pattern)), default=0)
        names = [] if most >= MAX_SHARDS else list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(
            f"bad brace pattern {redact_source(pattern)!r}",
            got=redact_text(str(error).replace(pattern, redact_source(pattern))),
            expected="such as shard-{000000..000012}.tar",
        ) from None
    if not names or len(names) > MAX_SHARDS:
        got, expected = f"more than {MAX_SHARDS} names", f"at most {MAX_SHARDS}"
        raise UserError(f"brace pattern {redact_source(pattern)!r} is too large", got=got, expected=expected)
    return names
