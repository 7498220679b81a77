"""The error a user sees: one line that says what was got, what was expected, and what to do."""


class UserError(ValueError):
    """A fault in the user's input, files or settings. Entry points print it as one line and exit with `exit_code`.

    Args:
        what: the fault, naming the file, field or value.
        got: what was found.
        expected: what would have been right.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if remedy is not None:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(" ".join(part.split()) for part in parts))


class UsageError(UserError):
    """A fault in the command line or the config: exit code 2."""

    exit_code = 2
