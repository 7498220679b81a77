"""The error a user sees: one line that says what was got, what was expected, and what to do."""

import errno
import re

from data_tools.redaction import redact_text

SHOWN = 300  # characters of a user's data in one place of a message, at most
_TAIL = 80
# Control characters, halves of surrogate pairs, and what turns the direction of writing: shown as Python writes them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(value: object, limit: int = SHOWN) -> str:
    """A user's data as a message may hold them: on one line, nothing a terminal would obey, `limit` characters at most.

    Of a longer text the beginning and the end stay, with its length between them. URLs lose their credentials.
    """
    text = redact_text(" ".join(str(value).split()))
    whole = printable(text[: limit + 1])
    if len(whole) <= limit:
        return whole
    cut, tail = f" ... ({len(text)} characters) ... ", min(_TAIL, limit // 4)
    return whole[: max(0, limit - tail - len(cut))] + cut + printable(text[-tail:])[-tail:]


def printable(text: str) -> str:
    """`text` with what a terminal would obey, or could not write, shown as Python writes it; spaces stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(ValueError):
    """A fault in the user's input, files or settings. Entry points print it as one line and exit with `exit_code`.

    Each part passes through `shown`; a part that is itself a UserError stays whole.

    Args:
        what: the fault, naming the file, field or value.
        got: what was found.
        expected: what would have been right.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: object, *, got: object = None, expected: object = None, remedy: str | None = None):
        parts = [_part(what)]
        if got is not None:
            parts.append(f"got {_part(got)}")
        if expected is not None:
            parts.append(f"expected {_part(expected)}")
        if remedy is not None:
            parts.append(f"remedy: {_part(remedy)}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple:
        return _unpickled, (type(self), str(self), self.__dict__)


def _part(value: object) -> str:
    return str(value) if isinstance(value, UserError) else shown(value)


def _unpickled(kind: type[UserError], message: str, attributes: dict) -> UserError:
    """The error as it was raised in another process."""
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(attributes)
    return error


class UsageError(UserError):
    """A fault in the command line or the config: exit code 2."""

    exit_code = 2


_FULL = "free some space or choose a folder on another disk, and run the same command again"
_FORBIDDEN = ("use", "permission denied", "check its owner and mode, or name another")
_SYSTEM_FAULTS = {
    errno.ENOSPC: ("write", "no space left on the disk", _FULL),
    errno.EDQUOT: ("write", "the disk quota is used up", _FULL),
    errno.EFBIG: ("write", "a file larger than allowed", "raise the limit (`ulimit -f`), or write smaller files"),
    errno.EROFS: ("write", "a disk that is read-only", "choose a folder that you may write to"),
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
}


def disk_error(error: OSError) -> UserError | None:
    """The error for a disk that takes no more or a file that is forbidden, with the file and what to do; None for a
    fault of another kind."""
    if error.errno not in _SYSTEM_FAULTS:
        return None
    verb, got, remedy = _SYSTEM_FAULTS[error.errno]
    return UserError(f"cannot {verb} {error.filename or 'a file'}", got=got, remedy=remedy)
