"""Sections of settings about a run itself: where it lives, when it saves, what it writes, what it does about faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config.declare import Fault, Parsed, Section, Waiting, choice, number, setting, span
from pretrain.config.durations import parse_steps


@dataclass(frozen=True)
class RunConfig(Section):
    """Where the run lives."""

    dir: str = "???"  # folder of checkpoints, metrics and status; hosts must share its file system
    # auto: continue from the newest intact checkpoint in run.dir | never: refuse a folder that holds one.
    resume: str = choice("auto", "never")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When to save, besides the end and a signal, and which committed checkpoints stay."""

    every: str | None = span("1 epoch")  # how often to save; null: only at the end
    # Newest checkpoints that stay.
    keep: int = number(2, ge=2, le=10**6, remedy="one spare is needed for the day the newest is damaged")
    keep_every: str | None = span(None)  # save at every multiple of this duration too, and never delete those
    keep_best: str | None = None  # metric of the evaluation, -NAME where lower is better: save and keep the best one

    def check(self) -> Iterator[Fault]:
        """A loss is better where it is lower."""
        best = self.keep_best
        if best is not None and best.endswith("loss") and not best.startswith("-"):
            rule = "a metric of which more is better, or - and one of which less is"
            yield Fault("keep_best", rule, "put a minus before a loss: checkpoint.keep_best=-validation_loss")


@dataclass(frozen=True)
class LogConfig(Section):
    """What is written while a run goes on."""

    every: str = span("10 steps")  # how often scalars go to metrics.jsonl and TensorBoard
    images: int = number(4, ge=0, le=1000)  # captioned pictures in TensorBoard at every evaluation


@dataclass(frozen=True)
class GuardConfig(Section):
    """What a run does about faults."""

    # Steps of the whole run whose loss or gradient is not finite that are left out on all ranks and listed in
    # skipped.jsonl; one more ends the run.
    max_skipped: int = number(0, ge=0, le=10**9, remedy="0 ends the run at the first")
    # A loss this many deviations above the recent ones is listed in spikes.jsonl and changes nothing; null: no watch.
    spike: float | None = number(6.0, gt=0, le=1e6, remedy="null switches the watch off")
    # A rank that makes no progress for so long (seconds, minutes, hours) prints its stacks and ends the run; null:
    # never.
    hang_timeout: str | None = setting(
        "20 minutes", Waiting(1500, "25 minutes", "collectives end by themselves after 30 minutes, without stacks")
    )


@dataclass(frozen=True)
class ProfileConfig(Section):
    """A look at single steps."""

    # FIRST-LAST, counted from 1: a profiler trace of these steps on rank 0, and a page on where their time went, in the
    # run folder; null: none.
    steps: str | None = setting(None, Parsed(parse_steps, "a range of steps"))
