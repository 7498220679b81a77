"""Batches on their way from a loader process: whole, in memory that is bounded by nothing but the machine's."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from data_tools.errors import UserError
from pretrain.stream import transport
from pretrain.stream.transport import Parcel

VALUES = [
    torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4),
    torch.arange(24).reshape(4, 6).T[1:, ::2],
    torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last),
    torch.zeros(0, 4),
    torch.tensor(2.5),
    torch.tensor([True, False]),
    np.arange(7, dtype=np.uint64),
    np.array(["a", "bc"]),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    {"none": None, "texts": ["\ud800", ""], "tuple": (1, 2.5)},
]


def sent(value):
    """As a process of the same user would receive it."""
    return pickle.loads(pickle.dumps(Parcel(value)))


def test_values_arrive_as_they_were():
    arrived = sent(VALUES)
    for ours, theirs in zip(arrived, VALUES, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(ours, theirs)
            ours.zero_()  # a mapping of its own, which may be written
        elif isinstance(theirs, np.ndarray):
            assert (ours.dtype, ours.shape, ours.flags.f_contiguous) == (
                theirs.dtype,
                theirs.shape,
                theirs.flags.f_contiguous,
            )
            assert np.array_equal(ours, theirs)
        else:
            assert ours == theirs
    assert arrived[2].stride() == VALUES[2].stride()
    assert VALUES[0].any()


def test_files_go_with_the_last_tensor():
    before = len(os.listdir("/proc/self/fd"))
    kept = [sent([torch.full((1 << 20,), number, dtype=torch.uint8), None])[0] for number in range(5)]
    assert [int(tensor[-1]) for tensor in kept] == list(range(5))
    with open("/proc/self/maps") as maps:
        assert sum("memfd:batch" in line for line in maps) == 5
    del kept
    with open("/proc/self/maps") as maps:
        assert not any("memfd:batch" in line for line in maps)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the socket that hands descriptors on


def test_a_disk_serves_where_the_kernel_has_no_anonymous_files(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert torch.equal(sent(VALUES[0]), VALUES[0])
    assert not list(tmp_path.glob("tmp*"))


def test_no_memory_is_told_where_the_batch_is_built(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transport.os, "pwrite", full)
    with pytest.raises(
        UserError, match=r"no memory for a batch .*; got No space left .*; expected 64 bytes .*; remedy"
    ):
        Parcel(VALUES[0])


SCRIPT = """
    import contextlib, gc, os
    from functools import partial
    import torch
    from pretrain.stream.workers import BatchIterator

    there = os.statvfs("/dev/shm")
    assert there.f_blocks * there.f_frsize == 1 << 20
    large = partial(torch.full, (4 << 20,), dtype=torch.uint8)
    with BatchIterator(large, range(6), 2) as batches:
        print([(len(batch) >> 20, int(batch[-1])) for batch in batches])
    del batches
    gc.collect()  # the locks of that loader lie there until then
    with open("/dev/shm/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        BatchIterator(large, range(6), 2)
    except ValueError as error:
        print(error)
"""


def test_a_small_dev_shm_does_not_matter_and_a_full_one_is_named(repo_root):
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm takes root")
    script = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run([*mounted, *script], cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    batches, error = done.stdout.splitlines()
    assert batches == str([(4, job) for job in range(6)])
    assert error.startswith("cannot start loader processes; got No space left on device; remedy: look at /dev/shm")
