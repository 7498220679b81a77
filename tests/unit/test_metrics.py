"""What a run writes: strict lines, a file that a resume leaves seamless, a status, a bar on a terminal."""

import json
import os
import pty
import re

import pytest

from pretrain.report import metrics
from pretrain.report.metrics import DataWatch, Metrics, starvation_advice


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, first, last):
    writer = Metrics(folder, True, 10, first)
    for step in range(first + 1, last + 1):
        writer.write("train", step, step * 4, {"loss": 1.0 / step})
    writer.close()


def test_a_resume_drops_what_its_checkpoint_does_not_know(tmp_path, capsys):
    write(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash in the middle of a line
    write(tmp_path, 3, 6)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path)[3]["samples"] == 16
    assert "train step 6/10  loss 0.1667" in capsys.readouterr().out


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    writer = Metrics(tmp_path, True, 10, 0)
    with pytest.raises(ValueError, match="JSON"):
        writer.write("train", 1, 4, {"loss": float("nan")})
    writer.close()
    assert lines(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path):
    writer = Metrics(tmp_path, False, 10, 0)
    writer.write("train", 1, 4, {"loss": 1.0})
    writer.note("x")
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_bar_and_literal_brackets(tmp_path, monkeypatch):
    master, slave = pty.openpty()
    terminal = os.fdopen(slave, "w")
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    writer = Metrics(tmp_path, True, 10, 0)
    writer.write("train", 4, 16, {"loss": 0.5})
    writer.note("ranks [0] are fine")
    writer.close()
    terminal.flush()
    shown = ""
    while "are fine" not in shown or "4/10" not in shown:  # a terminal hands out what it has, in pieces
        shown += os.read(master, 100_000).decode()
    assert "4/10" in shown
    assert "loss 0.5" in shown
    assert "ranks [0] are fine" in shown


def spoken(shares, **settings):
    watch = DataWatch(**settings)
    return [number for number, share in enumerate(shares) if watch.starves(share)]


def test_a_starving_run_is_noticed_after_several_intervals_and_once():
    assert spoken([0.9, 0.5, 0.1] * 4) == []
    assert spoken([0.2] * 9) == []  # at the bound, not above
    assert spoken([0.21] * 20) == [2]
    assert spoken([0.1, 0.9, 0.3, 0.4, 0.9]) == [3]
    assert spoken([0.9] * 4, intervals=1, bound=0.95) == []


def test_it_is_noticed_again_only_after_it_had_ended():
    hungry, fed = [0.5] * 3, [0.0] * 3
    assert spoken([*hungry, 0.0, *hungry, 0.0, 0.0, *hungry]) == [2]
    assert spoken(hungry + fed + hungry) == [2, 8]


def test_the_advice_is_one_line_that_fits_the_settings():
    text = starvation_advice(0.456, workers=1, cores=8, scaled_decode=False)
    assert "46% of the time" in text
    assert "data.workers (1 per rank now, 8 cores here)" in text
    assert "data.scaled_decode=true" in text
    assert "scaled_decode" not in starvation_advice(0.456, workers=1, cores=8, scaled_decode=True)
    assert "\n" not in text


def test_a_line_of_a_log_says_the_time_of_day_and_the_time_left(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    writer = Metrics(tmp_path, True, 10_000, 100)
    assert writer.seconds_left(100) is None
    now[0] += 60
    writer.write("train", 110, 440, {"loss": 0.5})
    writer.write("eval", 110, 440, {"recall": 0.5})
    writer.close()
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d train step 110/10000  loss 0.5  left 16:29:00", first
    )  # 9,890 steps of 6 seconds
    assert "left" not in second
    assert writer.seconds_left(110) == 59_340
    endless = Metrics(tmp_path, True, None, 0)
    assert endless.seconds_left(5) is None
    endless.close()


def test_an_epoch_with_nothing_replaced_is_written_down_and_not_shown(tmp_path, capsys):
    writer = Metrics(tmp_path, True, 10, 0)
    for replaced in (0, 2):
        writer.write("data", 3, 12, {"replaced": replaced}, shows=replaced > 0)
    writer.close()
    assert [row["replaced"] for row in lines(tmp_path)] == [0, 2]
    assert capsys.readouterr().out.count("data step") == 1
