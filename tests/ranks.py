"""Real ranks for tests: processes joined by gloo over a file store, so that no port is ever picked.

Processes are forked from a server that has imported torch, open_clip and deepspeed once: a rank starts in milliseconds.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_MUON = "deepspeed.runtime.zero.muon.muon_optimizer"  # the first engine imports it, and with it the compiler: 4 s
_PRELOAD = ["torch", "torch.distributed", "open_clip", "deepspeed", _MUON, "torch.utils.tensorboard"]
_CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # loader workers of the tests themselves are born so too
_GRACE = 5.0  # seconds that the other ranks get to report after the first one failed


class RankError(AssertionError):
    """A rank raised or died. `tracebacks`: rank -> the text of its exception."""

    def __init__(self, tracebacks: dict[int, str]):
        super().__init__("\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(tracebacks.items())))
        self.tracebacks = tracebacks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Run `function(rank, world_size, *args)` on `world_size` gloo ranks of one thread each.

    `function` and `args` are pickled by reference, so `function` stands at module level. The process group is up when
    it starts; RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; GPUs are hidden.

    Returns:
        The value of each rank, in rank order.

    Raises:
        RankError: a rank raised, died or did not end within `timeout` seconds. No process is left running.
    """
    return _run(range(world_size), world_size, function, args, timeout)


def run_warm(function: Callable[..., Any], *args: Any, timeout: float = 300) -> Any:
    """The value of `function(*args)` in one process that is no rank and has imported everything: `fork_ranks` there
    costs a fork and a meeting."""
    return _run([0], 0, function, args, timeout)[0]


def fork_ranks(world_size: int, function: Callable[..., Any], args: tuple, folder: Path) -> list[int]:
    """Process ids of ranks that run `function` as in `run_ranks`, forked from this process, the one of `run_warm`.
    They meet and report in `folder`, a new one; the caller waits for them."""
    call = pickle.dumps((function, args))
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _rank_main(rank, world_size, call, str(folder), {}, 60)
            os._exit(0)
        pids.append(pid)
    return pids


def _run(ranks, world_size: int, function: Callable[..., Any], args: tuple, timeout: float) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    _start_server(context)
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, call, folder, dict(os.environ), timeout))
            for rank in ranks
        ]
        try:
            for process in processes:
                process.start()
            _join(processes, timeout)
            return _collect(processes, Path(folder), timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _start_server(context) -> None:
    context.set_forkserver_preload(_PRELOAD)
    before = {name: os.environ.get(name) for name in _CPU_ONLY}
    os.environ.update(_CPU_ONLY)  # the server imports torch and deepspeed under these
    resource_tracker.ensure_running()  # which unblocks signals where it is started
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _join(ranks: list, timeout: float) -> None:
    """Wait for all; once a rank has failed the others, blocked in a collective perhaps, get a short grace."""
    deadline = time.monotonic() + timeout
    failed = False
    while running := [process for process in ranks if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        wait([process.sentinel for process in running], timeout=left)
        if not failed and any(process.exitcode for process in ranks):
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE)


def _collect(ranks: list, folder: Path, timeout: float) -> list[Any]:
    values, failures = [], {}
    for rank, process in enumerate(ranks):
        outcome = folder / f"rank-{rank}"
        if outcome.is_file():
            ok, value = pickle.loads(outcome.read_bytes())
            values.append(value)
            if not ok:
                failures[rank] = value
        elif process.exitcode is None:
            failures[rank] = f"still running when the ranks were stopped (timeout {timeout} s, grace {_GRACE} s)"
        else:
            failures[rank] = f"ended with exit code {process.exitcode} and no result"
    if failures:
        raise RankError(failures)
    return values


def _rank_main(rank: int, world_size: int, call: bytes, folder: str, environment: dict, timeout: float) -> None:
    gc.freeze()  # what the server imported: ZeRO-3 collects garbage, a second and a half each time over all of torch
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    signal.alarm(int(timeout) + 30)  # ends this rank even where pytest itself was killed
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # as launchers say; nobody calls there
    os.environ.update(environment | _CPU_ONLY | {name: str(value) for name, value in place.items()})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        if world_size:
            store = dist.FileStore(str(Path(folder) / "store"), world_size)
            limit = timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
            args = (rank, world_size, *args)
        outcome = pickle.dumps((True, function(*args)))
        if world_size:
            dist.barrier()  # nobody leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    path = Path(folder) / f"rank-{rank}"
    path.with_suffix(".new").write_bytes(outcome)
    path.with_suffix(".new").rename(path)
    if not pickle.loads(outcome)[0]:
        os._exit(1)  # no clean-up: it could block on the ranks that are still in a collective
