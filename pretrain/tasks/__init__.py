"""What can be trained, by task: the settings of each beside those that all have, and where its recipe stands. No torch.

A task is a file, and an entry in TASKS.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from pretrain.config.declare import Fault, Parsed, break_rule, choice, number, setting, unknown_parts
from pretrain.config.reading import load_task
from pretrain.config.registry import Entry, entries
from pretrain.config.tree import DataConfig, ModelConfig, OptimConfig, Phase
from pretrain.evaluate import EVALUATORS, OF_CLASSIFIERS, EvaluatorConfig, metric_names
from pretrain.objectives import OF_TOWERS, ObjectiveConfig, at_odds, of_features
from pretrain.stream.fields import FIELDS, FieldConfig
from pretrain.tasks.needs import Needs, faults, needs_of
from pretrain.towers.adapt import AdaptedConfig
from pretrain.towers.heads import HEADS, HeadConfig


@dataclass(frozen=True)
class TaskConfig(AdaptedConfig):
    """What every training has. What the task is adds its own settings, and none that it would not heed."""

    evaluators: dict[str, EvaluatorConfig] = entries(EVALUATORS)  # by type or another name; none: nothing is evaluated

    OF_CLASSIFIER: ClassVar[bool] = False  # whether the model is one

    @property
    def metrics(self) -> list[str]:
        """The names of all numbers that the evaluators may give."""
        return metric_names(self.evaluators, self.OF_CLASSIFIER, self.optim.ema is not None)

    def check(self) -> Iterator[Fault]:
        """No two metrics have one name, and the best checkpoint is told by one that there is."""
        yield from super().check()
        metrics = self.metrics
        twice = next((name for name in metrics if metrics.count(name) > 1), None)
        if twice is not None:
            remedy = "call one of them by a name of your own, and say its type: {NAME: {type: TYPE}}"
            yield Fault("evaluators", f"metrics of different names, and two are called {twice}", remedy)
        best = (self.checkpoint.keep_best or "").removeprefix("-")
        if best and not metrics:
            yield Fault("checkpoint.keep_best", "an evaluation", "set evaluators.TYPE.data=PATH")
        elif best and best not in metrics:
            near = difflib.get_close_matches(best, metrics, 1)
            rule = f"a metric of evaluators: {', '.join(metrics[:3])}, ..."
            yield Fault("checkpoint.keep_best", rule, f"did you mean {near[0]!r}?" if near else None)


@dataclass(frozen=True)
class ContrastiveConfig(TaskConfig):
    """Pretraining: an image tower and a text tower learn to put what belongs together side by side."""

    task: str = choice("contrastive")
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: dict[str, ObjectiveConfig] = entries(OF_TOWERS, "infonce")  # by their types or other names
    heads: dict[str, HeadConfig] = entries(HEADS)  # of those that the objectives read
    fields: dict[str, FieldConfig] = entries(FIELDS)  # of those that the objectives read

    PARTS = TOWERS = ("image", "text")

    @property
    def locked(self) -> Sequence[str]:
        """Those of model.locked."""
        return self.model.locked

    @property
    def phases(self) -> Sequence[Phase]:
        """Those of the model."""
        return self.model.phases

    @property
    def needs(self) -> Needs:
        """What the objectives need."""
        return needs_of(self.objectives, self.heads, self.fields)

    @property
    def parts(self) -> Sequence[str]:
        """The towers, and the heads by their names."""
        return (*self.TOWERS, *self.needs.heads)

    @property
    def metrics(self) -> list[str]:
        """Without a validation loss where no objective has a value for features alone."""
        names = super().metrics
        return names if of_features(self.objectives) else [name for name in names if "validation_loss" not in name]

    def check(self) -> Iterator[Fault]:
        """Something is minimised, something learns, and what is locked has no rate."""
        yield from super().check()
        if not self.objectives:
            yield Fault("objectives", "at least one", "objectives=infonce")
        yield from at_odds(self.objectives)
        yield from faults(self.objectives, self.heads, self.fields)
        known = (*self.TOWERS, *self.needs.fields)
        for name, one in self.objectives.items():
            yield from unknown_parts(f"objectives.{name}.fields", getattr(one, "fields", ()), known)
        yield from unknown_parts("data.optional", self.data.optional, known)
        if set(self.TOWERS) <= set(self.data.optional):
            yield Fault("data.optional", "a list that leaves image or text", "a sample without both teaches nothing")
        yield from unknown_parts("model.locked", self.model.locked, self.TOWERS)
        if set(self.TOWERS) <= set(self.model.locked):
            yield Fault("model.locked", "a list that leaves a part to learn")
        if locked := [name for name in self.optim.parts if name in self.model.locked]:
            yield Fault("optim.parts", f"parts that learn, and {', '.join(locked)} is locked", "leave it out")


def _check_classes(value: Any, name: str) -> None:
    """YAML reads yes, no and null as other things than names."""
    many = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) and str(one).strip() for one in many):
        remedy = "put quotes around names that YAML takes for something else (yes, no, null)"
        break_rule(name, value, "a list of names, a file with one a line, a count, or null", remedy)


@dataclass(frozen=True)
class ClassifyConfig(TaskConfig):
    """Fine-tuning: the image tower of a trained model becomes a classifier."""

    task: str = choice("classify")
    # What model.init takes, or an architecture with `random: true`; a run that goes on from a checkpoint needs none.
    init: str | None = None
    architecture: str | None = None  # of a bare weights file in `init`: an open_clip name or the path of its JSON
    random: bool = False  # start from nothing, for a baseline
    init_ema: bool = False  # from the moving average of its weights (optim.ema)
    mode: str = choice("linear", "full", default="full")  # linear: only the head learns | full: the image tower too
    # Pixels; null: as pretrained, else position embeddings are interpolated.
    image_size: int | None = number(None, ge=1, le=16384)
    zero_shot_head: bool = True  # start the head from the text tower's class weights; false: from zeros
    templates: str = "photo"  # prompts of those class weights: photo | simple | openai | a file
    # Names of the labels 0, 1, ... where the shards carry none (tars of other tools), or other names: a list, a file
    # with one a line, or a count; null: as packed.
    classes: Any = setting(None, Parsed(_check_classes, ""))

    evaluators: dict[str, EvaluatorConfig] = entries(OF_CLASSIFIERS)

    PARTS, TOWERS, OF_CLASSIFIER = ("image", "head"), ("image",), True

    @property
    def locked(self) -> Sequence[str]:
        """No loss asks anything of the texts and the scalars; at mode=linear the head alone learns."""
        return ("text", "logits") if self.mode == "full" else ("text", "logits", "image")

    def check(self) -> Iterator[Fault]:
        """A tower that is not trained has no rate."""
        yield from super().check()
        if self.mode == "linear" and "image" in self.optim.parts:
            yield Fault("optim.parts", "head alone at mode=linear")


# `build` makes the recipe of a task: see `recipe.recipe_of`.
TASKS: dict[str, Entry[TaskConfig]] = {
    "contrastive": Entry(ContrastiveConfig, "pretrain.tasks.contrastive:recipe"),
    "classify": Entry(ClassifyConfig, "pretrain.tasks.classify:recipe"),
}


def read_settings(path: str | os.PathLike, overrides: Sequence[str], default: str) -> TaskConfig:
    """The settings in a file of the task that it names, or of `default`: see `load_task`."""
    return cast(TaskConfig, load_task(TASKS, path, overrides, default))
