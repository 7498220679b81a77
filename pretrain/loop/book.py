"""What a run writes down of itself as it goes on: metrics, the account of its samples, and how far it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from pretrain.config.tree import ImageDataConfig
from pretrain.engine.checkpoint import Saved
from pretrain.engine.state import TrainState
from pretrain.loop.ledger import Ledger
from pretrain.process.collectives import all_reduce_sum
from pretrain.process.runtime import Runtime
from pretrain.process.status import FILE, RUNNING, Status
from pretrain.process.watchdog import heartbeat
from pretrain.report.metrics import DataWatch, Metrics, starvation_advice
from pretrain.report.writes import Writes
from pretrain.stream.loader import TrainStream


class Measured(Protocol):
    """What is logged of an engine. All ranks must call `scalars`."""

    @property
    def grad_norm(self) -> float:
        """Of the last update."""

    def scalars(self) -> dict[str, float]:
        """Of the model, by name."""


class Book:
    """Metrics, status.json and the ledger of one run, on every rank; rank 0 writes. Its methods are collective."""

    def __init__(
        self,
        runtime: Runtime,
        stream: TrainStream,
        state: TrainState,
        data: ImageDataConfig,
        status: Status,
        metrics: Metrics,
        writes: Writes,
    ):
        self._runtime, self._stream, self._state, self._data = runtime, stream, state, data
        self._status, self._metrics, self._writes = status, metrics, writes
        self._ledger = Ledger(stream, state, metrics)
        self._interval = Interval(state.samples_seen)
        self._data_watch = DataWatch()

    def say(self, state: str, reason: str = "", durable: bool = True) -> None:
        """Write status.json; see `Status.write`."""
        if self._runtime.is_main:
            with self._writes.to(self._status.folder / FILE):
                self._status.write(state, reason, durable)

    def note(self, text: str) -> None:
        """Print a line above the progress."""
        self._metrics.note(text)

    def count(self, bad: int, waited: float, last: bool) -> None:
        """Enter a step: how many samples of all ranks were `bad`, how many seconds this rank `waited` for data, whether
        it was the `last` of the run. Raises UserError on all ranks where too many are bad, or samples are missing."""
        self._state.bad_samples += bad
        self._interval.waited += waited
        self._ledger.check()
        self._ledger.close_epoch(last)

    def log(self, losses: Mapping[str, float], lr: float, engine: Measured) -> None:
        """Write down the steps since the last call: of the last one the `lr` and the means over all ranks of `loss`
        and, where it is a sum of several, of its objectives by name (none: the step was left out)."""
        state, mixture = self._state, self._stream.mixture
        pace = self._interval.close(state.samples_seen, self._runtime.world_size)
        several = len(losses) > 2
        values = {n if n == "loss" else f"loss_{n}": value for n, value in losses.items() if several or n == "loss"}
        if values:
            values["grad_norm"] = engine.grad_norm
        values |= {"lr": lr, **pace, "bad_samples": state.bad_samples, "epoch": mixture.epochs_at(state.step)}
        values["skipped_steps"] = state.skipped
        if len(self._stream.sources) > 1:
            values |= {f"share_{n}": share for n, share in enumerate(mixture.shares(state.step).tolist())}
        values |= engine.scalars()
        self._metrics.write("train", state.step, state.samples_seen, values)
        self._status.seconds_left = self._metrics.seconds_left(state.step)
        self.say(RUNNING, durable=False)
        if self._data_watch.starves(pace["data_wait"]):
            workers, cores = self._data.workers, len(os.sched_getaffinity(0))
            self.note(starvation_advice(pace["data_wait"], workers, cores, self._data.scaled_decode))
        self._interval = Interval(state.samples_seen)

    def evaluated(self, values: Mapping[str, float], images: torch.Tensor | None, captions: list[str]) -> None:
        """Write down an evaluation, and show some `images` `[n, 3, h, w]` of the step's batch with their captions."""
        if values:
            self._metrics.write("eval", self._state.step, self._state.samples_seen, values)
        if images is not None:
            self._metrics.pictures(self._state.step, images, captions)

    def committed(self, saved: Saved, stall: float) -> None:
        """Write down a checkpoint; its save, which stopped the training for `stall` seconds, may have begun some steps
        ago."""
        self._status.checkpoint = saved.folder
        self.say(RUNNING)
        values = {
            "checkpoint_stall": stall,
            "checkpoint_bytes": saved.num_bytes,
            "checkpoint_seconds": saved.seconds,
        }
        self._metrics.write("checkpoint", saved.step, saved.samples_seen, values)

    @contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """The time of this context is not training time: it does not slow the logged samples per second down."""
        started = time.perf_counter()
        heartbeat(phase)
        yield
        self._interval.started += time.perf_counter() - started

    def close(self) -> None:
        """Release the files."""
        self._metrics.close()


class Interval:
    """The time since the last logged step: when it `started`, and how many seconds this rank `waited` for data."""

    def __init__(self, samples_seen: int):
        self.started, self.waited = time.perf_counter(), 0.0
        self._samples_seen = samples_seen

    def close(self, samples_seen: int, world_size: int) -> dict[str, float]:
        """The pace, and the share of the time that the ranks waited for data, on average. All ranks must call it."""
        now = time.perf_counter()
        waited = all_reduce_sum([self.waited])[0] / world_size
        seconds = max(now - self.started, 1e-9)
        return {
            "samples_per_second": (samples_seen - self._samples_seen) / seconds,
            "data_wait": min(1.0, waited / seconds),
        }
