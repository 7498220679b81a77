"""URLs as they are shown: without user, password, query and fragment, each of which may be a credential."""

import os
import re

_AWS_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_HIDDEN = "***"
_SUSPECT = re.compile("[@?#]")
_WORD = re.compile(r"\S*")
_UNQUOTED = re.compile(r"[^\s'\"<>]*")
_PORT = re.compile(r":\d*(?:\W|$)")
_PUNCTUATION = ".,;:)]}"


def redact(url: str) -> str:
    """The URL without user, password, query and fragment.

    A user or password with a raw slash, question mark or "@" can be read in several ways: what is a credential in any
    of them is hidden.
    """
    if not _SUSPECT.search(url):
        return url  # the very same string: a corpus has many
    scheme, mark, rest = url.partition("://")
    return scheme + mark + _hide(rest)


def redact_text(text: str) -> str:
    """A message of a library, or a command line, without the credentials that its URLs and the AWS environment hold."""
    for name in _AWS_SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, _HIDDEN)
    parts, at = [], 0
    while (begin := text.find("://", at) + 3) >= 3:
        end = _url_end(text, begin)
        parts += [text[at:begin], _hide(text[begin:end])]
        at = end
    return "".join([*parts, text[at:]])


def redact_source(source: str) -> str:
    """A source as its user named it, a path or one URL; a URL's credentials may hold spaces and quotes."""
    return redact(source) if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]{0,30}://", source) else redact_text(source)


def _hide(rest: str) -> str:
    """What follows `scheme://`, redacted."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    before_query = re.split("[?#]", rest, maxsplit=1)[0]
    first, last = rest.find("@"), rest.rfind("@")
    if "@" in authority or ":" in before_query[: max(last, 0)]:
        port = authority.partition(":")[2]
        surely = "@" in authority or (port and not port.isdigit())  # no host, so an "@" ends the credentials
        if re.search("[?#]", rest[first if surely else 0 : last]):
            return _HIDDEN  # what follows may be a query that holds an "@"
        rest = f"{_HIDDEN}@{rest[last + 1 :]}"
    for mark in "?#":
        head, found, _ = rest.partition(mark)
        rest = f"{head}{mark}{_HIDDEN}" if found else rest
    return rest


def _url_end(text: str, begin: int) -> int:
    """Where a URL of a text ends, `begin` behind its `://`. All up to an "@" belongs to it, quotes too; and spaces
    where a colon that is no port's shows that a password has begun."""
    at = begin
    while True:
        end = _WORD.match(text, at).end()  # type: ignore[union-attr]
        at = max(at, text.rfind("@", at, end) + 1)
        colon = text.find(":", at, end)
        if colon < 0 or colon + 1 >= end or _PORT.match(text, colon):
            break
        more = text.find("@", end)
        if more < 0 or "\n" in text[end:more]:
            break
        at = more + 1
    end = _UNQUOTED.match(text, at).end()  # type: ignore[union-attr]
    while end > at and text[end - 1] in _PUNCTUATION:
        end -= 1
    return end
