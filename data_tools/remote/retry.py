"""Trying again: which faults pass, how long to wait, and when to give up with one clear line."""

import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data_tools.errors import UserError
from data_tools.redaction import redact, redact_text

Result = TypeVar("Result")

# By name, because the packages that define them are imported by fsspec alone, and only for their own protocol.
_HOPELESS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("ParamValidationError", "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError"),
    *("InvalidUrlRedirectClientError", "NonHttpUrlRedirectClientError", "TooManyRedirects"),
}


@dataclass(frozen=True)
class Limits:
    """How patient reading is. Seconds, unless said otherwise.

    Args:
        idle: without a byte before a request counts as failed.
        deadline: for one object, whatever its size, from the first request to the last byte.
        min_rate: bytes per second below which a large object is given up; it stretches the deadline.
        attempts: failures in a row, none of which brought a byte, before giving up.
        backoff, max_backoff: wait after the first failure, doubled after each more, and its bound.
        space: how long a shard that is needed now waits for room in the cache.
    """

    idle: float = 30.0
    deadline: float = 600.0
    min_rate: float = 1 << 20
    attempts: int = 8
    backoff: float = 0.5
    max_backoff: float = 30.0
    space: float = 60.0

    def seconds(self, size: int) -> float:
        """The time that an object of `size` bytes is given."""
        return max(self.deadline, size / self.min_rate)


_OVERTIME = 10.0  # seconds; libraries take some to end an attempt


class RemoteError(UserError):
    """A remote object that cannot be read or written."""


class MissingError(RemoteError):
    """There is no such object."""


class DeniedError(RemoteError):
    """The object may not be read with the credentials at hand."""


class TransientError(Exception):
    """A fault that may pass. `after`: seconds that the server asked to wait."""

    def __init__(self, what: str, after: float = 0.0):
        super().__init__(what)
        self.after = after


def persist(
    url: str,
    attempt: Callable[[float], Result],
    limits: Limits,
    until: float,
    progress: Callable[[], int] = int,
) -> Result:
    """`attempt(seconds left)` until it succeeds; time.monotonic() is never much later than `until` at the end,
    unless the process was suspended.

    An attempt that moved `progress()` forward before it failed starts the count of failures anew.

    Raises:
        MissingError, DeniedError, RemoteError: at once for what no repetition mends, else after the limits.
        UserError: as raised by the attempt itself.
    """
    started, failures = time.monotonic(), 0
    while True:
        before, left, asked = progress(), max(0.001, until - time.monotonic()), time.monotonic()
        try:
            return attempt(left)
        except UserError:
            raise
        except Exception as error:  # every file system has its own; what it says may hold credentials
            _raise_if_hopeless(url, error)
            fault = error
        # An attempt that lasts longer than it may was suspended with its process: what was left is given again.
        if time.monotonic() - asked > left + _OVERTIME:
            until = time.monotonic() + max(left, limits.deadline)
        failures = 1 if progress() > before else failures + 1
        pause = min(limits.max_backoff, limits.backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
        pause = max(pause, getattr(fault, "after", 0.0))
        if failures >= limits.attempts or time.monotonic() + pause >= until:
            raise _given_up(url, fault, failures, time.monotonic() - started, progress())
        time.sleep(pause)


def retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header, a number or a date; 0 where it is absent or unreadable."""
    if not value:
        return 0.0
    if value.isascii() and value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _raise_if_hopeless(url: str, error: Exception) -> None:
    shown, text = redact(url), _text(url, error)
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        raise MissingError(f"no such object: {shown}", remedy="check the URL, or upload the file") from None
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        remedy = "check the credentials (for s3:// the standard AWS environment or configuration) and the URL"
        raise DeniedError(f"access to {shown} is denied", got=text, remedy=remedy) from None
    if isinstance(error, ValueError | TypeError | NotImplementedError) or type(error).__name__ in _HOPELESS:
        raise RemoteError(f"cannot read {shown}", got=text, remedy="check the URL") from None


def _given_up(url: str, error: Exception, failures: int, seconds: float, done: int) -> RemoteError:
    times = f"{failures} failures in a row" if failures > 1 else "no time left after a failure"
    return RemoteError(
        f"giving up on {redact(url)} after {seconds:.0f} s ({times}, {done} bytes read)",
        got=_text(url, error),
        expected="the whole object in time",
        remedy="check the network and the server, then start the same command again",
    )


def _text(url: str, error: Exception) -> str:
    text = redact_text(str(error).replace(url, redact(url))).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
