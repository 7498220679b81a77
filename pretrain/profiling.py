"""`profile.steps`: a torch profiler trace of some steps, and one page that says where their time went.

The parts of a step are marked where they happen (`part`), which costs next to nothing while no profiler runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.rules import parse_steps
from pretrain.runtime import Runtime

PARTS = ("data", "forward", "loss", "backward", "optimizer")
_MARK = "dualstream."
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel")
_TOP = 12  # operators on the page


def part(name: str) -> record_function:
    """A context in which the time is that of the part `name` of PARTS."""
    return record_function(_MARK + name)


class StepProfiler:
    """Profiles rank 0 in steps `first` to `last` of `profile.steps` and writes `profile-FIRST-LAST.{json.gz,txt}` into
    the run folder; on other ranks, and without that setting, it does nothing."""

    def __init__(self, steps: str | None, run_dir: str, runtime: Runtime, note: Callable[[str], None]):
        self._range = parse_steps(steps, "profile.steps") if steps and runtime.is_main else None
        self._run_dir, self._runtime, self._note = Path(run_dir), runtime, note
        self._profile: profile | None = None
        self._started, self._first, self._last = 0.0, 0, 0

    def before(self, step: int) -> None:
        """Called before the data of `step`, counted from 1, is waited for."""
        if self._range is None:
            return
        first, last = self._range
        if self._profile is not None and step > last:
            self.close()
        elif self._profile is None and first <= step <= last:
            gpu = [ProfilerActivity.CUDA] if self._runtime.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
            self._started, self._first = time.perf_counter(), step
        self._last = step

    def close(self) -> None:
        """End the profile if one runs, and write what it has seen."""
        running, self._profile = self._profile, None
        if running is None:
            return
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        running.stop()
        self._range = None
        name = f"profile-{self._first}-{self._last}"
        trace = self._run_dir / f"{name}.json.gz"
        running.export_chrome_trace(str(trace))
        page = breakdown(running.key_averages(), seconds, self._last - self._first + 1, str(self._runtime))
        (self._run_dir / f"{name}.txt").write_text(page)
        self._note(f"{page}trace: {trace} (open it in ui.perfetto.dev)")


def breakdown(events: Sequence[Any], seconds: float, steps: int, where: str) -> str:
    """The page, from the profiler's averages over `steps` steps that took `seconds`."""
    by_name = {event.key: event for event in events}
    on_gpu = any(event.device_time_total for event in events)
    spent = {name: _seconds(by_name.get(_MARK + name), on_gpu) for name in PARTS}
    spent["the rest"] = max(0.0, seconds - sum(spent.values()))
    lines = [f"{steps} steps of rank 0 of {where}: {seconds / steps:.4f} s a step, under the profiler"]
    lines += [_line(name, value, seconds, steps) for name, value in spent.items()]
    collectives = [event for event in events if event.key.startswith(_COLLECTIVES)]
    inside = sum(_seconds(event, on_gpu) for event in collectives)
    lines.append("of these, in collectives, which may run beside others:")
    lines.append(_line("all", inside, seconds, steps))
    lines += [
        _line(event.key, _seconds(event, on_gpu), seconds, steps) + f"  {event.count / steps:g} calls a step"
        for event in sorted(collectives, key=lambda event: -_seconds(event, on_gpu))
    ]
    lines.append("operators by their own time:")
    own = [(event, _own_seconds(event, on_gpu)) for event in events if not event.key.startswith(_MARK)]
    lines += [
        _line(event.key, value, seconds, steps) + f"  {event.count / steps:g} calls a step"
        for event, value in sorted(own, key=lambda pair: -pair[1])[:_TOP]
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, value: float, seconds: float, steps: int) -> str:
    return f"  {name[:40]:<40} {value / steps:9.4f} s  {value / seconds:6.1%}"


def _seconds(event: Any, on_gpu: bool) -> float:
    if event is None:
        return 0.0
    return (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6


def _own_seconds(event: Any, on_gpu: bool) -> float:
    return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
