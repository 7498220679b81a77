"""The error of one sample: packing skips it, verifying reports it, training replaces it."""


class BadSampleError(ValueError):
    """A sample, or a file that was to become one, that cannot be trained on.

    Args:
        kind: one word for the account, such as `undecodable`.
        reason: what was wrong.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind, self.reason = kind, reason
        self.key = ""  # of the sample, where it is known
