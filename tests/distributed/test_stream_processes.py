"""The stream over real processes: loader workers, ranks, signals and sudden deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from pretrain.stream.transform import ImageSettings
from processes import alive, wait_until_gone, worker_pids
from ranks import run_ranks
from stream_corpora import characters, pixels, reader_of, stream_of, tokens, write_corpus

SETTINGS = {
    "seed": 3,
    "global_batch": 16,
    "window": 4,
    "image": ImageSettings(16, crop_scale=(0.5, 1.0)),
    "tokenize": characters,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("shards"), [23, 31, 16], {9: {"jpg": b"not a picture"}})


def batches(corpus, first_step=0, steps=7, **settings):
    with stream_of(corpus, **(SETTINGS | settings)) as stream:
        return list(islice(stream.iterate(first_step), steps))


def assert_same(ours, theirs):
    assert (ours.step, ours.keys, ours.captions, ours.bad) == (theirs.step, theirs.keys, theirs.captions, theirs.bad)
    assert torch.equal(pixels(ours), pixels(theirs))
    assert pixels(ours).stride() == pixels(theirs).stride()
    assert torch.equal(tokens(ours), tokens(theirs))
    assert np.array_equal(ours.ids, theirs.ids)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("first_step", [0, 3])
def test_any_number_of_workers_gives_the_same_batches(corpus, workers, first_step):
    expected = batches(corpus, first_step)
    assert any(batch.bad for batch in expected)
    for ours, theirs in zip(batches(corpus, first_step, workers=workers), expected, strict=True):
        assert_same(ours, theirs)


def test_one_shard_feeds_four_ranks_of_two_workers(tmp_path):
    corpus = write_corpus(tmp_path, [40])
    whole = batches(corpus, steps=5)
    ranks = [batches(corpus, steps=5, rank=rank, world_size=4, workers=2) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([pixels(rank[step]) for rank in ranks]), pixels(batch))
        assert [key for rank in ranks for key in rank[step].keys] == batch.keys


def test_workers_and_files_are_gone_after_closing(corpus):
    with stream_of(corpus, **SETTINGS, workers=2) as stream:
        next(stream.iterate(0))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with stream_of(corpus, **SETTINGS, workers=2) as stream:
            iterator = stream.iterate(0)
            next(iterator)
            pids = worker_pids()
            assert len(pids) == 2
        assert wait_until_gone(pids) == []
    del iterator  # it holds its last batch, which lies in shared memory
    deadline = time.monotonic() + 5
    while (now := len(os.listdir("/proc/self/fd"))) > before and time.monotonic() < deadline:
        time.sleep(0.05)  # the last socket of a worker closes in a thread
    assert now <= before


def test_an_abandoned_iterator_ends_its_workers(corpus):
    with stream_of(corpus, **SETTINGS, workers=1) as stream:
        iterator = stream.iterate(0)
        next(iterator)
        pids = worker_pids()
        assert len(pids) == 1
        del iterator
        assert wait_until_gone(pids) == []


def test_an_abandoned_stream_ends_its_workers(corpus):
    stream = stream_of(corpus, **SETTINGS, workers=1)
    iterator = stream.iterate(0)
    next(iterator)
    pids = worker_pids()
    assert len(pids) == 1
    del stream, iterator
    assert wait_until_gone(pids) == []


def test_workers_survive_signals_meant_for_their_rank(corpus):
    with stream_of(corpus, **SETTINGS, workers=2) as stream:
        iterator = stream.iterate(0)
        for half in (0, 1):  # before a worker runs its first line, and while it works
            for pid, number in product(worker_pids(), (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)):
                os.kill(pid, number)
            assert [batch.step for batch in islice(iterator, 9)] == list(range(9 * half, 9 * half + 9))


def test_a_killed_worker_is_a_clear_error(corpus):
    with stream_of(corpus, **SETTINGS, workers=1) as stream:
        iterator = stream.iterate(0)
        next(iterator)
        os.kill(worker_pids()[0], signal.SIGKILL)
        with pytest.raises(UserError, match="a loader process died"):
            list(islice(iterator, 20))


def test_an_error_in_a_worker_keeps_its_text(tmp_path):
    corpus = write_corpus(tmp_path, [40])
    with stream_of(corpus, **SETTINGS, workers=1) as stream:
        (tmp_path / "s-000000.tar").unlink()
        with pytest.raises(UserError) as caught:
            next(stream.iterate(0))
        assert str(caught.value).startswith(f"missing shard {corpus.paths[0]}")
        assert "Traceback" not in str(caught.value)


SCRIPT = """
    import sys
    sys.path[0:1] = [{repository!r}, {tests!r}]
    from itertools import islice
    from data_tools.corpus import open_corpus
    from pretrain.stream.transform import ImageSettings
    from stream_corpora import characters, stream_of
    import multiprocessing
    print("imported", __name__, flush=True)
    stream = stream_of(open_corpus({tars!r}), seed=3, global_batch=16, window=4, image=ImageSettings(16),
                         tokenize=characters, workers=2)
    batches = stream.iterate(0)
    for batch in islice(batches, 3):
        pass
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    print("workers", server, *[process.pid for process in multiprocessing.active_children()], flush=True)
    {end}
