"""What a task is made of: the one job, --dry-run and inspect_batch read it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain.config.tree import Config
from pretrain.engine.engine import Engine
from pretrain.engine.reader import CheckpointReader
from pretrain.objectives import ObjectiveConfig
from pretrain.process.runtime import Runtime
from pretrain.stream.loader import FieldsOf, StreamSource
from pretrain.tasks import TASKS
from pretrain.towers.adapt import AdaptedConfig

Trained = Any  # a DualEncoder, or a module around one: it has a `spec` and the forward of `towers.model.Model`


class Evaluations(Protocol):
    """The evaluations of a run, their corpora looked into."""

    @property
    def remarks(self) -> Sequence[str]:
        """For the user, at the start."""

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Metrics, the same on every rank. All ranks must call it, in evaluation mode."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Made by a task of (settings, checkpoint to go on from or None, runtime). Nothing in it trains.

    Args:
        config: the settings, with what the checkpoint alone remembers of them.
        sources: the training corpora.
        fields: (model, or None where nobody trains) -> what is read of the samples of each source and phase. Only a
            model says how texts are cut and which patches are left out.
        objectives: what is minimised, by name.
        start: the model that a fresh run begins with, and lines that say where it is from. All ranks must call it.
        resume: (checkpoint) -> the model that it is of, to be given its weights; UserError where it is of another task.
        describe: (model) -> model.json.
        remarks: (model) -> lines for the user, said at every start.
        evaluations: (model, joined training corpus) -> what the run is evaluated by. All ranks must call it.
    """

    config: AdaptedConfig
    sources: Sequence[StreamSource]
    fields: Callable[[Trained | None], FieldsOf]
    objectives: Mapping[str, ObjectiveConfig]
    start: Callable[[], tuple[Trained, list[str]]]
    resume: Callable[[CheckpointReader], Trained]
    describe: Callable[[Trained], dict]
    remarks: Callable[[Trained], list[str]]
    evaluations: Callable[[Trained, Any], Evaluations]


def recipe_of(config: Config, reader: CheckpointReader | None, runtime: Runtime) -> Recipe:
    """That of the settings' task. `reader`: of the checkpoint that the run goes on from.

    Raises:
        UserError: whatever is wrong with the corpora.
    """
    return TASKS[config.task].load()(config, reader, runtime)
