"""Memory and open files of a rank and its loader workers stay flat, however long a run and however often re-opened."""

from __future__ import annotations

import gc
import os
from itertools import islice
from pathlib import Path

import pytest

from pretrain.stream.transform import ImageSettings
from pretrain.stream.workers import PREFETCH
from processes import wait_until_gone, worker_pids
from stream_corpora import characters, stream_of, write_corpus

SETTINGS = {"seed": 3, "global_batch": 16, "window": 4, "image": ImageSettings(48), "tokenize": characters}
WARM_UP, EPOCHS = 40, 200
MEMORY_BOUND = 4 << 20  # bytes; a leak of the images alone would be 36 MB (160 epochs, 2 batches, 16 x 3 x 48 x 48)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three shards, one sample of them bad."""
    return write_corpus(tmp_path_factory.mktemp("shards"), [11, 13, 8], {9: {"jpg": b"not a picture"}})


def usage(pids: list[int]) -> dict[int, tuple[int, int]]:
    """Resident bytes and open files of each process."""
    gc.collect()
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        pid: (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page, len(os.listdir(f"/proc/{pid}/fd")))
        for pid in pids
    }


def assert_flat(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]], spare_files: int) -> None:
    for pid, (memory, files) in before.items():
        assert after[pid][0] - memory < MEMORY_BOUND
        assert after[pid][1] - files <= spare_files


@pytest.mark.parametrize("workers", [0, 2])
def test_hundreds_of_epochs_leave_nothing_behind(corpus, workers):
    with stream_of(corpus, **SETTINGS, workers=workers) as stream:
        batches = stream.iterate(0)
        assert stream.steps_per_epoch == 2
        for _ in islice(batches, WARM_UP * 2):
            pass
        pids = [os.getpid(), *worker_pids()]
        assert len(pids) == 1 + workers
        before = usage(pids)
        for batch in islice(batches, (EPOCHS - WARM_UP) * 2):
            last = batch
        assert last.epoch == EPOCHS - 1
        on_their_way = workers * PREFETCH * 3  # batches whose images, texts and identity are files in shared memory
        assert_flat(before, usage(pids), spare_files=on_their_way)


def test_an_iterator_left_in_the_middle_leaves_nothing_behind(corpus):
    with stream_of(corpus, **SETTINGS) as stream:
        for reopened in range(300):
            if reopened == 50:
                before = usage([os.getpid()])
            next(stream.iterate(reopened))
        assert_flat(before, usage([os.getpid()]), spare_files=0)


def test_workers_left_in_the_middle_leave_nothing_behind(corpus):
    with stream_of(corpus, **SETTINGS, workers=1) as stream:
        for reopened in range(12):
            batches = stream.iterate(reopened)
            next(batches)
            if reopened == 4:
                before = usage([os.getpid()])
        assert len(worker_pids()) == 1
    assert wait_until_gone(worker_pids()) == []
    del batches
    assert_flat(before, usage([os.getpid()]), spare_files=0)
