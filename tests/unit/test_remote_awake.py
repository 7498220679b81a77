"""A pause of the process or its machine is no reason to give up what was being waited for."""

import os
from types import SimpleNamespace

import pytest

from data_tools.errors import UserError
from data_tools.remote import awake, locks, retry
from data_tools.remote.locks import locked, try_lock
from data_tools.remote.retry import RemoteError, persist
from remote_servers import HURRIED


def test_waiting_for_a_lock_does_not_count_a_pause(tmp_path, monkeypatch):
    """The clock jumps by an hour in each of the first turns, and the lock comes free after them."""
    turns, clock = [], [1000.0]
    holder = try_lock(tmp_path / "lock")

    def sleep(seconds):
        turns.append(seconds)
        clock[0] += 3600 if len(turns) < 4 else seconds
        if len(turns) == 6:
            os.close(holder)

    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr(awake, "time", fake)
    monkeypatch.setattr(locks, "time", fake)
    with locked(tmp_path / "lock", 5.0):
        assert len(turns) == 6
        with pytest.raises(UserError, match="another process has held"), locked(tmp_path / "lock", 5.0):
            pass
    assert len(turns) - 6 == pytest.approx(5 / turns[0], abs=2)


def test_an_attempt_that_was_suspended_is_made_again(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    asked = []

    def attempt(left):
        asked.append(left)
        clock[0] += 7200 if len(asked) == 1 else 1
        if len(asked) < 3:
            raise ConnectionResetError("by peer")
        return "all"

    assert persist("s3://b/a.tar", attempt, HURRIED, clock[0] + 15) == "all"
    assert asked == [15, 15, 14]

    def slow(left):  # all its time, again and again
        clock[0] += left
        raise TimeoutError

    with pytest.raises(RemoteError, match="no time left after a failure"):
        persist("s3://b/a.tar", slow, HURRIED, clock[0] + 15)
