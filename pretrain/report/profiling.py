"""`profile.steps`: a torch profiler trace of some steps, and one page that says where their time went.

The parts of a step are marked where they happen (`profiled`), which costs nothing while no profiler runs. Their seconds
are those of the clock; on a GPU, whose work is only queued, the device is waited for at the edges of each part
meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.config.durations import parse_steps
from pretrain.process.runtime import Runtime
from pretrain.report.writes import Writes

PARTS = ("data", "forward", "loss", "backward", "optimizer")
_MARK = "dualstream."
_COLLECTIVES = ("gloo:", "ncclDevKernel")
_TOP = 12  # operators on the page


class _Clock:
    """Seconds by part; where one stands inside another, the inner one's are its own alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._since = self._now()

    def turn(self, name: str | None) -> None:
        """Enter the part `name`, or with None leave the one that is open."""
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        if name is None:
            self._open.pop()
        else:
            self._open.append(name)
        self._since = now

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


_clock: _Clock | None = None  # while a profiler runs


@contextlib.contextmanager
def profiled(name: str) -> Iterator[None]:
    """The time spent in this context is that of the part `name` of PARTS."""
    clock = _clock
    if clock is None:
        yield
        return
    with record_function(_MARK + name):
        clock.turn(name)
        try:
            yield
        finally:
            clock.turn(None)


class StepProfiler:
    """Profiles rank 0 in the steps of `profile.steps`, counted from 1, and writes `profile-FIRST-LAST.{json.gz,txt}`
    into the run folder; on other ranks, and without that setting, it does nothing."""

    def __init__(self, steps: str | None, run_dir: str, runtime: Runtime, note: Callable[[str], None], writes: Writes):
        self._first, self._last = parse_steps(steps, "profile.steps") if steps and runtime.is_main else (0, -1)
        self._run_dir, self._runtime, self._note = Path(run_dir), runtime, note
        self._writes = writes
        self._profile: profile | None = None
        self._started, self._start = 0.0, 0

    def before(self, step: int) -> None:
        """Called before the data of `step` is waited for."""
        global _clock
        if self._profile is not None or not self._first <= step <= self._last:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it speaks on stderr, also of no GPUs
        gpu = [ProfilerActivity.CUDA] if self._runtime.device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profile.start()
        _clock = _Clock()
        self._started, self._start = time.perf_counter(), step

    def after(self, step: int, stopping: bool) -> None:
        """Called when `step` is done; ends the profile after its last one, and where the run stops."""
        if self._profile is None or (step < self._last and not stopping):
            return
        seconds, running, clock = time.perf_counter() - self._started, self._profile, _clock
        self.close()
        trace = self._run_dir / f"profile-{self._start}-{step}.json.gz"
        with self._writes.to(trace):
            running.export_chrome_trace(str(trace))
        spent = clock.seconds if clock else {}
        page = breakdown(running.key_averages(), spent, seconds, step - self._start + 1, str(self._runtime))
        text = self._run_dir / f"profile-{self._start}-{step}.txt"
        with self._writes.to(text):
            text.write_text(page)
        self._note(f"{page}trace: {trace} (open it in ui.perfetto.dev)")

    def close(self) -> None:
        """End the profile if one runs; what it has seen is written by `after` alone."""
        global _clock
        if self._profile is not None:
            self._profile.stop()
        self._profile = _clock = None


def breakdown(events: Sequence[Any], spent: dict[str, float], seconds: float, steps: int, where: str) -> str:
    """The page: the seconds `spent` by part, and of the profiler's averages the collectives and the costliest operators
    (on a GPU its kernels), over `steps` steps that took `seconds`."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    listed = kernels or [event for event in events if not event.key.startswith(_MARK)]
    rest = {"the rest": max(0.0, seconds - sum(spent.values()))}
    lines = [f"{steps} steps of rank 0 of {where}: {seconds / steps:.4f} s a step, under the profiler"]
    lines += [_line(name, value, seconds, steps) for name, value in (spent | rest).items()]
    whole = [(event, _seconds(event, "total")) for event in listed if event.key.startswith(_COLLECTIVES)]
    lines.append("in collectives, of these or beside them:")
    lines.append(_line("all", sum(value for _, value in whole), seconds, steps))
    lines += _ranked(whole, seconds, steps)
    lines.append("kernels:" if kernels else "operators, without what they call:")
    lines += _ranked([(event, _seconds(event, "own")) for event in listed], seconds, steps)[:_TOP]
    return "\n".join(lines) + "\n"


def _ranked(events: list[tuple[Any, float]], seconds: float, steps: int) -> list[str]:
    ranked = sorted(events, key=lambda pair: -pair[1])
    return [_line(event.key, value, seconds, steps) + f"  {event.count / steps:g} a step" for event, value in ranked]


def _line(name: str, value: float, seconds: float, steps: int) -> str:
    return f"  {name[:40]:<40} {value / steps:9.4f} s  {value / seconds:6.1%}"


def _seconds(event: Any, kind: str) -> float:
    device = "device" if event.device_type == DeviceType.CUDA else "cpu"
    return getattr(event, f"{device}_time_total" if kind == "total" else f"self_{device}_time_total") / 1e6
