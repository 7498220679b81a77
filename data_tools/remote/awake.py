"""Waiting that does not count the time in which the process was suspended, or its machine paused."""

import time

_LONGEST = 1.0  # seconds that one look at the clock counts for; between two, a loop that waits does less


class Patience:
    """`seconds` that a loop may wait; it asks `lasts()` in each of its short turns."""

    def __init__(self, seconds: float):
        self._left, self._before = seconds, time.monotonic()

    def lasts(self) -> bool:
        """Whether any of them are left."""
        now = time.monotonic()
        self._left -= min(now - self._before, _LONGEST)
        self._before = now
        return self._left > 0
