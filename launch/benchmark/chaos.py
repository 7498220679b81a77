"""`benchmark.py chaos`: a run whose ranks are killed at random, restarted each time with another number of ranks, and
whether its losses are those of a run that nothing disturbed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_tools.errors import UsageError, UserError
from launch.benchmark.report import show_table, write_report
from launch.benchmark.train import resolved_precision
from launch.benchmark.trainers import REPO_ROOT, free_port
from pretrain.config.batch import check_world_size
from pretrain.config.reading import load_config
from pretrain.engine.committed import FOLDER, newest_intact, step_of
from pretrain.tasks import ContrastiveConfig

TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}  # relative, of the loss, between world sizes, while training is calm
_ROOM = 10  # times what rounding alone does
_SCRIPT = str(REPO_ROOT / "launch" / "pretrain.py")
_LIMIT = 1800.0  # seconds without the awaited step
_GRACE = 60.0  # seconds that a launcher gets to end the ranks that are left


def run_chaos(args: argparse.Namespace) -> int:
    """Disturb one run, leave two alone, compare; returns the exit code."""
    try:  # before anything is run: it needs a package of its own
        from launch.benchmark.chaos_picture import draw
    except ModuleNotFoundError as error:
        remedy = "pip install -e '.[plot]'"
        raise UserError("the picture of this benchmark needs matplotlib", got=str(error), remedy=remedy) from None
    folder = args.work_dir.resolve() / time.strftime("chaos-%Y%m%d-%H%M%S")
    words = _words(args)
    config = load_config(ContrastiveConfig, args.config, [*words, f"run.dir={folder}"])
    for size in args.world_sizes:
        check_world_size(config.train.global_batch, size)
    precision = resolved_precision(config.train.precision)
    kills, lives = disturb(args, words, folder / "disturbed")
    first, other = args.world_sizes[0], next((n for n in args.world_sizes if n != args.world_sizes[0]), None)
    curves = {"disturbed": losses(folder / "disturbed"), "undisturbed": undisturbed(args, words, folder, first)}
    if other is not None:
        curves["control"] = undisturbed(args, words, folder, other)
    want = curves["undisturbed"]
    found = {name: gaps(curve, want, args.steps) for name, curve in curves.items() if curve is not want}
    allowed = most_allowed(found.get("control", {}), TOLERANCE[precision], args.steps)
    title = f"ZeRO stage {args.zero_stage}, {args.steps} steps"
    draw(folder / "chaos.png", want, lives, kills, found.get("control", {}), title)
    show_table("kills", ("after step", "rank", "of", "resumed from"), [tuple(kill.values()) for kill in kills])
    report = {"kind": "chaos", "config": str(args.config)}
    report |= {"settings": words, "precision": precision, "kills": kills, "losses": curves, "relative_gaps": found}
    write_report(folder / "report.json", report)
    print(f"picture: {folder / 'chaos.png'}")
    return judge(found["disturbed"], found.get("control"), allowed)


def judge(gap: dict[int, float], control: dict[int, float] | None, allowed: dict[int, float]) -> int:
    """Say how far the disturbed run's losses are from the undisturbed one's; UserError where they are too far."""
    print(f"largest relative difference of the loss: {max(gap.values()):.2e}", end="")
    print(f", without any kill between two world sizes: {max(control.values()):.2e}" if control else "")
    parted = next((step for step in sorted(gap) if gap[step] > allowed[step]), None)
    if parted is not None:
        raise UserError(
            f"the disturbed run left the other's curve at step {parted}",
            got=f"{gap[parted]:.2e}",
            expected=f"at most {allowed[parted]:.0e}, what rounding explains by then",
        )
    return 0


def undisturbed(args: argparse.Namespace, words: list[str], folder: Path, ranks: int) -> dict[int, float]:
    """The losses of a run that is left alone."""
    print(f"undisturbed: {ranks} ranks", flush=True)
    run_dir = folder / f"undisturbed-{ranks}"
    _Attempt(ranks, [*_command(args, words), f"run.dir={run_dir}"], run_dir).finish()
    return losses(run_dir)


def most_allowed(control: dict[int, float], tolerance: float, steps: int) -> dict[int, float]:
    """The difference that a step may show: training multiplies rounding, by as much as two world sizes part that nobody
    disturbs."""
    allowed, most = {}, tolerance
    for step in range(1, steps + 1):
        most = max(most, _ROOM * control.get(step, 0.0))
        allowed[step] = most
    return allowed


def disturb(args: argparse.Namespace, words: list[str], run_dir: Path) -> tuple[list[dict], list[dict]]:
    """Train in `run_dir` to the last step through `args.kills` kills.

    Returns the kills, and what each life of the run logged: its ranks and its losses by step.
    """
    rng = random.Random(args.seed)
    moments = sorted(rng.sample(range(args.save_every, args.steps - args.save_every), args.kills))
    sizes = itertools.cycle(args.world_sizes)
    kills: list[dict] = []
    lives: list[dict] = []
    for moment in [*moments, None]:
        size, resumed = next(sizes), _resume_step(run_dir)
        attempt = _Attempt(size, [*_command(args, words), f"run.dir={run_dir}"], run_dir)
        if moment is None:
            print(f"from step {resumed}: {size} ranks, to the end", flush=True)
            attempt.finish()
        else:
            rank = rng.randrange(size)
            print(f"from step {resumed}: {size} ranks, rank {rank} dies after step {moment}", flush=True)
            attempt.kill(rank, moment, rng.uniform(0, args.delay))
        logged = losses(run_dir)
        lives.append({"ranks": size, "losses": {step: loss for step, loss in logged.items() if step > resumed}})
        if moment is not None:
            died = max(logged, default=0)
            kills.append({"step": died, "rank": rank, "ranks": size, "resumed_from": _resume_step(run_dir)})
    return kills, lives


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step, as metrics.jsonl has it: a resume drops what its checkpoint does not know."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def gaps(got: dict[int, float], want: dict[int, float], steps: int) -> dict[int, float]:
    """The relative difference of each step; UserError where a step is missing from either."""
    for name, found in (("disturbed", got), ("undisturbed", want)):
        if sorted(found) != list(range(1, steps + 1)):
            raise UserError(f"the {name} run did not log every step once", got=len(found), expected=steps)
    return {step: abs(got[step] - want[step]) / abs(want[step]) for step in got}


def rank_processes(group: int) -> dict[int, int]:
    """Process id by rank, of the ranks that run in a process group."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or os.getpgid(int(entry.name)) != group:
                continue
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(word.split(b"=", 1) for word in (entry / "environ").read_bytes().split(b"\0") if word)
        except (OSError, ValueError):
            continue
        if b"RANK" in environment and _SCRIPT.encode() in command and b"deepspeed.launcher.launch" not in command:
            found[int(environment[b"RANK"])] = int(entry.name)
    return found


