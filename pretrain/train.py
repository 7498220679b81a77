"""The training loop. A job (job.py) brings the model, the stream and the evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch

from pretrain.config.tree import Config
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.committed import FOLDER, Retention
from pretrain.engine.engine import Engine, NonFiniteError
from pretrain.engine.state import TrainState
from pretrain.loop.book import Book
from pretrain.loop.faults import Faults, explain
from pretrain.loop.saving import Saving
from pretrain.loop.timetable import Timetable, make_timetable
from pretrain.process.collectives import all_reduce_sum, gather, raise_on_all_ranks
from pretrain.process.entry import EXIT_DONE, EXIT_STOPPED
from pretrain.process.lifeline import Lifeline
from pretrain.process.run_dir import claim_run_dir
from pretrain.process.runtime import OnHost, Runtime, finish, start
from pretrain.process.status import DONE, RUNNING, STOPPED, Status
from pretrain.process.stop import StopRequest
from pretrain.process.watch import Watch
from pretrain.process.watchdog import heartbeat
from pretrain.report.metrics import Metrics
from pretrain.report.profiling import StepProfiler, profiled
from pretrain.report.writes import Writes
from pretrain.stream.batches import Batch
from pretrain.stream.loader import TrainStream


class Job(Protocol):
    """What the loop needs of a job."""

    @property
    def config(self) -> Config:
        """The settings of the run."""

    @property
    def runtime(self) -> Runtime:
        """This rank's place."""

    @property
    def engine(self) -> Engine:
        """What makes the updates."""

    @property
    def stream(self) -> TrainStream:
        """The batches; it stands where `state` does."""

    @property
    def state(self) -> TrainState:
        """How far the run is."""

    @property
    def extras(self) -> Extras:
        """What checkpoints hold beside tensors."""

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that the run goes on from."""

    def forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of the global batch; returns the rank-local `loss` and its objectives by name, detached. All ranks
        call it."""

    def diagnose(self, batch: Batch) -> list[str]:
        """Keys of this rank's samples whose features are not finite. All ranks call it."""

    def evaluate(self) -> dict[str, float]:
        """Metrics, the same on every rank. All ranks call it."""


def launch(life: Lifeline, build: Callable[[Runtime], Job]) -> int:
    """Join the process group, build the job, train it; returns the exit code. All ranks must call it."""
    runtime = start(distributed=True)
    if runtime.is_main:
        print(f"running on {runtime}", flush=True)
    claim_run_dir(life.status, runtime)
    code = train(build(runtime), life)
    finish()
    return code


def train(job: Job, life: Lifeline) -> int:
    """Run `job` to its end or to a stop request; returns the exit code. All ranks must call it."""
    config, runtime, state, status = job.config, job.runtime, job.state, life.status
    times, writes = make_timetable(config, job.stream), Writes()
    status.step, status.steps, status.checkpoint = state.step, times.end, job.resumed_from
    book, faults = _open(job, times, status, writes)
    saving = _saving(job, times, book)
    profiler = StepProfiler(config.profile.steps, config.run.dir, runtime, book.note, writes)
    _announce(job, times, book)
    life.stop.heed()
    values: dict[str, float] = {}  # of this step's evaluation, if it had one
    with (
        closing(profiler),
        closing(book),
        closing(job.stream),
        closing(saving),
        Watch(runtime, status, config.guard.hang_timeout),
    ):
        stop = _reason(life.stop)  # one that came while the ranks got ready
        for batch, waited in () if stop else _batches(job, times, profiler):
            losses = _update(job, times, faults, saving, status, batch)
            own, last = {} if losses is None else losses.read(), state.step == times.total
            progress = saving.progress()
            with writes.to("the list of bad samples or changed shards"):
                job.stream.check_writes()
            asked = life.stop.reason is not None
            # The one agreement of a step: what the ranks must know of each other rides on it.
            bad, stopping, unwritten, *rest = all_reduce_sum(
                [len(batch.bad), asked, writes.failed, *own.values(), *progress]
            )
            totals, saved = rest[: len(own)], rest[len(own) :]
            if unwritten:
                writes.raise_faults(status.checkpoint)
            saving.advance(*saved)
            book.count(int(bad), waited, last)
            means = {name: total / runtime.world_size for name, total in zip(own, totals, strict=True)}
            if means:
                faults.watch(batch, own["loss"], means["loss"])
            if times.due("log", state.step):
                book.log(means, times.lr(state.samples_seen - times.batch), job.engine)
            profiler.after(state.step, bool(stopping) or last)
            stop = _reason(life.stop) if stopping else ""
            values = _evaluate(job, book, batch) if times.due("eval", state.step) else {}
            if stop or saving.due(values):
                saving.begin(values)
            if stop:
                break
        saving.finish(values)
        return _end(job, times, book, writes, status, stop)


