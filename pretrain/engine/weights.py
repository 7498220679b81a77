"""What a checkpoint's weights become: a model to evaluate, or the pieces a rank of any world size needs to resume."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch

from data_tools.errors import UserError
from pretrain.engine.committed import MODEL
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import EMA, Fragment, create_optimizer_state
from pretrain.engine.located import Kind, locate
from pretrain.engine.opening import open_model, resolve_checkpoint, spec_of_description
from pretrain.engine.optimizers import all_states
from pretrain.engine.reader import CheckpointReader
from pretrain.towers.adapt.order import adapters_in
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier
from pretrain.towers.spec import ModelSpec


def restore_optimizer(engine: Engine, reader: CheckpointReader, step: int) -> None:
    """Fill this rank's optimizer states from a checkpoint of any world size and stage. The weights are loaded into the
    module before the engine is built, which copies its masters from them. All ranks must call it.

    Raises:
        UserError: the checkpoint is of another optimizer.
    """
    states, wanted = reader.kinds - {"weight", EMA}, all_states(engine.optimizer_name, engine.optimizer.param_groups)
    if states and states != wanted:  # none: it was saved before the first update
        raise UserError(
            f"{reader.folder} was trained with another optimizer",
            got=f"its states are {', '.join(sorted(states))}",
            expected=f"{', '.join(sorted(wanted))}, the states of optim.name={engine.optimizer_name}",
            remedy="set optim.name back, or start a new run with model.init from an export",
        )
    create_optimizer_state(engine.zero, engine.optimizer_name, step)
    if engine.ema is not None:
        engine.ema.updates = step
    for fragment in engine.fragments(every=True):
        _fill(fragment, reader)


def _fill(fragment: Fragment, reader: CheckpointReader) -> None:
    for kind, values in fragment.values.items():
        # States of what was locked then start from zeros, an average that was not wanted then from the weights.
        if kind != "weight" and reader.holds(fragment.name, kind):
            values.copy_(reader.read(fragment.name, kind, fragment.start, fragment.numel))


def describe(spec: ModelSpec, **more: object) -> dict:
    """What `load_trained` needs to rebuild the towers, for model.json."""
    return {"spec": asdict(spec), **more}


def load_trained(path: str | Path, ema: bool = False, architecture: str | None = None) -> DualEncoder:
    """The dual encoder that `open_model` opens, without its words."""
    return open_model(path, ema, architecture)[0]


def load_classifier(path: str | Path) -> Classifier | None:
    """The classifier of a fine-tuning run (its newest intact checkpoint) or of a checkpoint of it: fp32, on the CPU, in
    evaluation mode. None where `path` holds another model, or nothing: that `load_trained` says.

    Raises:
        UserError: a damaged one.
    """
    try:
        found = locate(path)
    except UserError:
        return None
    if found.kind not in (Kind.RUN, Kind.CHECKPOINT):
        return None
    reader = CheckpointReader(resolve_checkpoint(path))
    model = classifier_of(reader)
    if model is None:
        return None
    reader.load_into(model, adapters_in(reader.model(), str(reader.folder / MODEL)))
    return model.eval()


def classifier_of(reader: CheckpointReader) -> Classifier | None:
    """The classifier that a checkpoint describes, plain and without its weights, fp32 on the CPU; None where it is of
    another model.

    Raises:
        UserError: a damaged description.
    """
    description, where = reader.model(), reader.folder / MODEL
    if "head" not in description:
        return None
    classes, scale = _head(description["head"], where)
    towers = DualEncoder(spec_of_description(description, str(where)), texts=False)
    head = torch.zeros(len(classes), towers.spec.model_cfg["embed_dim"])
    return Classifier(towers, classes, head, scale)


def _head(head: object, where: Path) -> tuple[list[str], float]:
    classes, scale = (head.get("classes"), head.get("scale")) if isinstance(head, dict) else (None, None)
    if isinstance(scale, float) and 0 < scale < math.inf and isinstance(classes, list) and classes:
        named = all(isinstance(name, str) for name in classes)
        if named and len(set(classes)) == len(classes):
            return classes, scale
    raise UserError(f"{where} describes no head of a classifier", got=head, expected="classes and a scale")
