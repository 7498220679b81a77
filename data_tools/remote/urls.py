"""URLs of remote files: which they are, their siblings, and how they are shown without credentials."""

import os
import re

from data_tools.errors import UserError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]+")
_AWS_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_HIDDEN = "***"
_SUSPECT = re.compile("[@?#]")


def is_remote(source: str) -> bool:
    """Whether a source is read through a network file system."""
    return "://" in source


def split_query(url: str) -> tuple[str, str]:
    """(URL, query with its question mark). Only HTTP has queries: in an object store's key these are plain letters."""
    if url.lower().startswith(("http://", "https://")):
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
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        shown = redact(pattern) if is_remote(pattern) else pattern
        raise UserError(
            f"bad brace pattern {shown!r}", got=redact_text(str(error)), expected="such as shard-{000000..000012}.tar"
        ) from None


def redact(url: str) -> str:
    """The URL without user, password, query and fragment, each of which may be a credential."""
    if not _SUSPECT.search(url):
        return url  # the very same string: a corpus has many
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        authority = f"{_HIDDEN}@{authority.rpartition('@')[2]}"
    shown = f"{scheme}://{authority}{slash}{path}"
    for mark in "?#":
        head, found, _ = shown.partition(mark)
        shown = f"{head}{mark}{_HIDDEN}" if found else shown
    return shown


def redact_text(text: str) -> str:
    """A message of a library, or a config, without the credentials that its URLs and the AWS environment hold."""
    for name in _AWS_SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, _HIDDEN)
    return _URL.sub(lambda match: redact(match[0]), text)
