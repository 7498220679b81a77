"""The owners of the loop: what falls on which step, what is written down, what is saved, what is done about faults."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from data_tools.errors import UserError
from pretrain import train
from pretrain.config.durations import ENDLESS
from pretrain.config.tree import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    RunConfig,
    TrainConfig,
)
from pretrain.engine import committed
from pretrain.engine.checkpoint import Checkpoints, Extras, Saved
from pretrain.engine.committed import Retention
from pretrain.engine.engine import NonFiniteError
from pretrain.engine.state import TrainState
from pretrain.loop.book import Book, Interval
from pretrain.loop.faults import ENOUGH, Faults, explain
from pretrain.loop.saving import Saving
from pretrain.loop.timetable import make_timetable
from pretrain.process.runtime import OnHost, Runtime
from pretrain.process.status import Status
from pretrain.process.watch import Watch
from pretrain.report.metrics import Metrics
from pretrain.report.writes import Writes
from pretrain.stream.transform import ImageSettings
from pretrain.tasks import ContrastiveConfig
from stream_corpora import stream_of, write_corpus
from training import PlainEngine

BATCH = 4
STEPS = 8  # of an epoch of the corpus


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), [20, 12])
    image = ImageSettings(size=8, interpolation="bilinear")
    return stream_of(corpus, seed=0, global_batch=BATCH, window=8, image=image)


def alone(rank=0):
    return Runtime(rank, 1, 0, torch.device("cpu"), 1)


def config_of(folder, duration="2 epochs", **sections):
    return ContrastiveConfig(run=RunConfig(dir=str(folder)), train=TrainConfig(global_batch=BATCH, duration=duration),
                          **sections)  # fmt: skip


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---- timetable ------------------------------------------------------------------------------------------------------


def test_the_last_step_is_logged_and_evaluated_but_saved_by_the_end_of_the_run_alone(tmp_path, stream):
    config = config_of(
        tmp_path, log=LogConfig(every="3 steps"), checkpoint=CheckpointConfig(every="20 samples", keep_every="1 epoch")
    )
    times = make_timetable(config, stream)
    due = {what: [step for step in range(1, 17) if times.due(what, step)] for what in times.every}
    assert due == {"log": [3, 6, 9, 12, 15, 16], "eval": [16], "checkpoint": [5, 10, 15], "keep": [8, 16]}
    assert (times.end, times.total) == (2 * STEPS, 2 * STEPS)


def test_a_run_without_end_evaluates_only_where_it_is_told_to(tmp_path, stream):
    never = config_of(tmp_path, "forever", eval=EvalConfig(every=None), checkpoint=CheckpointConfig(every=None))
    times = make_timetable(never, stream)
    assert times.end is None
    assert times.total == ENDLESS
    assert not any(times.due(what, step) for what in ("eval", "checkpoint", "keep") for step in range(1, 10**4))


# ---- book -----------------------------------------------------------------------------------------------------------


def book_of(folder, stream, state=None, rank=0):
    """A book whose data is read by three workers, and its status."""
    status, writes = Status(folder, rank == 0), Writes()
    status.own()
    data = DataConfig(workers=3, scaled_decode=False)
    metrics = Metrics(folder, rank == 0, 100, 0, writes)
    return Book(alone(rank), stream, state or TrainState(), data, status, metrics, writes), status


def log_steps(book, state, steps, waited):
    """Log `steps` steps, each of which waited so many seconds."""
    for _ in range(steps):
        state.step += 1
        state.samples_seen += BATCH
        book.count(0, waited, False)
        book.log({"loss": 1.0, "infonce": 1.0}, 1e-3, PlainEngine(torch.nn.Linear(1, 1)))


def test_a_starving_run_says_so_once_with_the_remedy(tmp_path, stream, capsys):
    state = TrainState()
    book, _ = book_of(tmp_path, stream, state)
    log_steps(book, state, 3, waited=0.0)
    assert "waiting for data" not in capsys.readouterr().out
    log_steps(book, state, 4, waited=10.0)
    book.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert len(said) == 1
    assert "data.workers (3 per rank now" in said[0]
    assert "data.scaled_decode=true" in said[0]


def test_objectives_are_logged_by_name_where_there_are_several(tmp_path, stream):
    book, _ = book_of(tmp_path, stream, TrainState(step=4, samples_seen=4 * BATCH))
    engine = PlainEngine(torch.nn.Linear(1, 1))
    book.log({"loss": 2.5, "infonce": 2.5}, 1e-3, engine)
    book.log(OnHost({name: torch.tensor(n / 4) for n, name in enumerate(("loss", "near", "far"))}).read(), 1e-3, engine)
    one, several = rows(tmp_path)
    found = [{name: value for name, value in row.items() if name.startswith("loss")} for row in (one, several)]
    assert found == [{"loss": 2.5}, {"loss": 0.0, "loss_near": 0.25, "loss_far": 0.5}]


def test_other_ranks_say_nothing(tmp_path, stream, capsys):
    state = TrainState()
    book, _ = book_of(tmp_path, stream, state, rank=1)
    log_steps(book, state, 6, waited=10.0)
    book.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_was_left_out_is_logged_without_a_loss(tmp_path, stream):
    state = TrainState(step=4, samples_seen=4 * BATCH, skipped=1)
    book, _ = book_of(tmp_path, stream, state)
    book.count(0, 0.0, False)
    book.log({}, 1e-3, PlainEngine(torch.nn.Linear(1, 1)))
    (row,) = rows(tmp_path)
    assert {"loss", "grad_norm"} & set(row) == set()
    wanted = {"kind": "train", "step": 4, "samples": 16, "lr": 1e-3, "bad_samples": 0, "epoch": 0.5, "skipped_steps": 1}
    assert {name: row[name] for name in wanted} == wanted


def test_pauses_are_not_training_time(tmp_path, stream, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    book, _ = book_of(tmp_path, stream, TrainState(step=1, samples_seen=100))  # resumed there
    with book.paused("an evaluation"):
        now[0] += 50
    book.count(0, 0.5, False)
    now[0] += 2
    assert book._interval.close(108, 1) == {"samples_per_second": 4.0, "data_wait": 0.25}
    assert Interval(8).close(8, 1) == {"samples_per_second": 0.0, "data_wait": 0.0}


def test_the_pace_of_a_logged_step_is_that_of_the_steps_since_the_one_before(tmp_path, stream, monkeypatch):
    now, state = [100.0], TrainState(step=25, samples_seen=100)  # resumed there
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    book, _ = book_of(tmp_path, stream, state)
    for seconds in (2.0, 0.5):
        now[0] += seconds
        log_steps(book, state, 1, waited=seconds / 4)
    found = [(row["samples_per_second"], row["data_wait"]) for row in rows(tmp_path)]
    assert found == [(BATCH / 2.0, 0.25), (BATCH / 0.5, 0.25)]


def test_a_committed_checkpoint_is_in_the_status_and_the_metrics(tmp_path, stream):
    book, status = book_of(tmp_path, stream, TrainState(step=9))
    book.committed(Saved(tmp_path / "step-7", 7, 28, 1000, 2.5), stall=0.25)
    (row,) = rows(tmp_path)
    wanted = {"kind": "checkpoint", "step": 7, "samples": 28, "checkpoint_stall": 0.25, "checkpoint_bytes": 1000}
    assert {name: row[name] for name in wanted} == wanted
    assert json.loads((tmp_path / "status.json").read_text())["checkpoint"] == str(tmp_path / "step-7")
    assert status.checkpoint == tmp_path / "step-7"


# ---- saving ---------------------------------------------------------------------------------------------------------


def saving_of(folder, stream, state, resumed=False):
    """Saves every fifth step, and where `recall` is the best so far."""
    checkpoint = CheckpointConfig(every="5 steps", keep_best="recall")
    book, status = book_of(folder, stream, state)
    store = Checkpoints(folder, alone(), Retention(keep=9, keep_best="recall"))
    times = make_timetable(config_of(folder, checkpoint=checkpoint), stream)
    engine = PlainEngine(torch.nn.Linear(2, 2))
    return Saving(store, times, book, engine, state, Extras({}, ""), resumed), status


def saved_steps(folder):
    return [committed.step_of(path) for path in committed.committed(folder / committed.FOLDER)]


def test_a_save_is_due_by_its_step_and_for_the_best_evaluation(tmp_path, stream):
    state = TrainState()
    saving, _ = saving_of(tmp_path, stream, state)
    recalls, due = {2: 0.5, 3: 0.4, 4: 0.6, 5: 0.1}, []
    for state.step in range(1, 7):
        due.append(saving.due({"recall": recalls[state.step]} if state.step in recalls else {}))
    assert due == [False, True, False, True, True, False]


def test_a_metric_that_does_not_exist_is_an_error_at_the_first_evaluation(tmp_path, stream):
    saving, _ = saving_of(tmp_path, stream, TrainState(step=1))
    assert not saving.due({})
    with pytest.raises(UserError, match=r"keep_best names no metric of this run: recall; expected loss"):
        saving.due({"loss": 1.0})


def test_saves_follow_each_other_and_the_last_step_is_saved_once(tmp_path, stream):
    state = TrainState(step=1)
    saving, status = saving_of(tmp_path, stream, state)
    saving.begin({"recall": 0.5})
    state.step = 2
    saving.begin({})  # waits for the one before
    assert status.checkpoint == committed.step_folder(tmp_path / committed.FOLDER, 1)
    saving.finish({})
    assert saved_steps(tmp_path) == [1, 2]
    assert status.checkpoint == committed.step_folder(tmp_path / committed.FOLDER, 2)
    assert committed.evaluation(committed.step_folder(tmp_path / committed.FOLDER, 1)) == {"recall": 0.5}
    state.step = 3
    saving.finish({"recall": 0.7})
    saving.close()
    assert saved_steps(tmp_path) == [1, 2, 3]
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "checkpoint"] == [1, 2, 3]
    assert (tmp_path / committed.FOLDER / committed.BEST).read_text() == "step-000000003\n"


def test_a_run_that_was_complete_already_saves_nothing(tmp_path, stream):
    saving, _ = saving_of(tmp_path, stream, TrainState(step=1), resumed=True)
    saving.finish({})
    assert saved_steps(tmp_path) == []


# ---- faults ---------------------------------------------------------------------------------------------------------


def batch_of(*keys):
    return SimpleNamespace(epoch=1, keys=list(keys))


def test_left_out_steps_are_counted_up_to_the_limit_and_listed(tmp_path):
    state, notes = TrainState(step=6), []
    faults = Faults(tmp_path, alone(), state, GuardConfig(max_skipped=1), Writes(), notes.append)
    assert faults.may_skip
    faults.skip(NonFiniteError("a gradient is not finite"), batch_of("a", "b"), float("nan"))
    assert not faults.may_skip
    assert rows(tmp_path, "skipped.jsonl") == [
        {"step": 7, "epoch": 1, "loss_by_rank": ["nan"], "keys_by_rank": [["a", "b"]]}
    ]
    (note,) = notes
    assert note == "step 7 left out on all ranks (1 of 1): a gradient is not finite; see skipped.jsonl"


@pytest.mark.parametrize(("sensitivity", "listed"), [(6.0, [ENOUGH + 1]), (None, [])])
def test_spikes_are_listed_where_they_are_watched(tmp_path, sensitivity, listed):
    state, notes = TrainState(), []
    faults = Faults(tmp_path, alone(), state, GuardConfig(spike=sensitivity), Writes(), notes.append)
    for loss in [1.0] * ENOUGH + [9.0]:
        state.step += 1
        faults.watch(batch_of("a"), loss, loss)
    assert [int(note.split("step ")[1].split(":")[0]) for note in notes] == listed
    assert [row["step"] for row in rows(tmp_path, "spikes.jsonl")] == listed if listed else True
    assert len(state.recent_losses) == (ENOUGH + 1 if listed else 0)


def test_what_ends_the_run_names_ranks_samples_and_the_way_back():
    error = NonFiniteError("a gradient is not finite")
    told = str(explain(error, 8, float("inf"), ["a"], "step-7"))
    assert told.startswith("step 8 was stopped before its update: a gradient is not finite; got loss not finite on")
    assert "ranks [0], features not finite of samples a (rank 0); remedy: last good checkpoint: step-7" in told
    assert "ranks none, all features finite; remedy: last good checkpoint: none yet" in str(
        explain(error, 8, 1.0, [], None)
    )


def test_an_error_that_leaves_the_watch_is_the_last_word_of_the_status(tmp_path):
    status = Status(tmp_path, True)
    status.own()
    with pytest.raises(OSError, match="full"), Watch(alone(), status, "20 minutes"):
        raise OSError("the disk is full")
    said = json.loads((tmp_path / "status.json").read_text())
    assert (said["state"], said["reason"]) == ("failed", "the disk is full")
    for thread in threading.enumerate():
        if thread.name == "hang-watch":
            thread.join(20)
            assert not thread.is_alive()


# ---- train ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_checkpoints_that_is_a_file_is_told_before_the_first_step(tmp_path, stream):
    (tmp_path / "checkpoints").write_text("")
    config = config_of(tmp_path)
    job = SimpleNamespace(config=config, runtime=alone(), stream=stream, state=TrainState())
    with pytest.raises(UserError, match=r"opening the files of run.dir .*checkpoints"):
        train._open(job, make_timetable(config, stream), Status(tmp_path, True), Writes())


def test_every_legal_seed_seeds_every_step():
    states = set()
    for seed in (0, 2**40, 2**64 - 1):
        train.seed_step(seed, 10**7, 4095)
        states.add(torch.initial_seed())
    assert len(states) == 3
