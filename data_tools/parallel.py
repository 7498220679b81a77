"""Tasks over worker processes with progress; results do not depend on the number of workers."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from data_tools.errors import UserError
from data_tools.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL = 0.2
_counter: Any = None  # a shared integer, in worker processes


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _share(counter: Any) -> None:
    global _counter
    _counter = counter


def _advance(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount


def _call(function: Callable, task: object) -> object:
    return function(task, _advance)


def run_tasks(
    function: Callable[[Task, Callable[[int], None]], Result], tasks: list[Task], workers: int, progress: Progress
) -> Iterator[Result]:
    """Yield `function(task, advance)` for every task, as they finish; `advance(n)` reports n units of progress.

    One worker or one task runs in this process. At most two tasks per worker are in flight, so that tasks are not all
    pickled at once. Workers come from a fork server: they inherit neither threads nor locks.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from _run_here(function, tasks, progress)
        return
    context = get_context("forkserver")
    counter = context.Value("Q", 0)
    with ProcessPoolExecutor(workers, context, _share, (counter,)) as pool:
        try:
            yield from _drain(pool, function, iter(tasks), 2 * workers, lambda: progress.update(counter.value))
        except BrokenProcessPool:
            remedy = "run the same command again, with fewer --workers if memory ran out"
            raise UserError("a worker process was killed", remedy=remedy) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_here(function: Callable, tasks: list, progress: Progress) -> Iterator:
    done = 0

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        progress.update(done)

    for task in tasks:
        yield function(task, advance)


def _drain(
    pool: ProcessPoolExecutor, function: Callable, tasks: Iterable, in_flight: int, poll: Callable[[], None]
) -> Iterator:
    source = iter(tasks)
    pending: set[Future] = {pool.submit(_call, function, task) for task in islice(source, in_flight)}
    while pending:
        finished, pending = wait(pending, _POLL, FIRST_COMPLETED)
        poll()
        pending |= {pool.submit(_call, function, task) for task in islice(source, len(finished))}
        for future in finished:
            yield future.result()
