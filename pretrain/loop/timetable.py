"""What falls on which step of a run: its end, its learning rate, and when to log, evaluate and save."""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.errors import UserError
from pretrain.config.durations import ENDLESS, duration_steps
from pretrain.config.tree import Config
from pretrain.engine.schedule import Schedule
from pretrain.stream.loader import TrainStream


@dataclass(frozen=True)
class Timetable:
    """Of a run of `total` steps (`ENDLESS`: without an end) of `batch` samples over all ranks; `every`: the intervals
    of `due`, in steps, None for never."""

    total: int
    batch: int
    schedule: Schedule
    every: dict[str, int | None]

    @property
    def end(self) -> int | None:
        """The last step; None where there is none."""
        return None if self.total == ENDLESS else self.total

    def due(self, what: str, step: int) -> bool:
        """Whether log, eval, checkpoint or keep (a checkpoint that stays) falls on `step`, counted from 1. The last
        step is logged and evaluated in any case."""
        every = self.every[what]
        return every is not None and (step % every == 0 or (what in ("log", "eval") and step == self.total))

    def lr(self, samples_seen: int) -> float:
        """The learning rate of the step before which so many samples were seen."""
        return self.schedule.lr(samples_seen, self.batch)


def make_timetable(config: Config, stream: TrainStream) -> Timetable:
    """The timetable of the whole run, from its first start on. Raises UserError as `make_schedule` does."""
    total, batch = run_steps(config, stream), config.train.global_batch
    durations = {
        "log": config.log.every,
        "eval": config.eval.every,
        "checkpoint": config.checkpoint.every,
        "keep": config.checkpoint.keep_every,
    }
    every = {
        name: None if text is None else duration_steps(text, name, stream.steps_per_epoch, batch)
        for name, text in durations.items()
    }
    return Timetable(total, batch, make_schedule(config, stream), {**every, "eval": every["eval"] or total})


def run_steps(config: Config, stream: TrainStream) -> int:
    """Optimizer steps of the whole run; `ENDLESS` where it has no end."""
    return stream.steps_until(config.train.duration, "train.duration")


def make_schedule(config: Config, stream: TrainStream) -> Schedule:
    """The learning-rate schedule of the whole run, in samples.

    Raises:
        UserError: warmup and cooldown are longer than the run.
    """
    optim, batch = config.optim, config.train.global_batch
    warmup, cooldown = (
        batch * duration_steps(text, name, stream.steps_per_epoch, batch)
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
