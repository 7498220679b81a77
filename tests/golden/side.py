"""One side of a comparison: `python side.py ROOT JOBS.json` trains the jobs with the code in ROOT, of any version.

It knows nothing of that code but its scripts in launch/ and that they train by DeepSpeed's engine: steps are told apart
by the ends of `DeepSpeedEngine.step`. Every rank is forked from this process, which has imported what is slow.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # the first engine imports it, and with it the compiler
import open_clip  # noqa: F401
import torch
import torch.utils.tensorboard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

COUNTED, PROFILED = 5, (6, 8, 9)  # steps, from 1, behind which no epoch ends: of operations, and of memory
_MINUTES = 5  # that a job may take


class _Operations(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher, and the bytes that collectives are given."""

    def __init__(self) -> None:
        super().__init__()
        self.aten: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.collective_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            self.collectives[name] += 1
            self.collective_bytes += sum(tensor.nbytes for tensor in _tensors(args))
        else:
            self.aten[name] += 1
        return func(*args, **(kwargs or {}))


class _Meter:
    """What one training step takes; `stepped` is called as each ends."""

    def __init__(self) -> None:
        self.step, self.found = 0, {}
        self._operations = _Operations()
        self._profile: profile | None = None

    def stepped(self) -> None:
        self.step += 1
        if self.step == COUNTED - 1:
            self._operations.__enter__()
        elif self.step == COUNTED:
            self._operations.__exit__(None, None, None)
            counted = self._operations
            self.found["aten"] = dict(sorted(counted.aten.items()))
            self.found["collectives"] = dict(sorted(counted.collectives.items()))
            self.found["collective_bytes"] = counted.collective_bytes
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            # The least of some: gloo's thread may let go of a reduced buffer late, and then unseen.
            peak = _peak(self._profile)
            self.found["peak_bytes"] = min(peak, self.found.get("peak_bytes", peak))
            self._profile = None
        if self.step + 1 in PROFILED:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, list | tuple) else []


def _peak(watched: profile) -> int:
    """The most bytes above those at the start that tensors held at one time."""
    events = watched.profiler.kineto_results.events()
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in memory:
        held += change
        most = max(most, held)
    return most


def _rank(root: Path, job: dict, rank: int, port: int) -> NoReturn:
    code = 1
    try:
        signal.alarm(60 * _MINUTES)
        if job["ranks"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
        output = os.open(f"{job['log']}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = _train(root, job, rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(root: Path, job: dict, rank: int) -> int:
    meter, step = _Meter(), deepspeed.DeepSpeedEngine.step

    def metered(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        meter.stepped()
        return result

    deepspeed.DeepSpeedEngine.step = metered
    sys.argv = [f"{job['job']}.py", "--config", job["config"]]
    try:
        runpy.run_path(str(root / "launch" / f"{job['job']}.py"), run_name="__main__")
    except SystemExit as ended:
        assert Path(sys.modules["pretrain"].__file__).is_relative_to(root), "another tree's code was imported"
        if rank == 0:
            Path(job["counts"]).write_text(json.dumps(meter.found))
        return ended.code if isinstance(ended.code, int) else 1
    return 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Train the jobs one after the other; each rank's words go to a file. Prints the names of those that failed."""
    root, jobs = Path(sys.argv[1]).resolve(), json.loads(Path(sys.argv[2]).read_text())
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one thread a rank, so that sums are taken in one order
    torch.set_num_threads(1)
    for job in jobs:
        port, ranks = _free_port(), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                _rank(root, job, rank, port)
            ranks.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in ranks]
        if any(codes):
            print(job["name"], flush=True)


if __name__ == "__main__":
    main()