def _open(job: Job, times: Timetable, status: Status, writes: Writes) -> tuple[Book, Faults]:
    """The files of the run; where they cannot be opened, all ranks raise."""
    config, runtime, state = job.config, job.runtime, job.state
    folder = Path(config.run.dir)

    def open_all() -> tuple[Book, Faults]:
        if runtime.is_main:  # now, not at the first save, which may be hours away
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        metrics = Metrics(folder, runtime.is_main, times.end, state.step, writes)
        book = Book(runtime, job.stream, state, config.data, status, metrics, writes)
        return book, Faults(folder, runtime, state, config.guard, writes, book.note)

    return raise_on_all_ranks(open_all, f"opening the files of run.dir {folder}")


def _saving(job: Job, times: Timetable, book: Book) -> Saving:
    config = job.config.checkpoint
    retention = Retention(config.keep, times.every["keep"], config.keep_best)
    checkpoints = Checkpoints(job.config.run.dir, job.runtime, retention)
    return Saving(checkpoints, times, book, job.engine, job.state, job.extras, job.resumed_from is not None)


def _announce(job: Job, times: Timetable, book: Book) -> None:
    cooling = times.schedule.cooled(job.state.samples_seen)
    if job.resumed_from and 0 < cooling < 1:
        book.note(f"resumed within the cooldown, {cooling:.0%} of it done by train.duration")
    for line in job.stream.describe():
        book.note(line)
    book.say(RUNNING)


def _reason(stop: StopRequest) -> str:
    """Why one of the ranks was asked to stop, or ''. All ranks must call it."""
    return next(filter(None, gather(stop.reason)), "")


def _batches(job: Job, times: Timetable, profiler: StepProfiler) -> Iterator[tuple[Batch, float]]:
    """(batch, seconds waited for it) from the run's step to its last; none where the run is complete."""
    stream = iter(job.stream.iterate(job.state.step))
    for step in range(job.state.step + 1, times.total + 1):
        profiler.before(step)
        before = time.perf_counter()
        heartbeat("waiting for data")
        with profiled("data"):
            batch = next(stream)
        yield batch, time.perf_counter() - before


def _update(job: Job, times: Timetable, faults: Faults, saving: Saving, status: Status, batch: Batch) -> OnHost | None:
    """Make a step; returns its rank-local losses by name. A non-finite loss or gradient leaves the step out on all
    ranks (None), or ends them, before the update."""
    state = job.state
    heartbeat("a training step")
    seed_step(job.config.seed, state.step, job.runtime.rank)
    losses = OnHost(job.forward_backward(batch))  # on the host in time: the update waits for the gradients
    kept = True
    try:
        with profiled("optimizer"):
            job.engine.update(times.lr(state.samples_seen))
    except NonFiniteError as error:
        if not faults.may_skip:
            saving.wait()  # what is in the making holds an earlier step, a good one
            keys = job.diagnose(batch)
            raise explain(error, state.step + 1, losses.read()["loss"], keys, status.checkpoint) from None
        faults.skip(error, batch, losses.read()["loss"])
        kept = False
    state.step += 1
    state.samples_seen += times.batch
    state.position = job.stream.position(state.step).to_dict()
    status.step = state.step
    return losses if kept else None


def _evaluate(job: Job, book: Book, batch: Batch) -> dict[str, float]:
    """Evaluate and write it down, with a few of the batch's pairs; returns the metrics."""
    with book.paused("an evaluation"):
        values = job.evaluate()
        shown = job.config.log.images
        pictures = batch.inputs["image"]["pixels"][:shown] if batch.captions and "image" in batch.inputs else None
        book.evaluated(values, pictures, batch.captions[:shown])
    return values


def _end(job: Job, times: Timetable, book: Book, writes: Writes, status: Status, stop: str) -> int:
    """The last word of a run whose last checkpoint is committed; returns the exit code."""
    step = job.state.step
    complete = step >= times.total  # more: a longer run was resumed as a shorter one
    writes.raise_faults(status.checkpoint)
    book.say(DONE if complete else STOPPED, stop)
    writes.raise_faults(status.checkpoint)
    book.note(f"{'done' if complete else f'stopped ({stop})'} at step {step}: {status.checkpoint}")
    return EXIT_DONE if complete else EXIT_STOPPED


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a model draws in a step from (seed, step, rank): then a checkpoint needs no generator states."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4096 + rank) % 2**63)
