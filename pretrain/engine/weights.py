"""Reading checkpoints: whole weights for a model, or the pieces a rank of any world size needs to resume."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from pathlib import Path

import torch

from data_tools.errors import UserError
from pretrain.engine.committed import FOLDER, MANIFEST, MODEL, STATE, fault_of, newest_intact
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import EMA, Fragment, create_optimizer_state, local_fragments
from pretrain.engine.optimizers import all_states
from pretrain.engine.reader import CheckpointReader
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier
from pretrain.towers.initialise import initialise
from pretrain.towers.spec import ModelSpec, resolve_spec, spec_of
from pretrain.towers.weights_file import read_weights

EXPORT = "open_clip_config.json"


def restore_optimizer(engine: Engine, reader: CheckpointReader, step: int, rank: int, world_size: int) -> None:
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
    create_optimizer_state(engine, step)
    if engine.ema is not None:
        engine.ema.updates = step
    owned = local_fragments(engine, 0, 1) if engine.stage == 0 else local_fragments(engine, rank, world_size)
    for fragment in owned:
        _fill(fragment, reader)


def _fill(fragment: Fragment, reader: CheckpointReader) -> None:
    for kind, values in fragment.values.items():
        # States of what was locked then start from zeros, an average that was not wanted then from the weights.
        if kind != "weight" and reader.holds(fragment.name, kind):
            values.copy_(reader.read(fragment.name, kind, fragment.start, fragment.numel))


def describe(spec: ModelSpec, **more: object) -> dict:
    """What `load_trained` needs to rebuild the towers, for model.json."""
    return {"spec": asdict(spec), **more}


def load_trained(path: str | Path, ema: bool = False) -> DualEncoder:
    """The dual encoder of a run folder (its newest intact checkpoint), a checkpoint or an export folder: fp32, on the
    CPU, in evaluation mode. `ema`: the moving average of its weights (optim.ema).

    Raises:
        UserError: no model there, a damaged one, or no moving average.
    """
    path = Path(path)
    if (path / EXPORT).is_file():
        if ema:
            raise UserError(f"{path} is an export", expected="a run or checkpoint with a moving average of its weights")
        return _from_export(path)
    checkpoint = resolve_checkpoint(path)
    reader = CheckpointReader(checkpoint)
    description = reader.model()
    if "head" in description:
        raise UserError(
            f"{checkpoint} is a fine-tuned classifier",
            expected="a dual encoder",
            remedy="give the pretraining run it started from; evaluate.py --task classification, predict.py and "
            "export.py take the classifier itself",
        )
    if ema and EMA not in reader.kinds:
        raise UserError(
            f"{checkpoint} has no moving average of its weights", remedy="train with optim.ema, such as 0.999"
        )
    model = DualEncoder(_spec(description, f"{checkpoint / MODEL}"))
    reader.load_into(model, EMA if ema else "weight")
    return model.eval()


def load_classifier(path: str | Path) -> Classifier | None:
    """The classifier of a fine-tuning run (its newest intact checkpoint) or of a checkpoint of it: fp32, on the CPU, in
    evaluation mode. None where `path` holds another model, or nothing: that `load_trained` says.

    Raises:
        UserError: a damaged one.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file() and not (path / FOLDER).is_dir():
        return None
    checkpoint = resolve_checkpoint(path)
    reader = CheckpointReader(checkpoint)
    description = reader.model()
    if "head" not in description:
        return None
    classes, scale = _head(description["head"], checkpoint / MODEL)
    towers = DualEncoder(_spec(description, f"{checkpoint / MODEL}"))
    model = Classifier(towers, classes, torch.zeros(len(classes), towers.spec.model_cfg["embed_dim"]), scale)
    reader.load_into(model, "weight")
    return model.eval()


def _head(head: object, where: Path) -> tuple[list[str], float]:
    classes, scale = (head.get("classes"), head.get("scale")) if isinstance(head, dict) else (None, None)
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(set(classes)) < max(1, len(classes)) or not (isinstance(scale, float) and 0 < scale < math.inf):
        raise UserError(f"{where} describes no head of a classifier", got=head, expected="classes and a scale")
    return classes, scale


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest intact one of a run folder.

    Raises:
        UserError: no checkpoint there, or none whose files match its manifest.
    """
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / STATE).is_file():
        fault = fault_of(path)
        if fault:
            raise UserError(f"checkpoint {path} is damaged", got=fault, remedy="give another one, or restore a copy")
        return path
    if not path.is_dir():
        raise UserError(f"{path} is missing", expected="a run, checkpoint or export folder")
    found, notes = newest_intact(path / FOLDER)
    if found is None:
        got = "; ".join(notes) or "no committed checkpoint and no open_clip_config.json"
        raise UserError(f"{path} holds no model", got=got, expected="a run, checkpoint or export folder")
    return found


def _spec(description: dict, where: str) -> ModelSpec:
    spec = description.get("spec")
    if not isinstance(spec, dict) or spec.keys() != {field.name for field in fields(ModelSpec)}:
        raise UserError(f"{where} describes no model", got=spec, expected="a spec")
    return spec_of(spec["name"], spec["model_cfg"], spec["preprocess_cfg"], where)


def _from_export(path: Path) -> DualEncoder:
    spec = resolve_spec(str(path / EXPORT))
    if spec.model_cfg["text_cfg"].get("hf_tokenizer_name"):
        spec.model_cfg["text_cfg"]["hf_tokenizer_name"] = str(path)  # its files travel with the export
    model = DualEncoder(spec)
    initialise(model, read_weights(path / "open_clip_model.safetensors"), str(path))
    return model.eval()