class _Attempt:
    """One start of a run under the deepspeed launcher, in a process group of its own."""

    def __init__(self, ranks: int, command: list[str], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder / "output.log"
        self._metrics_before = self._metrics_file()
        launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        launcher += ["--master_port", str(free_port())]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *command], stdout=sink, stderr=sink, start_new_session=True
            )

    def finish(self) -> None:
        """Wait for a good end."""
        try:
            code = self.process.wait(_LIMIT)
        finally:
            self._clean()
        if code != 0:
            raise UserError("a run failed that nothing disturbed", got=f"exit code {code}", remedy=f"see {self.log}")

    def kill(self, rank: int, step: int, delay: float) -> None:
        """SIGKILL `rank` `delay` seconds after `step` is logged; returns when no process of the run is left."""
        deadline = time.monotonic() + _LIMIT
        try:
            while self._metrics_file() == self._metrics_before or max(losses(self.folder), default=0) < step:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise UserError(f"the run did not reach step {step}", remedy=f"see {self.log}")
                time.sleep(0.05)
            time.sleep(delay)
            victim = rank_processes(self.process.pid).get(rank)
            if victim is None:
                raise UserError(f"rank {rank} was gone before its kill", remedy="more --steps or a shorter --delay")
            os.kill(victim, signal.SIGKILL)
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            pass  # then the launcher goes with the rest
        finally:
            self._clean()

    def _metrics_file(self) -> int | None:
        """A start writes the file anew, without the steps that its checkpoint does not know."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.is_file() else None

    def _clean(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _words(args: argparse.Namespace) -> list[str]:
    return [
        *args.overrides,
        f"train.zero_stage={args.zero_stage}",
        f"train.duration={args.steps} steps",
        f"checkpoint.every={args.save_every} steps",
        "log.every=1 steps",
        "evaluators={}",
        "checkpoint.keep_best=null",
    ]


def _command(args: argparse.Namespace, words: list[str]) -> list[str]:
    return [_SCRIPT, "--config", str(args.config), *words]


def _resume_step(run_dir: Path) -> int:
    found, notes = newest_intact(run_dir / FOLDER)
    if notes:
        raise UserError("a kill has left a damaged checkpoint", got="; ".join(notes))
    return step_of(found) if found else 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for numbers that do not go together."""
    room = args.steps - 2 * args.save_every  # the first kill after a checkpoint, the last well before the end
    if args.kills < 0 or args.save_every < 1 or args.kills > room:
        raise UsageError(
            "--kills leaves no step to each kill",
            got=f"{args.kills} kills in {args.steps} steps with a checkpoint every {args.save_every}",
            expected=f"at most {max(0, room)}",
        )
    if min(args.world_sizes) < 1:
        raise UsageError("--world-sizes has a size that is not positive", got=args.world_sizes)
