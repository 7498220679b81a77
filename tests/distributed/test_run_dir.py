"""run.dir: shared by all ranks or refused on all of them, and what a failure on one rank tells the others."""

import os
import pickle
import signal
import socket
import time

from data_tools.errors import UserError
from pretrain.process.collectives import all_reduce_sum, raise_on_all_ranks
from pretrain.process.run_dir import claim_run_dir
from pretrain.process.run_lock import LOCK
from pretrain.process.runtime import start
from pretrain.process.status import Status
from pretrain.report.writes import Writes
from ranks import fork_ranks, run_ranks, run_warm


def claim(rank, world_size, folders):
    try:
        claim_run_dir(Status(folders[rank], rank == 0), start(distributed=True))
    except UserError as error:
        return str(error)


def test_a_shared_folder_is_claimed_and_left_clean(tmp_path):
    assert run_ranks(2, claim, [tmp_path / "run"] * 2) == [None, None]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"status.json", LOCK}


def test_folders_that_are_not_shared_are_refused_on_every_rank(tmp_path):
    """As on two hosts, where one path means two folders."""
    (tmp_path / "b").mkdir()
    first, second = run_ranks(2, claim, [tmp_path / "a", tmp_path / "b"])
    assert first == second
    assert "is not shared by all hosts" in first
    assert "remedy: set run.dir to a shared file system" in first


def claim_and_live(rank, world_size, folders):
    """Claims the folder and lives until it is killed; as a run does, with a child that outlives it."""
    claim(rank, world_size, folders)
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    (folders[0] / "claimed").touch()
    time.sleep(60)


def claim_twice(folder):
    """What a second run hears while the first one lives, and after it was killed."""
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
    run = folder / "run"
    (first,) = fork_ranks(1, claim_and_live, ([run],), folder / "a")
    while not (run / "claimed").exists():
        time.sleep(0.01)
    (second,) = fork_ranks(1, claim, ([run],), folder / "b")
    os.waitpid(second, 0)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    (third,) = fork_ranks(1, claim, ([run],), folder / "c")
    os.waitpid(third, 0)
    return first, *(pickle.loads((folder / name / "rank-0").read_bytes())[1] for name in ("b", "c"))


def test_a_folder_in_use_is_refused_by_name_until_its_run_is_dead(tmp_path):
    pid, refused, after = run_warm(claim_twice, tmp_path)
    assert f"{tmp_path / 'run'} is in use by another run" in refused
    assert f"host {socket.gethostname()}, process {pid}, started 20" in refused
    assert "choose another run.dir" in refused
    assert after is None


def test_a_folder_that_cannot_be_written_is_refused_on_every_rank(tmp_path):
    (tmp_path / "file").touch()
    first, second = run_ranks(2, claim, [tmp_path / "file" / "run"] * 2)
    assert first == second
    assert "preparing run.dir" in first
    assert "failed on rank 0" in first


def fail_alone(rank, world_size):
    def action():
        if rank == 1:
            raise PermissionError(13, "Permission denied", "x")

    start(distributed=True)
    try:
        raise_on_all_ranks(action, "writing")
    except UserError as error:
        return str(error)


def test_a_fault_of_one_rank_is_raised_on_all():
    messages = run_ranks(4, fail_alone)
    assert len(set(messages)) == 1
    assert "writing failed on rank 1" in messages[0]
    assert "Permission denied" in messages[0]


def write_alone(rank, world_size, folder):
    """Rank 1 alone cannot write: what the step's agreement sums, and what both raise."""
    start(distributed=True)
    writes = Writes()
    with writes.to(folder / "metrics.jsonl"):
        if rank == 1:
            raise OSError(28, "No space left on device")
    failed = all_reduce_sum([writes.failed])
    try:
        writes.raise_faults("step-7")
    except UserError as error:
        return failed, str(error)


def test_what_one_rank_cannot_write_ends_all_with_its_reason(tmp_path):
    first, second = run_ranks(2, write_alone, tmp_path)
    assert first == second
    assert first[0] == [1]
    assert "cannot be written on rank 1" in first[1]
    assert "metrics.jsonl: No space left on device" in first[1]
