"""The one job of all tasks: from a recipe to stream, model, engine and state, of a fresh start or of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from data_tools.format.commit import atomic_write
from pretrain.config.batch import local_batch
from pretrain.config.recorded import recorded_precision
from pretrain.config.tree import Config
from pretrain.engine.backward import backward
from pretrain.engine.checkpoint import Extras
from pretrain.engine.committed import FOLDER, SETTINGS, committed
from pretrain.engine.engine import Engine
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.resume import find_checkpoint, start_state
from pretrain.engine.state import TrainState
from pretrain.engine.weights import restore_optimizer
from pretrain.evaluate.bench import in_precision
from pretrain.evaluate.evaluator import Evaluator, build_evaluators, remarks_of, run_evaluators
from pretrain.objectives.objective import build, compares
from pretrain.process.collectives import raise_on_all_ranks
from pretrain.process.precision import resolve
from pretrain.process.runtime import Runtime
from pretrain.report.provenance import resolved
from pretrain.stream.batches import Batch
from pretrain.stream.fields.field import micro_batches
from pretrain.stream.loader import TrainStream
from pretrain.stream.sources import train_stream
from pretrain.tasks import TaskConfig
from pretrain.tasks.recipe import Recipe, Trained, recipe_of
from pretrain.towers.model import Inputs, to_device

_Config = TypeVar("_Config", bound=Config)


@dataclass(frozen=True)
class Prepared:
    """What a run has before it writes anything. `lines`: for the user; `reader`: what the model and the optimizer are
    still to be filled from."""

    recipe: Recipe
    reader: CheckpointReader | None
    model: Trained
    stream: TrainStream
    evaluators: dict[str, Evaluator]
    extras: Extras
    state: TrainState
    lines: list[str]


def prepare(config: TaskConfig, runtime: Runtime) -> Prepared:
    """Whatever can be wrong with a run is found here. All ranks must call it.

    Raises:
        UserError: of the corpora, of the checkpoint or, without one, of what a fresh run starts from.
    """
    config = resolve_precision(config, runtime)
    reader = find_checkpoint(config.run, runtime)
    recipe = recipe_of(config, reader, runtime)
    model, lines = recipe.start() if reader is None else (recipe.resume(reader), [])
    stream = train_stream(recipe.config, recipe.sources, recipe.fields(model), runtime)
    evaluators = build_evaluators(recipe.config.evaluators, recipe.bench(model))
    extras = Extras(recipe.describe(model), resolved(recipe.config))
    state = start_state(reader, extras.model, extras.config, stream, runtime)
    lines = [*lines, *recipe.remarks(model), *remarks_of(evaluators, stream.corpus)]
    return Prepared(recipe, reader, model, stream, evaluators, extras, state, lines)


class Job:
    """See `pretrain.train.Job`. All ranks must build it."""

    def __init__(self, config: TaskConfig, runtime: Runtime):
        ready = prepare(config, runtime)
        self.config, self.runtime = ready.recipe.config, runtime
        self.model, self.stream, self.state, self.extras = ready.model, ready.stream, ready.state, ready.extras
        self.resumed_from = None if ready.reader is None else ready.reader.folder
        self._evaluators, self._average = ready.evaluators, ready.recipe.average
        self._micro_batch = self.config.train.micro_batch or local_batch(self.config, runtime.world_size)
        self._objectives = build(ready.recipe.objectives)
        self._compares = any(compares(one.objective) for one in self._objectives.values())
        keep_settings(self.config, self.extras.config, runtime)
        if runtime.is_main and ready.lines:
            print("\n".join(ready.lines), flush=True)
        if ready.reader is not None:
            ready.reader.load_into(self.model)
        self.engine = Engine(self.model, self.config.optim, self.config.train, runtime)
        if ready.reader is not None:
            restore_optimizer(self.engine, ready.reader, self.state.updates)

    def forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of the global batch's objectives; micro-batches turn the gradient cache on, where one is needed."""
        return backward(self.engine, self._parts(batch), self._objectives, self.state.samples_seen)

    def diagnose(self, batch: Batch) -> list[str]:
        """Keys of this rank's samples with a row that is not finite."""
        with torch.no_grad():
            outputs = [self.engine(to_device(part, self.engine.device)) for part in self._parts(batch)]
        bad = torch.cat([_not_finite(output["rows"]) for output in outputs])
        return [batch.keys[row] for row in torch.nonzero(bad).flatten().tolist()]

    def evaluate(self) -> dict[str, float]:
        """Metrics of all evaluators, and under `ema_` those of the moving average of the weights."""
        with _evaluating(self.engine):
            values = run_evaluators(self._evaluators, self.engine)
            if values and self.engine.ema is not None and self._average is not None:
                average = self._average(self.model, self.engine.ema.gathered()).to(self.runtime.device).eval()
                forward = in_precision(average, self.runtime.device, self.config.train.precision)
                averaged = run_evaluators(self._evaluators, forward)
                values |= {f"ema_{name}": value for name, value in averaged.items()}
        return values

    def _parts(self, batch: Batch) -> list[Inputs]:
        """On the host, so that the device holds one micro-batch at a time."""
        inputs = batch.inputs
        if self._compares:
            inputs = {field: {**rows, "identity": batch.identity[field]} for field, rows in inputs.items()}
        return micro_batches(inputs, self._micro_batch)


def _not_finite(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """bool `[n]`: which of n samples have a row that is not finite in any field."""
    return ~torch.stack([row.isfinite().all(dim=1) for row in rows.values()]).all(dim=0)


@contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    """Evaluation mode, no gradients; training mode again afterwards."""
    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.deepspeed.train()


def resolve_precision(config: _Config, runtime: Runtime) -> _Config:
    """`config` with the precision that all ranks compute in, that of the run's newest checkpoint where `auto` leaves it
    open; it is printed, and a warning where it is slow here. All ranks must call it."""
    saved = reversed(committed(Path(config.run.dir) / FOLDER))
    recorded = next(filter(None, (recorded_precision(folder / SETTINGS) for folder in saved)), None)
    resolved = resolve(config.train.precision, runtime.device, recorded)
    if runtime.is_main:
        print("\n".join(resolved.lines), flush=True)
    return replace(config, train=replace(config.train, precision=resolved.precision))


def keep_settings(config: Config, text: str, runtime: Runtime) -> None:
    """Write the resolved settings into run.dir, once a checkpoint there was found to fit them. All ranks must call
    it."""

    def write() -> None:
        folder = Path(config.run.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / SETTINGS) as file:
            file.write(text.encode())

    raise_on_all_ranks(write if runtime.is_main else lambda: None, f"writing the settings to run.dir {config.run.dir}")
