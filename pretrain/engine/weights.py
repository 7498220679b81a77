"""Reading checkpoints: whole weights for a model, or the pieces a rank of any world size needs to resume."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from data_tools.errors import UserError
from pretrain.engine.committed import FOLDER, MANIFEST, newest_intact
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import EMA, Fragment, create_optimizer_state, local_fragments
from pretrain.engine.optimizers import all_states
from pretrain.engine.state import TrainState
from pretrain.towers.build import DualEncoder
from pretrain.towers.initialise import initialise, read_weights
from pretrain.towers.spec import ModelSpec


class CheckpointReader:
    """The tensors of a committed checkpoint, found by parameter name and element range."""

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[object, int, int]]] = {}  # name -> (file, start, numel), by start
        self._keys: set[str] = set()
        for path in sorted(checkpoint.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            for name, place in json.loads(file.metadata()["fragments"]).items():
                self.shapes[name] = tuple(place["shape"])
                self._pieces.setdefault(name, []).append((file, place["start"], place["numel"]))
            self._keys |= set(file.keys())
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[1])

    @property
    def kinds(self) -> set[str]:
        """What is kept of parameters: "weight", the optimizer's states, EMA."""
        return {key.rsplit("|", 1)[1] for key in self._keys}

    def holds(self, name: str, kind: str) -> bool:
        """Whether there is `kind` of parameter `name`: of one that did not learn there are weights alone."""
        return f"{name}|{kind}" in self._keys

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start` .. `start + numel` of `kind` ("weight" or an optimizer state) of parameter `name`, flat."""
        parts = []
        for file, first, count in self._pieces[name]:
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                parts.append(file.get_slice(f"{name}|{kind}")[low - first : high - first])
        out = torch.cat(parts) if len(parts) != 1 else parts[0]
        if out.numel() != numel:
            raise UserError(f"checkpoint {self.folder} does not cover {name}|{kind}", got=out.numel(), expected=numel)
        return out

    def weights(self, kind: str = "weight") -> dict[str, torch.Tensor]:
        """Every parameter, whole, by the name it has in the trained module; `kind` EMA: its moving average."""
        whole = {}
        for name, shape in self.shapes.items():
            found = kind if self.holds(name, kind) else "weight"
            whole[name] = self.read(name, found, 0, torch.Size(shape).numel()).reshape(shape)
        return whole

    def state(self) -> TrainState:
        """The run's TrainState."""
        return TrainState.from_dict(json.loads((self.folder / "state.json").read_text()))

    def model(self) -> dict:
        """The model's description, as the job that trained it wrote it."""
        return json.loads((self.folder / "model.json").read_text())


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
    if (path / "open_clip_config.json").is_file():
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
            remedy="give the pretraining run it started from",
        )
    if ema and EMA not in reader.kinds:
        raise UserError(
            f"{checkpoint} has no moving average of its weights", remedy="train with optim.ema, such as 0.999"
        )
    model = DualEncoder(ModelSpec(**description["spec"]))
    model.load_state_dict(reader.weights(EMA if ema else "weight"), strict=True)
    return model.eval()


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest intact one of a run folder."""
    path = Path(path)
    if (path / MANIFEST).is_file() and (path / "state.json").is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is missing", expected="a run, checkpoint or export folder")
    found, notes = newest_intact(path / FOLDER)
    if found is None:
        got = "; ".join(notes) or "no committed checkpoint and no open_clip_config.json"
        raise UserError(f"{path} holds no model", got=got, expected="a run, checkpoint or export folder")
    return found


def _from_export(path: Path) -> DualEncoder:
    config = json.loads((path / "open_clip_config.json").read_text())
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(path)  # its files travel with the export
    model = DualEncoder(ModelSpec(path.name, config["model_cfg"], config["preprocess_cfg"]))
    initialise(model, read_weights(path / "open_clip_model.safetensors"), str(path))
    return model.eval()
