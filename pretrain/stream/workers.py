"""Loader processes: forked from a clean server, deaf to signals meant for their rank, gone when their rank is gone."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data_tools.errors import UserError
from pretrain.stream.transport import Parcel

PREFETCH = 2  # batches that each worker keeps ready
_PRELOAD = ["torch.utils.data", "pretrain.stream.loader"]
_GRACE = 3600  # seconds that a rank has for what it is at, an evaluation too, once its process group got SIGTERM
_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_REPOSITORY = str(Path(__file__).resolve().parents[2])


class _Jobs(Dataset):
    """Item `job` is build(job), or the UserError that it raised: it crosses the process border as a value, because the
    DataLoader would bury its text in a traceback. `pack` makes the value ready to cross."""

    def __init__(self, build: Callable[[int], Any], pack: Callable[[Any], Any]):
        self.build, self.pack = build, pack

    def __getitem__(self, job: int) -> Any:
        try:
            return self.pack(self.build(job))
        except UserError as error:
            return UserError(error)


_open: "weakref.WeakSet[Any]" = weakref.WeakSet()


def close_at_exit(owner: Any) -> None:
    """Call `owner.close()` at the end of this process, unless nobody holds it any more.

    It comes before multiprocessing's own clean-up, which would wait for the grace of each worker.
    """
    _open.add(owner)


@atexit.register
def _close_all() -> None:
    for owner in list(_open):
        owner.close()
    for process in multiprocessing.active_children():  # of a loader that a traceback still holds
        if process.daemon:
            process.kill()


class BatchIterator(Iterator[Any]):
    """`build(job)` for each of `jobs`, in order, built ahead by `workers` processes (0: in this one, when asked for).

    Worker w builds whole batches w, w + workers, ... It starts at once, and ends with `close()`, at the end of `jobs`,
    or when nobody holds it any more. No random number of this process is drawn.

    Args:
        build: picklable, and not defined in the script that runs.
        pin_memory: page-locked batches, for faster copies to a GPU; `build`'s values have a `pin_memory` method.

    Raises, on iteration:
        UserError: as raised by `build`, or for a worker that died.
    """

    def __init__(self, build: Callable[[int], Any], jobs: Iterable[int], workers: int, pin_memory: bool = False):
        self._workers = workers
        options: dict[str, Any] = {}
        if workers:
            _start_server(build)
            options = {
                "multiprocessing_context": multiprocessing.get_context("forkserver"),
                "worker_init_fn": partial(_start_worker, dict(os.environ)),
                "prefetch_factor": PREFETCH,
            }
        loader = DataLoader(
            _Jobs(build, Parcel if workers else _as_is),
            batch_size=None,
            sampler=jobs,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it draws from the global one, which belongs to the model
            **options,
        )
        try:
            with _without_main_module():
                self._source: Iterator[Any] | None = iter(loader)
        except OSError as error:  # its locks lie in /dev/shm, some kilobytes
            remedy = "look at /dev/shm and at `ulimit -u -n`, or set data.workers=0, which loads in the rank itself"
            raise UserError("cannot start loader processes", got=error.strerror, remedy=remedy) from None
        close_at_exit(self)

    def __next__(self) -> Any:
        if self._source is None:
            raise StopIteration
        try:
            batch = next(self._source)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if not self._workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            self.close()
            remedy = "give more memory, or lower data.workers; 0 loads in the rank itself"
            raise UserError("a loader process died", got=str(error), remedy=remedy) from None
        if isinstance(batch, UserError):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """End the workers and wait for them. Can be called again."""
        self._source = None  # the loader's iterator ends its processes when it is let go

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start_process(run: Callable[..., None], *args: Any) -> BaseProcess:
    """A process beside the loader workers that runs `run(*args)`; like them it ends with this one."""
    _start_server(None)
    process = multiprocessing.get_context("forkserver").Process(
        target=_run_beside, args=(dict(os.environ), run, args), daemon=True
    )
    with _without_main_module():
        process.start()
    return process


def _run_beside(environment: dict[str, str], run: Callable[..., None], args: tuple) -> None:
    _start_worker(environment)
    run(*args)


def _as_is(batch: Any) -> Any:
    return batch


def _start_server(build: Callable[[int], Any] | None) -> None:
    """Start the fork server, unless it runs: it imports the heavy modules once for all workers of this rank.

    It is born with the signals blocked that a scheduler sends to every process of a job, else it would die of them and
    take the workers along while the rank still saves its checkpoint.
    """
    preload = [*_PRELOAD, *getattr(build, "modules", ())]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    resource_tracker.ensure_running()  # the server's start begins with it, and its own start unblocks signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _REPOSITORY + (os.pathsep + path if path else "")
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Keeps workers from importing the running script again, which would cost each of them the imports of training."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        del main.__spec__
        vars(main).update(hidden)


def _start_worker(environment: dict[str, str], _: int = 0) -> None:
    """`environment` is the rank's of now: credentials may have been set after the fork server was started."""
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))  # the alarm's default action ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)


def _end_with_parent() -> None:
    """The parent's death closes its end of a pipe.

    The DataLoader's own watch is on the parent's id: here that is the fork server, which lives as long as any worker.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