"""  # fmt: skip


def start_script(corpus, folder: Path, repo_root: Path, end: str) -> subprocess.Popen:
    """A script named like the package, without a main guard, run from another directory."""
    (folder / "launch").mkdir()
    script = folder / "launch" / "pretrain.py"
    paths = {"repository": str(repo_root), "tests": str(repo_root / "tests"), "tars": list(corpus.paths)}
    script.write_text(textwrap.dedent(SCRIPT.format(**paths, end=end)))
    return subprocess.Popen([sys.executable, str(script)], cwd=folder, stdout=subprocess.PIPE, text=True)


def test_a_script_named_pretrain_is_not_run_again_by_workers(corpus, tmp_path, repo_root):
    process = start_script(corpus, tmp_path, repo_root, end="raise SystemExit(7)")  # the stream is never closed
    started = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 7
    assert output.count("imported") == 1
    assert time.monotonic() - started < 60
    assert wait_until_gone([int(pid) for pid in output.split("workers")[1].split()]) == []


def test_a_killed_worker_does_not_hold_up_the_end(corpus, tmp_path, repo_root):
    end = "import os; os.kill(multiprocessing.active_children()[0].pid, 9); list(batches)"
    process = start_script(corpus, tmp_path, repo_root, end)
    try:
        output, _ = process.communicate(timeout=60)  # the traceback holds the loader, and with it the other worker
    finally:
        process.kill()
    assert process.returncode == 1
    assert wait_until_gone([int(pid) for pid in output.split("workers")[1].split()]) == []


def test_workers_die_with_a_killed_parent(corpus, tmp_path, repo_root):
    process = start_script(corpus, tmp_path, repo_root, end="import time; time.sleep(300)")
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        pids = [int(pid) for pid in lines[1].split()[1:]]
        assert len(pids) == 3
        assert all(map(alive, pids))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert wait_until_gone(pids) == []


def _epoch(rank, world_size, tars, workers):
    stream = stream_of(open_corpus(tars), **SETTINGS, rank=rank, world_size=world_size, workers=workers)
    keys, steps = [], 0
    for batch in islice(stream.iterate(0), 2 * stream.steps_per_epoch):
        total = torch.tensor([len(batch.keys)])
        dist.all_reduce(total)  # hangs if a rank had fewer steps
        keys += batch.keys
        steps += int(total == 16)
    counts = torch.tensor([stream.account.bad_total, stream.account.read_total])
    dist.all_reduce(counts)
    stream.close()
    return keys, steps, counts.tolist()


@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (4, 0)])
def test_ranks_make_equal_steps_with_bad_samples(corpus, world_size, workers):
    results = run_ranks(world_size, _epoch, list(corpus.paths), workers)
    whole = batches(corpus, steps=8)
    assert [steps for _, steps, _ in results] == [8] * world_size
    assert sorted(key for keys, _, _ in results for key in keys) == sorted(key for batch in whole for key in batch.keys)
    assert {tuple(counts) for _, _, counts in results} == {(sum(len(batch.bad) for batch in whole), 8 * 16)}


def test_evaluation_is_the_same_with_workers(tmp_path):
    corpus = write_corpus(tmp_path, [7, 4])
    ours, theirs = (list(reader_of(corpus, characters, 4, workers=n)) for n in (2, 0))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys
        assert torch.equal(pixels(a), pixels(b))
        assert torch.equal(tokens(a), tokens(b))
    assert wait_until_gone(worker_pids()) == []
