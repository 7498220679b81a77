"""One training by either trainer, as a process of its own, and the time of each of its steps.

A step's time is the same for both: from the end of the step before it to its own end, waiting for data included,
start-up, checkpoints and evaluation excluded. Both log every step; ours gives the times in metrics.jsonl, open_clip's
trainer prints samples per second.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError

_TRIAL_LIMIT = 3600.0  # seconds
REPO_ROOT = Path(__file__).resolve().parents[2]
_STEP_LINE = re.compile(r"Train Epoch: .*Batch \(t\): [0-9.]+, ([0-9.e+]+)/s.* Loss: ([0-9.einfa+-]+) ")


@dataclass(frozen=True)
class Trial:
    """A training that both can run. `shards`: tar paths; `source`: the same, as our `data.train` takes it; `model`: an
    open_clip architecture name or the absolute path of its JSON."""

    source: str
    shards: tuple[str, ...]
    model: str
    global_batch: int
    steps_per_epoch: int
    epochs: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.2
    warmup: int = 20  # steps
    workers: int = 1  # loader processes per rank
    seed: int = 0
    device: str = "cpu"
    save_epochs: bool = False  # weights after every epoch, not only after the last


@dataclass(frozen=True)
class Layout:
    """Processes, threads of each, and the precision that they compute in: fp32 or bf16."""

    ranks: int
    threads: int
    precision: str

    def __str__(self) -> str:
        return f"{self.ranks} x {self.threads}, {self.precision}"


@dataclass(frozen=True)
class Outcome:
    """What a training did. `folder` holds its logs and weights."""

    trainer: str
    layout: Layout
    folder: Path
    step_seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def samples_per_second(self, global_batch: int, skip: int) -> float:
        """Samples over seconds of all steps but the first `skip`."""
        steady = self.step_seconds[skip:]
        return global_batch * len(steady) / sum(steady)


def run_ours(trial: Trial, layout: Layout, folder: Path, limit: float) -> Outcome:
    """Train with this project in `folder` (emptied of nothing: it must be new); `limit` in seconds."""
    config = folder / "config.yaml"
    folder.mkdir(parents=True)
    config.write_text(json.dumps(_our_settings(trial, layout, folder), indent=2))  # JSON is YAML
    script = str(REPO_ROOT / "launch" / "pretrain.py")
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(layout.ranks)]
    launcher += ["--master_port", str(free_port())]  # another run on this machine may have the default one
    command = [sys.executable, *(launcher if layout.ranks > 1 else []), script]
    run_logged("training by dualstream", [*command, "--config", str(config)], {}, folder, limit)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    ends = [0.0] + [line["seconds"] for line in steps]
    seconds = tuple(end - start for start, end in itertools.pairwise(ends))
    return _checked(trial, Outcome("dualstream", layout, folder, seconds, tuple(line["loss"] for line in steps)))


def run_open_clip(trial: Trial, layout: Layout, folder: Path, limit: float, python: Path) -> Outcome:
    """Train with open_clip's trainer under `python`, the interpreter of its environment; `limit` in seconds."""
    folder.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(layout.ranks), "--standalone", "--"]
    script = str(Path(__file__).with_name("open_clip_main.py"))
    command = [str(python), *(launcher if layout.ranks > 1 else []), script, *_their_arguments(trial, layout, folder)]
    run_logged("training by open_clip", command, {"OMP_NUM_THREADS": str(layout.threads)}, folder, limit)
    found = _STEP_LINE.findall((folder / "run" / "out.log").read_text())
    seconds = tuple(trial.global_batch / float(rate) for rate, _ in found)
    return _checked(trial, Outcome("open_clip", layout, folder, seconds, tuple(float(loss) for _, loss in found)))


def _our_settings(trial: Trial, layout: Layout, folder: Path) -> dict:
    return {
        "seed": trial.seed,
        "run": {"dir": str(folder / "run"), "resume": "never"},
        "data": {"train": [{"urls": trial.source}], "workers": trial.workers},
        "model": {"name": trial.model},
        "optim": {
            "lr": trial.lr,
            "weight_decay": trial.weight_decay,
            "decay_embeddings": True,  # as open_clip's trainer does
            "warmup": f"{trial.warmup} steps",
        },
        "train": {
            "duration": f"{trial.epochs * trial.steps_per_epoch} steps",
            "global_batch": trial.global_batch,
            "precision": layout.precision,
        },
        "checkpoint": {
            "every": f"{trial.steps_per_epoch} steps" if trial.save_epochs else None,
            "keep": max(2, trial.epochs),
        },
        "log": {"every": "1 steps", "images": 0},
    }


def _their_arguments(trial: Trial, layout: Layout, folder: Path) -> list[str]:
    """The recipe of `_our_settings` in open_clip's words, with its exact distributed loss."""
    options = {
        "train-data": "::".join(trial.shards),
        "dataset-type": "webdataset",
        "train-num-samples": trial.steps_per_epoch * trial.global_batch,
        "epochs": trial.epochs,
        "batch-size": trial.global_batch // layout.ranks,
        "precision": "amp_bf16" if layout.precision == "bf16" else "fp32",
        "lr": trial.lr,
        "wd": trial.weight_decay,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "warmup": trial.warmup,
        "workers": trial.workers,
        "seed": trial.seed,
        "device": trial.device,
        "log-every-n-steps": 1,
        "save-frequency": int(trial.save_epochs),  # the last epoch is always saved
        "logs": folder,
        "name": "run",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [trial.model, *words, "--local-loss", "--gather-with-grad"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_logged(name: str, command: list[str], variables: dict[str, str], folder: Path, limit: float) -> None:
    """Run `command`, its output in output.log of `folder`; UserError where it fails or outlasts `limit` seconds."""
    log = folder / "output.log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | variables
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
                process.wait()
    if code != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        ended = f"exit code {code}" if code is not None else f"no end after {limit:.0f} s"
        raise UserError(f"the {name} failed", got=f"{ended}, last line: {last}", remedy=f"see {log}")


def run_trial(
    module: str, trial: Any, folder: Path, ranks: int = 1, variables: Mapping[str, str] | None = None
) -> dict:
    """The figures of `trial`, a dataclass, from processes of its own that run `launch.benchmark.<module>`."""
    folder.mkdir(parents=True)
    result = folder / "result.json"
    words = ["-m", f"launch.benchmark.{module}", json.dumps(dataclasses.asdict(trial)), str(result)]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
    environment = {"PYTHONPATH": str(REPO_ROOT), **(variables or {})}
    run_logged(module.replace("_", " "), [sys.executable, *words], environment, folder, _TRIAL_LIMIT)
    return json.loads(result.read_text())


def _checked(trial: Trial, outcome: Outcome) -> Outcome:
    expected = trial.epochs * trial.steps_per_epoch
    if len(outcome.step_seconds) != expected or not all(map(math.isfinite, outcome.losses)):
        raise UserError(
            f"the training by {outcome.trainer} is not what was asked for",
            got=f"{len(outcome.step_seconds)} logged steps, last loss {outcome.losses[-1] if outcome.losses else None}",
            expected=f"{expected} steps and finite losses",
            remedy=f"see {outcome.folder / 'output.log'}",
        )
    return outcome
