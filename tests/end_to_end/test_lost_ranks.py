"""Ranks that die, stop or hang in the middle of a run: all end within a bound, and the run says which one it was."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import runs
from pretrain.config.reading import load_config
from pretrain.job import Job
from pretrain.process import peers
from pretrain.process.runtime import start
from pretrain.tasks import ContrastiveConfig
from ranks import RankError, run_ranks
from training import train

ENDLESS = ("data.workers=0", "train.duration=100000 steps", "checkpoint.every=null", "log.every=1 steps")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.make_workspace(tmp_path_factory.mktemp("workspace"))


def processes(mark):
    """Rank (None: the launcher) by process, of everything that was started with LOST_RANKS_TEST=mark."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"LOST_RANKS_TEST={mark}".encode() in words:
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            found[int(path.parent.name)] = ranks[0] if ranks else None
    return found


def strike(workspace, folder, victim, number, *overrides):
    """Two ranks under the launcher; `number` to rank `victim` after three steps. Its process, output, seconds to the
    end of the last process."""
    words = runs.command(workspace, folder, *ENDLESS, *overrides, ranks=2)
    env = runs.ENV | {"LOST_RANKS_TEST": str(folder)}
    with (folder.parent / f"{folder.name}.out").open("w+") as output:
        launcher = subprocess.Popen(words, cwd="/", env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            wait(lambda: launcher.poll() is not None or any(row["step"] >= 3 for row in runs.rows(folder)), 150)
            assert launcher.poll() is None, Path(output.name).read_text()
            process = min(pid for pid, rank in processes(folder).items() if rank == victim)
            started = time.monotonic()
            os.kill(process, number)
            code = launcher.wait(timeout=120)
            wait(lambda: not processes(folder), 60)
            seconds = time.monotonic() - started
        finally:
            for pid in processes(folder):
                os.kill(pid, signal.SIGKILL)
        output.seek(0)
        text = output.read()
    assert code != 0
    return process, text, seconds


def wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_with_its_name(workspace, tmp_path, victim):
    process, output, seconds = strike(workspace, tmp_path / "run", victim, signal.SIGKILL)
    assert seconds < 30
    line = next(line for line in output.splitlines() if line.startswith("error"))
    for text in (line, runs.status(tmp_path / "run")["reason"]):
        assert f"rank {victim} (process {process} on " in text
        assert "died without a word" in text
    assert runs.status(tmp_path / "run")["state"] == "failed"


def test_a_stopped_rank_is_left_to_the_launcher_by_one_that_ends(workspace, tmp_path):
    """SIGSTOP: it cannot end itself. The other one does, and then the launcher kills it after 30 seconds."""
    process, output, seconds = strike(workspace, tmp_path / "run", 1, signal.SIGSTOP, "guard.hang_timeout=8 seconds")
    assert seconds < 60
    for text in (output, runs.status(tmp_path / "run")["reason"]):
        assert f"no progress for 8 seconds: no answer from rank 1 (process {process} on " in text
        assert "stopped, or stuck in foreign code; rank 0 (process" in text
    assert "stacks of all threads of rank 0" in output
    assert "in a training step after step" in output
    assert runs.status(tmp_path / "run")["state"] == "failed"


def test_a_job_that_was_suspended_goes_on(workspace, tmp_path):
    """All its processes stop for longer than the hang timeout, as by `scontrol suspend`, and are continued."""
    folder = tmp_path / "run"
    words = runs.command(workspace, folder, *ENDLESS, "guard.hang_timeout=5 seconds")
    env = runs.ENV | {"LOST_RANKS_TEST": str(folder)}
    launcher = subprocess.Popen(words, cwd="/", env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait(lambda: launcher.poll() is not None or any(row["step"] >= 3 for row in runs.rows(folder)), 150)
        stopped = list(processes(folder))
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in stopped:
                os.kill(pid, number)
            reached = max(row["step"] for row in runs.rows(folder))
            time.sleep(9 if number == signal.SIGSTOP else 0)
        wait(lambda: launcher.poll() is not None or max(row["step"] for row in runs.rows(folder)) > reached + 20, 60)
        assert launcher.poll() is None
        assert runs.status(folder)["state"] == "running"
    finally:
        for pid in processes(folder):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()


def hang(rank):
    """Rank 1 sleeps, rank 0 waits for it in a collective."""
    if rank == 1:
        time.sleep(60)


def fail(rank):
    """Rank 1 meets a fault of its own."""
    if rank == 1:
        raise OSError("the disk is full")


def die_beside_a_stuck_rank(rank):
    """Rank 0 does not notice that rank 1 is gone, as in a collective on GPUs."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def faulty(rank, world_size, workspace, folder, fault):
    """A run in whose fourth step every rank meets `fault`."""
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    peers._GRACE = 1.0
    # A rank that fails asks for three seconds whether another died: as long as the limit it would count as hanging.
    limit = 3 if fault is hang else 20
    words = [f"run.dir={folder}", f"guard.hang_timeout={limit} seconds", *ENDLESS]
    job = Job(load_config(ContrastiveConfig, workspace / "config.yaml", words), start(distributed=True))
    plain = job.forward_backward

    def step(batch):
        if batch.step == 3:
            fault(rank)
        return plain(batch)

    job.forward_backward = step
    train(job)


def ended(workspace, folder, fault):
    """How each rank ended, its stderr, and the reason in status.json."""
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(2, faulty, workspace, folder, fault)
    assert time.monotonic() - started < 50
    assert sorted(caught.value.tracebacks) == [0, 1]
    status = runs.status(folder)
    assert status["state"] == "failed"
    return caught.value.tracebacks, [(folder / f"stderr-{rank}").read_text() for rank in (0, 1)], status["reason"]


def test_a_rank_that_hangs_ends_all_with_their_stacks(workspace, tmp_path):
    ends, errors, reason = ended(workspace, tmp_path, hang)
    assert all("exit code 1" in text or "no progress" in text for text in ends.values())
    for rank, text in enumerate(errors):
        assert f"stacks of all threads of rank {rank}" in text
    assert "in hang" in errors[1]
    assert "no progress for 3 seconds" in reason
    assert "in a training step after step 3" in reason


def test_a_rank_that_fails_is_named_by_the_others(workspace, tmp_path):
    ends, _, reason = ended(workspace, tmp_path, fail)
    assert "UserError: rank 1 failed: the disk is full" in ends[0]
    assert "OSError: the disk is full" in ends[1]
    assert "the disk is full" in reason


def test_a_rank_that_waits_for_a_dead_one_is_ended(workspace, tmp_path):
    ends, errors, reason = ended(workspace, tmp_path, die_beside_a_stuck_rank)
    assert "exit code 1 " in ends[0]
    assert "exit code -9" in ends[1]
    assert "error: rank 1 (process" in errors[0]
    assert "died without a word" in reason
