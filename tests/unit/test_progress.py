"""Progress in a log: a plain line now and then, with the time of day and the time left."""

from __future__ import annotations

import re

from data_tools import progress
from data_tools.progress import Progress, duration


def test_a_line_says_the_time_of_day_and_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("packing", 1000, "rows") as bar:
        now[0] += 5
        bar.update(1)
        now[0] += 15
        bar.update(200)
    line = capsys.readouterr().err
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d packing: 200/1000 rows \(20 %\), 10/s, left 0:01:20\n"
    assert re.fullmatch(pattern, line)


def test_nothing_done_yet_and_more_than_was_expected_have_no_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("packing", 10, "rows") as bar:
        for done in (0, 11):
            now[0] += 11
            bar.update(done)
    first, second = capsys.readouterr().err.splitlines()
    assert "0/10" in first
    assert "11/10" in second
    assert "left" not in first + second


def test_durations_read_as_a_clock():
    assert [duration(s) for s in (0, 59.6, 3723, 90061, 30 * 86400)] == [
        "0:00:00", "0:01:00", "1:02:03", "1 d 1:01:01", "30 d 0:00:00",
    ]  # fmt: skip
