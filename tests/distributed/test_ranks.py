"""The harness of the distributed tests itself: values, failures, hangs and deaths of ranks."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from ranks import RankError, run_ranks


def _sum_of_ranks(rank, world_size, offset):
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return value, torch.get_num_threads(), os.environ["RANK"]


def test_values_come_back_in_rank_order():
    results = run_ranks(4, _sum_of_ranks, 10)
    assert [value.item() for value, _, _ in results] == [46.0] * 4
    assert [(threads, rank) for _, threads, rank in results] == [(1, str(r)) for r in range(4)]


def _one_raises(rank, world_size):
    if rank == 1:
        raise ValueError("rank one says no")
    dist.barrier()


def test_a_failing_rank_ends_the_others_and_is_named():
    started = time.monotonic()
    with pytest.raises(RankError, match="rank one says no") as caught:
        run_ranks(2, _one_raises)
    assert 1 in caught.value.tracebacks
    assert time.monotonic() - started < 30


def _one_is_killed(rank, world_size):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_reported_with_its_exit_code():
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(2, _one_is_killed)


def _sleep(rank, world_size):
    time.sleep(60)


def test_a_hang_ends_at_the_timeout():
    started = time.monotonic()
    with pytest.raises(RankError, match="still running"):
        run_ranks(2, _sleep, timeout=3)
    assert time.monotonic() - started < 20
