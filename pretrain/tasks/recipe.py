"""What a task is made of: the one job, --dry-run and inspect_batch read it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pretrain.engine.reader import CheckpointReader
from pretrain.evaluate.bench import Bench
from pretrain.objectives import ObjectiveConfig
from pretrain.process.runtime import Runtime
from pretrain.stream.loader import FieldsOf, StreamSource
from pretrain.stream.sources import cache_settings
from pretrain.tasks import TASKS, TaskConfig
from pretrain.towers.build import DualEncoder
from pretrain.towers.spec import ModelSpec

Trained = Any  # a DualEncoder, or a module around one: it has a `spec` and the forward of `towers.model.Model`


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
        bench: (model) -> what the settings' evaluators get beside their own settings.
        average: (model, moving average of its state) -> a model with these weights alone; None where there is none.
    """

    config: TaskConfig
    sources: Sequence[StreamSource]
    fields: Callable[[Trained | None], FieldsOf]
    objectives: Mapping[str, ObjectiveConfig]
    start: Callable[[], tuple[Trained, list[str]]]
    resume: Callable[[CheckpointReader], Trained]
    describe: Callable[[Trained], dict]
    remarks: Callable[[Trained], list[str]]
    bench: Callable[[Trained], Bench]
    average: Callable[[Trained, dict[str, Tensor]], nn.Module] | None = None


def recipe_of(config: TaskConfig, reader: CheckpointReader | None, runtime: Runtime) -> Recipe:
    """That of the settings' task. `reader`: of the checkpoint that the run goes on from.

    Raises:
        UserError: whatever is wrong with the corpora.
    """
    return TASKS[config.task].load()(config, reader, runtime)


def bench_of(config: TaskConfig, runtime: Runtime, towers: DualEncoder, spec: ModelSpec, **others: Any) -> Bench:
    """What the evaluators of a run share, of a model on these towers, and of pictures and texts as `spec` has them;
    remote shards share the cache of the training ones. `others`: see `Bench`."""
    place = (runtime, spec, towers.rule, config.eval.batch, config.data.workers, cache_settings(config.data))
    return Bench(*place, heads=frozenset(towers.heads), **others)
