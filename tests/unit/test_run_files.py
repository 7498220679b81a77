"""What a run writes beside its checkpoints, on disks that are full or gone; and its status from before it is built."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_tools.errors import UserError
from packing import ROOT
from pretrain import cli
from pretrain.process import status
from pretrain.process.entry import reason_of
from pretrain.process.runtime import Runtime
from pretrain.process.status import DONE, FAILED, RUNNING, STOPPED, Status, fail_unbuilt
from pretrain.report.board import Board
from pretrain.report.journal import Journal
from pretrain.report.metrics import Metrics, forget_after
from pretrain.report.writes import Writes
from pretrain.stream.bad import BadSample, Quarantine

ALONE = Runtime(0, 1, 0, torch.device("cpu"), 1)
FULL = "/dev/full"  # the kernel's own full disk


def said(folder):
    return json.loads((folder / "status.json").read_text())


def settled(writes):
    with pytest.raises(UserError) as caught:
        writes.raise_faults("step-7")
    return str(caught.value)


# ---- metrics, journals, TensorBoard ---------------------------------------------------------------------------------


def test_metrics_on_a_full_disk_end_the_run_with_the_reason(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    writes = Writes()
    metrics = Metrics(tmp_path, True, 10, 0, writes)
    assert not writes.failed
    metrics.write("train", 1, 4, {"loss": 1.0})
    metrics.write("train", 2, 8, {"loss": 1.0})
    metrics.close()
    message = settled(writes)
    assert "metrics.jsonl: No space left on device" in message
    assert "goes on from step-7" in message


@pytest.mark.parametrize("name", ["metrics.jsonl", "."])
def test_metrics_whose_file_or_folder_is_gone_are_noticed(tmp_path, name):
    """The open file would take what is written and vanish with it."""
    writes = Writes()
    (tmp_path / "run").mkdir()
    metrics = Metrics(tmp_path / "run", True, 10, 0, writes)
    metrics.write("train", 1, 4, {"loss": 1.0})
    assert not writes.failed
    (tmp_path / "run" / name).resolve().rename(tmp_path / "elsewhere")
    metrics.write("train", 2, 8, {"loss": 1.0})
    metrics.close()
    assert "metrics.jsonl: No such file" in settled(writes)


def test_a_board_on_a_full_disk_is_noticed_at_the_write(tmp_path):
    writes = Writes()
    metrics = Metrics(tmp_path, True, 10, 0, writes)
    full = os.open(FULL, os.O_WRONLY)
    os.dup2(full, metrics._board._file.fileno())
    metrics.write("train", 1, 4, {"loss": 1.0})
    metrics.close()
    assert "events.out.tfevents" in settled(writes)


def test_a_journal_on_a_full_disk_is_noticed(tmp_path):
    writes = Writes()
    (tmp_path / "spikes.jsonl").symlink_to(FULL)
    Journal(tmp_path / "spikes.jsonl", ALONE, 0, writes).write({"step": 1}, 1.0, ["a"])
    assert "spikes.jsonl: No space left on device" in settled(writes)


def test_bad_samples_that_cannot_be_written_down_are_noticed(tmp_path):
    quarantine = Quarantine(FULL)
    quarantine.write(0, 0, [])
    assert quarantine.fault is None
    quarantine.write(0, 0, [BadSample("s.tar", 3, "k", "undecodable", "no picture")])
    assert quarantine.fault.errno == errno.ENOSPC
    beside_a_file = Quarantine(tmp_path / "file" / "quarantine-0.jsonl")
    (tmp_path / "file").touch()
    beside_a_file.write(0, 0, [BadSample("s.tar", 3, "k", "undecodable", "no picture")])
    assert beside_a_file.fault is not None


def test_tensorboard_reads_the_board_and_forgets_what_a_resume_repeats(tmp_path):
    for first, last in ((0, 4), (2, 3)):  # the second start resumes behind step 2
        board = Board(tmp_path, first + 1)
        for step in range(first + 1, last + 1):
            board.scalars({"train/loss": step + first}, step)
        board.close()
    images = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    board = Board(tmp_path, 4)
    board.pictures("pairs", images, ["a dog"], 4)
    board.close()
    events = EventAccumulator(str(tmp_path), {"tensors": 0, "scalars": 0, "images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 5.0)]
    (shown,) = events.Images("pairs/0")
    assert (shown.step, shown.width, shown.height) == (4, 4, 4)
    (text,) = events.Tensors("pairs/0/text_summary")
    assert text.tensor_proto.string_val == [b"a dog"]


CAPTIONS = ["half \ud800 a pair", "\x1b[31mred\x07", "two\nlines\r\x85", "x" * 100_000, "\u202eturned", ""]


def test_captions_that_no_terminal_or_protobuf_takes_end_nothing(tmp_path, capsys):
    writes = Writes()
    metrics = Metrics(tmp_path, True, 10, 0, writes)
    metrics.pictures(1, torch.zeros(len(CAPTIONS), 3, 4, 4, dtype=torch.uint8), CAPTIONS)
    for caption in CAPTIONS:
        metrics.note(caption)
    metrics.close()
    assert not writes.failed
    journal = Journal(tmp_path / "spikes.jsonl", ALONE, 0, writes)
    journal.write({"step": 1}, 1.0, CAPTIONS)
    assert json.loads((tmp_path / "spikes.jsonl").read_text())["keys_by_rank"] == [CAPTIONS]
    printed = capsys.readouterr().out
    printed.encode()
    assert not set(printed) & set("\x1b\x07\r\x85\u202e")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0}).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for n in range(len(CAPTIONS))
             for event in events.Tensors(f"pairs/{n}/text_summary")]  # fmt: skip
    assert max(map(len, texts)) <= 300
    assert texts[0].startswith("half ")


def test_a_resume_reads_what_a_full_disk_left(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"kind": "tra{"step": 2}', '{"step": 3}', "[]", '{"step": "x"}', '{"step": 4']
    path.write_text("\n".join(lines))
    forget_after(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


# ---- status.json ----------------------------------------------------------------------------------------------------


def test_a_new_start_knows_how_far_the_run_was(tmp_path):
    first = Status(tmp_path / "run", True)
    first.own()
    first.step, first.steps, first.checkpoint, first.seconds_left = 7, 10, tmp_path / "c", 12.4
    first.write(RUNNING)
    assert said(tmp_path / "run")["seconds_left"] == 12
    first.write(STOPPED, "SIGTERM")
    assert {**said(tmp_path / "run"), "time": 0} == {
        "state": "stopped", "step": 7, "steps": 10, "checkpoint": str(tmp_path / "c"), "reason": "SIGTERM", "time": 0,
        "seconds_left": None,
    }  # fmt: skip
    second = Status(tmp_path / "run", True)
    second.own()
    assert (said(tmp_path / "run")["state"], said(tmp_path / "run")["step"]) == ("running", 7)
    second.fail("no corpus")
    second.fail("a later word")
    assert (said(tmp_path / "run")["state"], said(tmp_path / "run")["reason"]) == ("failed", "no corpus")
    assert said(tmp_path / "run")["checkpoint"] == str(tmp_path / "c")


def test_other_ranks_write_only_once_the_folder_is_known_to_be_the_runs(tmp_path):
    other = Status(tmp_path / "run", False)
    other.own()
    other.fail("too early")
    assert not (tmp_path / "run").exists()
    before = Status(tmp_path / "run", True)
    before.own()
    before.step, before.checkpoint = 7, tmp_path / "c"
    before.write(STOPPED)
    other.share()
    other.fail("disk")
    assert {name: said(tmp_path / "run")[name] for name in ("state", "reason", "step", "checkpoint")} == {
        "state": "failed", "reason": "disk", "step": 7, "checkpoint": str(tmp_path / "c"),
    }  # fmt: skip


@pytest.mark.parametrize("durable", [True, False])
def test_a_full_disk_takes_the_last_word_in_the_blocks_that_the_file_has(tmp_path, monkeypatch, durable):
    one = Status(tmp_path, True)
    one.own()
    one.write(RUNNING, "x" * 400)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(status, "_replace", full)
    one.write(FAILED, "short", durable)
    assert (said(tmp_path)["state"], said(tmp_path)["reason"]) == ("failed", "short")
    one.state = RUNNING
    one.fail("\u4e2d" * 10_000)
    assert (tmp_path / "status.json").stat().st_size < 4096  # one block


def test_a_folder_of_another_run_keeps_its_status(tmp_path):
    script = (
        "import sys; from pretrain.process.status import Status; Status(sys.argv[1], True).own(); print(1, flush=True)"
    )
    script += "; input()"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert holder.stdout.readline() == "1\n"
    before = (tmp_path / "status.json").read_bytes()
    with pytest.raises(UserError, match="in use by another run"):
        Status(tmp_path, True).own()
    fail_unbuilt(str(tmp_path), "a typing error")
    intruder = Status(tmp_path, True)
    intruder.fail("a typing error")
    assert (tmp_path / "status.json").read_bytes() == before
    holder.communicate("\n")


def test_a_restart_whose_settings_are_no_good_does_not_leave_the_run_stopped(tmp_path, capsys):
    """A scheduler that starts stopped runs again would do so for ever."""
    folder, config = tmp_path / "run", tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {folder}}}\ndata: {{train: [{{urls: shards}}]}}\n")
    for words in (["optim.lrr=1"], ["optim.lr=-1"], ["train.duration=soon"]):
        stopped = Status(folder, True)
        stopped.own()
        stopped.write(STOPPED, "SIGTERM")
        assert cli.main(["--config", str(config), *words]) == 2
        assert said(folder)["state"] == "failed"
        assert words[0].split("=")[0] in said(folder)["reason"]
    assert cli.main(["--config", str(config), f"run.dir={tmp_path}/new", "optim.lrr=1"]) == 2
    assert not (tmp_path / "new").exists()
    done = Status(folder, True)
    done.write(DONE)  # not owned
    assert said(folder)["state"] == "failed"


def test_a_restart_whose_corpus_is_missing_says_so_and_keeps_the_run_of_another(tmp_path, capsys):
    folder, config = tmp_path / "run", tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {folder}}}\ndata: {{train: {tmp_path}/unmounted}}\n")
    stopped = Status(folder, True)
    stopped.own()
    stopped.step, stopped.checkpoint = 7, "step-7"
    stopped.write(STOPPED, "SIGTERM")
    assert cli.main(["--config", str(config)]) == 1
    assert {name: said(folder)[name] for name in ("state", "step", "checkpoint")} == {
        "state": "failed", "step": 7, "checkpoint": "step-7",
    }  # fmt: skip
    assert "no corpus at" in said(folder)["reason"]
    assert capsys.readouterr().err.count("error: no corpus at") == 1
    assert not (folder / "config.yaml").exists()


def test_no_reason_is_empty():
    assert reason_of(RuntimeError()) == "RuntimeError"
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert reason_of(KeyError("a")) == "KeyError: 'a'"
    assert reason_of(UserError("a file")) == "a file"
    assert reason_of(OSError(28, "No space left")) == "[Errno 28] No space left"
    assert reason_of(ValueError(" \n")) == "ValueError"
