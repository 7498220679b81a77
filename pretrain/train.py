"""The training loop. A job (pretraining.py, finetune/) brings the model, the stream and the evaluation."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from data_tools.errors import UserError
from pretrain.assemble import claim_run_dir
from pretrain.config.durations import ENDLESS, duration_steps
from pretrain.config.tree import Config
from pretrain.engine.checkpoint import Checkpoints, Extras, Saved
from pretrain.engine.committed import Retention
from pretrain.engine.engine import Engine, NonFiniteError
from pretrain.engine.schedule import Schedule
from pretrain.engine.state import TrainState
from pretrain.loop.ledger import Ledger
from pretrain.process.agree import agree, gather, together
from pretrain.process.entry import EXIT_DONE, EXIT_STOPPED
from pretrain.process.lifeline import Lifeline
from pretrain.process.runtime import OnHost, Runtime, finish, start
from pretrain.process.status import DONE, FILE, RUNNING, STOPPED
from pretrain.process.watch import Watch
from pretrain.process.watchdog import beat
from pretrain.report.journal import Journal, spike
from pretrain.report.metrics import DataWatch, Metrics, starvation_advice
from pretrain.report.profiling import StepProfiler, part
from pretrain.report.writes import Writes
from pretrain.stream.batches import Batch
from pretrain.stream.loader import TrainStream


class Job(Protocol):
    """What the loop needs of a job."""

    config: Config
    runtime: Runtime
    engine: Engine
    stream: TrainStream
    state: TrainState
    extras: Extras
    resumed_from: Path | None

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of the global batch; returns the rank-local loss, detached. All ranks call it."""

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
    run = Run(job, life)
    try:
        stop = run.stop_before_training()
        for batch, waited in run.batches() if not stop else ():
            loss = run.step(batch)
            stop = run.account(batch, loss, waited)
            if run.due("eval"):
                run.evaluate(batch)
            if stop or run.save_due():
                run.save()
            if stop:
                break
        return run.end(stop)
    except BaseException as error:
        cause = run.watch.explain(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        run.close()


class Run:
    """The pieces of the loop above; each method is collective."""

    def __init__(self, job: Job, life: Lifeline):
        config, state = job.config, job.state
        self.job, self.status, self.stop = job, life.status, life.stop
        self._saved_step = state.step if job.resumed_from else None  # of the last save, committed or in the making
        self._stall, self._values = 0.0, {}  # seconds the last save stopped training; this step's evaluation
        self.total_steps = run_steps(config, job.stream)
        self.schedule = make_schedule(config, job.stream)
        self._every = self._intervals()
        retention = Retention(config.checkpoint.keep, self._every["keep"], config.checkpoint.keep_best)
        self.checkpoints = Checkpoints(config.run.dir, job.runtime, retention)
        end = None if self.total_steps == ENDLESS else self.total_steps
        self.status.step, self.status.steps, self.status.checkpoint = state.step, end, job.resumed_from
        self.writes = Writes()
        self._open(end)
        self.ledger = Ledger(job.stream, state, self.metrics)
        cooling = self.schedule.cooled(state.samples_seen)
        if job.resumed_from and 0 < cooling < 1:
            self.metrics.note(f"resumed within the cooldown, {cooling:.0%} of it done by train.duration")
        for line in job.stream.describe():
            self.metrics.note(line)
        self.data_watch = DataWatch()
        self._since = Interval(time.perf_counter(), state.samples_seen, 0.0)
        self._status(RUNNING)
        self.stop.heed()
        self.watch = Watch(job.runtime, self.status, config.guard.hang_timeout)

    def _open(self, end: int | None) -> None:
        """The files of the run; where they cannot be opened, all ranks raise."""
        config, state, runtime = self.job.config, self.job.state, self.job.runtime
        folder = Path(config.run.dir)

        def open_all() -> None:
            if runtime.is_main:  # now, not at the first save, which may be hours away
                self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            self.metrics = Metrics(folder, runtime.is_main, end, state.step, self.writes)
            self.skips = Journal(folder / "skipped.jsonl", runtime, state.step, self.writes)
            self.spikes = Journal(folder / "spikes.jsonl", runtime, state.step, self.writes)

        together(open_all, f"opening the files of run.dir {folder}")
        self.profiler = StepProfiler(config.profile.steps, folder, runtime, self.metrics.note, self.writes)

    def stop_before_training(self) -> str:
        """The reason to stop that came while the ranks got ready for the first step, or ''."""
        return next(filter(None, gather(self.stop.reason)), "")

    def batches(self) -> Iterator[tuple[Batch, float]]:
        """(batch, seconds waited for it) from the run's step to its last; none where the run is complete."""
        remaining = self.total_steps - self.job.state.step
        stream = iter(self.job.stream.iterate(self.job.state.step))
        for _ in range(remaining):
            self.profiler.before(self.job.state.step + 1)
            before = time.perf_counter()
            beat("waiting for data")
            with part("data"):
                batch = next(stream)
            yield batch, time.perf_counter() - before

    def step(self, batch: Batch) -> OnHost | None:
        """One update; returns the rank-local loss. A non-finite loss or gradient leaves the step out on all ranks
        (None), or ends them, before the update."""
        job, state = self.job, self.job.state
        beat("a training step")
        self._values = {}
        seed_step(job.config.seed, state.step, job.runtime.rank)
        loss: OnHost | None = OnHost(job.forward_backward(batch))  # here in time: the update waits for the gradients
        try:
            with part("optimizer"):
                job.engine.update(self.schedule.lr(state.samples_seen, batch_of(job.config)))
        except NonFiniteError as error:
            if state.skipped >= job.config.guard.max_skipped:
                raise self._explain(error, batch, loss) from None
            self._skip(error, batch, loss)
            loss = None
        state.step += 1
        state.samples_seen += batch_of(job.config)
        state.position = job.stream.position(state.step).to_dict()
        self.status.step = state.step
        return loss

    def account(self, batch: Batch, loss: OnHost | None, waited: float) -> str:
        """Count bad samples, watch the loss, log, agree on stopping and on the save under way; returns the reason to
        stop, or ''."""
        job, state = self.job, self.job.state
        own_loss = 0.0 if loss is None else float(loss)
        progress = self.checkpoints.progress()
        with self.writes.to("the list of bad samples or changed shards"):
            job.stream.check_writes()
        asked = self.stop.reason is not None
        bad, stopping, unwritten, total, *saving = agree(
            [len(batch.bad), asked, self.writes.failed, own_loss, *progress]
        )
        if unwritten:
            self.writes.settle(self.status.checkpoint)
        self._saved(self.checkpoints.advance(*saving))
        mean_loss = None if loss is None else total / job.runtime.world_size
        state.bad_samples += int(bad)
        self.ledger.check()
        self.ledger.settle(state.step == self.total_steps)
        if mean_loss is not None and job.config.guard.spike is not None:
            self._watch_loss(batch, own_loss, mean_loss)
        self._since.waited += waited
        if self.due("log"):
            self._log(mean_loss)
        self.profiler.after(state.step, bool(stopping) or state.step == self.total_steps)
        return next(filter(None, gather(self.stop.reason))) if stopping else ""

    def due(self, what: str) -> bool:
        """Whether log, eval, checkpoint or keep (a checkpoint that stays) falls on the current step."""
        step, every = self.job.state.step, self._every[what]
        return every is not None and (step % every == 0 or (what in ("log", "eval") and step == self.total_steps))

    def save_due(self) -> bool:
        """Whether a checkpoint of the current step is wanted: for its step, or for being the best evaluated one."""
        best = self.checkpoints.is_best(self._values)  # asked at every step: it keeps the record
        return best or self.due("checkpoint") or self.due("keep")

    def evaluate(self, batch: Batch) -> None:
        """Evaluate, record, and show a few of the batch's pairs."""
        started = time.perf_counter()
        beat("an evaluation")
        values = self._values = self.job.evaluate()
        if values:
            self.metrics.write("eval", self.job.state.step, self.job.state.samples_seen, values)
        shown = self.job.config.log.images
        if batch.captions:
            self.metrics.pictures(self.job.state.step, batch.images[:shown], batch.captions[:shown])
        self._since.started += time.perf_counter() - started  # evaluation is not training time

    def save(self) -> None:
        """Begin a checkpoint of this step; it is written while training goes on. Waits for the one before."""
        started = time.perf_counter()
        beat("saving a checkpoint")
        self._saved(self.checkpoints.wait())
        self.checkpoints.begin(self.job.engine, self.job.state, self.job.extras, self._values)
        self._saved_step, self._stall = self.job.state.step, time.perf_counter() - started
        self._since.started += self._stall

    def end(self, stop: str) -> int:
        """Leave a committed checkpoint of the last step and the final status; returns the exit code."""
        complete = self.job.state.step >= self.total_steps  # more: a longer run was resumed as a shorter one
        if self._saved_step != self.job.state.step:
            self.save()
        self._saved(self.checkpoints.wait())
        self.writes.settle(self.status.checkpoint)
        self._status(DONE if complete else STOPPED, stop)
        self.writes.settle(self.status.checkpoint)
        word, step = "done" if complete else f"stopped ({stop})", self.job.state.step
        self.metrics.note(f"{word} at step {step}: {self.status.checkpoint}")
        return EXIT_DONE if complete else EXIT_STOPPED

    def close(self) -> None:
        """Release the loader and the writers; from here on nobody watches this rank."""
        self.watch.close()
        self.checkpoints.close()
        self.job.stream.close()
        self.metrics.close()
        self.profiler.close()

    def _saved(self, saved: Saved | None) -> None:
        """Report a checkpoint that is committed now; its save may have begun some steps ago."""
        if saved is None:
            return
        self.status.checkpoint = saved.folder
        self._status(RUNNING)
        values = {
            "checkpoint_stall": self._stall,
            "checkpoint_bytes": saved.num_bytes,
            "checkpoint_seconds": saved.seconds,
        }
        self.metrics.write("checkpoint", saved.step, saved.samples_seen, values)

    def _log(self, loss: float | None) -> None:
        job, state, now = self.job, self.job.state, time.perf_counter()
        waited = agree([self._since.waited])[0] / job.runtime.world_size
        seconds = max(now - self._since.started, 1e-9)
        values = {} if loss is None else {"loss": loss, "grad_norm": job.engine.grad_norm}
        values |= {
            "lr": self.schedule.lr(state.samples_seen - batch_of(job.config), batch_of(job.config)),
            "samples_per_second": (state.samples_seen - self._since.samples) / seconds,
            "data_wait": min(1.0, waited / seconds),
            "bad_samples": state.bad_samples,
            "epoch": job.stream.mixture.epochs_at(state.step),
            "skipped_steps": state.skipped,
        }
        if len(job.stream.sources) > 1:
            values |= {f"share_{n}": share for n, share in enumerate(job.stream.mixture.shares(state.step).tolist())}
        values |= job.engine.scalars()
        self.metrics.write("train", state.step, state.samples_seen, values)
        self.status.seconds_left = self.metrics.seconds_left(state.step)
        self._status(RUNNING, durable=False)
        if self.data_watch.starves(values["data_wait"]):
            data, cores = job.config.data, len(os.sched_getaffinity(0))
            self.metrics.note(starvation_advice(values["data_wait"], data.workers, cores, data.scaled_decode))
        self._since = Interval(time.perf_counter(), state.samples_seen, 0.0)

    def _skip(self, error: NonFiniteError, batch: Batch, loss: OnHost) -> None:
        state, limit = self.job.state, self.job.config.guard.max_skipped
        state.skipped += 1
        self.skips.write({"step": state.step + 1, "epoch": batch.epoch}, float(loss), batch.keys)
        self.metrics.note(
            f"step {state.step + 1} left out on all ranks ({state.skipped} of {limit}): {error}; see skipped.jsonl"
        )

    def _watch_loss(self, batch: Batch, own_loss: float, loss: float) -> None:
        state = self.job.state
        found = spike(loss, state.recent_losses, self.job.config.guard.spike)
        if found is not None:
            expected, threshold = found
            row = {"step": state.step, "epoch": batch.epoch, "loss": loss, "expected": expected, "threshold": threshold}
            self.spikes.write(row, own_loss, batch.keys)
            text = f"loss {loss:.4g} where {expected:.4g} was expected, at most {threshold:.4g}"
            self.metrics.note(f"loss spike at step {state.step}: {text}; its samples are in spikes.jsonl")

    def _explain(self, error: NonFiniteError, batch: Batch, loss: OnHost) -> NonFiniteError:
        self._saved(self.checkpoints.wait())  # it holds an earlier step, a good one
        losses, keys = gather(float(loss)), gather(self.job.diagnose(batch))
        ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        samples = [f"{key} (rank {rank})" for rank, own in enumerate(keys) for key in own][:5]
        return NonFiniteError(
            f"step {self.job.state.step + 1} was stopped before its update: {error}",
            got=f"loss not finite on ranks {ranks or 'none'}"
            + (f", features not finite of samples {', '.join(samples)}" if samples else ", all features finite"),
            remedy=f"last good checkpoint: {self.status.checkpoint or 'none yet'}; look at the samples, lower optim.lr "
            "or set optim.grad_clip",
        )

    def _intervals(self) -> dict[str, int | None]:
        config, per_epoch = self.job.config, self.job.stream.steps_per_epoch
        save = config.checkpoint
        every = {"log": config.log.every, "eval": config.eval.every, "checkpoint": save.every, "keep": save.keep_every}
        steps = {
            name: None if text is None else duration_steps(text, name, per_epoch, batch_of(config))
            for name, text in every.items()
        }
        return {**steps, "eval": steps["eval"] or self.total_steps}

    def _status(self, state: str, reason: str = "", durable: bool = True) -> None:
        if self.job.runtime.is_main:
            with self.writes.to(self.status.folder / FILE):
                self.status.write(state, reason, durable)


@dataclass
class Interval:
    """Since the last logged step: when it ended (seconds), samples seen then, seconds waited for data since."""

    started: float
    samples: int
    waited: float


def batch_of(config: Config) -> int:
    """Samples of a step, over all ranks."""
    return config.train.global_batch


def run_steps(config: Config, stream: TrainStream) -> int:
    """Optimizer steps of the whole run; `ENDLESS` where it has no end."""
    return stream.steps_until(config.train.duration, "train.duration")


def make_schedule(config: Config, stream: TrainStream) -> Schedule:
    """The learning-rate schedule of the whole run, in samples."""
    optim = config.optim
    warmup, cooldown = (
        batch_of(config) * duration_steps(text, name, stream.steps_per_epoch, batch_of(config))
        for text, name in ((optim.warmup, "optim.warmup"), (optim.cooldown, "optim.cooldown"))
    )
    total = stream.mixture.samples_seen(run_steps(config, stream))
    if cooldown and warmup + cooldown > total:
        raise UserError(
            "optim.warmup and optim.cooldown are longer than the run",
            got=f"{warmup} and {cooldown} samples of {total}",
            remedy="shorten them, or set a longer train.duration",
        )
    return Schedule(optim.schedule, optim.lr, warmup, total, cooldown)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what a model draws in a step from (seed, step, rank): then a checkpoint needs no generator states."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4096 + rank) % 2**63)
