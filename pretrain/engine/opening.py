"""The one way in for trained towers: whatever `--model`, `init` and `model.init` may name, opened, checked and said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from data_tools.errors import UsageError, UserError, shown
from pretrain.engine.committed import FOLDER, MODEL, fault_of, newest_intact
from pretrain.engine.fragments import EMA
from pretrain.engine.located import OPEN_CLIP, TRANSFORMERS, Kind, Located, locate
from pretrain.engine.reader import CheckpointReader
from pretrain.towers.adapt.order import adapters_in, merge
from pretrain.towers.build import DualEncoder
from pretrain.towers.files import weights_files
from pretrain.towers.guess import architectures_of
from pretrain.towers.heads.equip import Equipment, equipment_in
from pretrain.towers.initialise import InitReport, initialise
from pretrain.towers.same import check_same, has_activation
from pretrain.towers.spec import ModelSpec, resolve_spec, spec_of
from pretrain.towers.transformers_clip import is_transformers, read_transformers_clip
from pretrain.towers.transformers_keys import native_of
from pretrain.towers.weights_file import activation_of, read_weights

OPTION = "--architecture"
State = dict[str, torch.Tensor]


@dataclass
class Opened:
    """Weights by open_clip's native keys, and what their place says of them.

    `took`: what they were read from, for the user; `spec`: None of a bare weights file that does not tell;
    `activation`: gelu or quick_gelu, None where that is not said either; `notes`: warnings; `equipment`: what stood
    beside the towers where they were trained, `heads`: the weights of its heads.
    """

    took: str
    state: State
    spec: ModelSpec | None
    activation: str | None
    notes: list[str] = field(default_factory=list)
    equipment: Equipment = field(default_factory=Equipment)
    heads: State = field(default_factory=dict)

    def build(self) -> tuple[DualEncoder, InitReport]:
        """The dual encoder, fp32, on the CPU, in evaluation mode, and what was loaded. Raises UserError where the
        weights are not the architecture's, or none is known."""
        assert self.spec is not None
        model = DualEncoder(self.spec)
        report = initialise(model, self.state, self.took)
        report.notes = self.notes
        self.equipment.give(model, seed=0)
        load_heads(model, self.heads, self.took)
        return model.eval(), report


def load_heads(model: DualEncoder, state: State, took: str) -> None:
    """Give the heads of `model` their weights, those of `took`. Raises UserError where these are of other heads."""
    try:
        model.heads.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the heads of {took} are not those that it describes", got=shown(str(error))) from None


def open_weights(name: str | Path, ema: bool = False, architecture: str | None = None) -> Opened:
    """The weights that `name` means (see `locate`), of whatever architecture.

    Args:
        ema: the moving average of the weights of a run or checkpoint.
        architecture: of a bare weights file: an open_clip name or the path of its JSON.

    Raises:
        UserError: no model there, a damaged one, no moving average.
    """
    found = locate(name)
    if ema and found.kind not in (Kind.RUN, Kind.CHECKPOINT):
        raise UserError(
            f"{name} is a {found.kind.value}", expected="a run or checkpoint with a moving average of its weights"
        )
    if architecture and found.kind is not Kind.WEIGHTS:
        raise UsageError(
            f"an architecture was given for {name}, which has its own", got=architecture, expected="a bare weights file"
        )
    if found.kind in (Kind.RUN, Kind.CHECKPOINT):
        return _of_checkpoint(*_checkpoint(found), ema)
    if found.kind is Kind.OPEN_CLIP:
        return _of_open_clip(found.path)
    if found.kind is Kind.TRANSFORMERS:
        return _of_transformers(found.path)
    return _of_file(found.path, architecture)


def open_model(name: str | Path, ema: bool = False, architecture: str | None = None) -> tuple[DualEncoder, InitReport]:
    """The dual encoder that `name` means, fp32, on the CPU, in evaluation mode, and for the user what was taken.

    Arguments and errors as of `open_known`.
    """
    return open_known(name, ema, architecture).build()


def open_known(name: str | Path, ema: bool = False, architecture: str | None = None) -> Opened:
    """As `open_weights`, with a spec: a bare weights file whose architecture is not known is an error too."""
    opened = open_weights(name, ema, architecture)
    return _guessed(opened) if opened.spec is None else opened


def resolve_checkpoint(name: str | Path) -> Path:
    """The checkpoint folder that `name` means: itself, or the newest intact one of a run folder.

    Raises:
        UserError: no checkpoint there, or none whose files match its manifest.
    """
    found = locate(name)
    if found.kind not in (Kind.RUN, Kind.CHECKPOINT):
        raise UserError(f"{name} is a {found.kind.value}", expected="a run or checkpoint folder")
    return _checkpoint(found)[0]


def _checkpoint(found: Located) -> tuple[Path, list[str]]:
    """The intact checkpoint, and warnings about newer ones that are not."""
    path = found.path
    if found.kind is Kind.CHECKPOINT:
        fault = fault_of(path)
        if fault:
            raise UserError(f"checkpoint {path} is damaged", got=fault, remedy="give another one, or restore a copy")
        return path, []
    newest, notes = newest_intact(path / FOLDER)
    if newest is None:
        got = "; ".join(notes) or "no committed checkpoint"
        raise UserError(f"{path} holds no model", got=got, expected="an intact checkpoint")
    return newest, [f"warning: {note}; the one before it was taken" for note in notes]


def _of_checkpoint(checkpoint: Path, notes: list[str], ema: bool) -> Opened:
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
    spec = spec_of_description(description, str(checkpoint / MODEL))
    added = adapters_in(description, str(checkpoint / MODEL))
    weights = merge(added, reader.weights(EMA) if ema else reader.weights())
    state = {key.removeprefix("clip."): value for key, value in weights.items() if key.startswith("clip.")}
    heads = {key.removeprefix("heads."): value for key, value in weights.items() if key.startswith("heads.")}
    what = ", the moving average of its weights" if ema else ""
    equipment = equipment_in(description, str(checkpoint / MODEL))
    return Opened(f"checkpoint {checkpoint}{what}", state, spec, _activation(spec), notes, equipment, heads)


def spec_of_description(description: Mapping, where: str) -> ModelSpec:
    """The spec in a checkpoint's model.json, of which `where` is the name for messages. Raises UserError."""
    spec = description.get("spec")
    if not isinstance(spec, dict) or spec.keys() != {part.name for part in fields(ModelSpec)}:
        raise UserError(f"{where} describes no model", got=spec, expected="a spec")
    return spec_of(spec["name"], spec["model_cfg"], spec["preprocess_cfg"], where)


def _of_open_clip(folder: Path, named: tuple[State, Path] | None = None) -> Opened:
    """A folder as open_clip's `local-dir:` takes it. `named`: the weights and their file, where that was named."""
    spec = resolve_spec(str(folder / OPEN_CLIP))
    if spec.model_cfg["text_cfg"].get("hf_tokenizer_name"):
        spec.model_cfg["text_cfg"]["hf_tokenizer_name"] = str(folder)  # its files travel with the model
    state, path = named or _weights(folder)
    if is_transformers(state):
        raise UserError(
            f"{path} has weights of transformers beside an {OPEN_CLIP}", expected="open_clip's own, under its names"
        )
    opened = Opened(f"open_clip folder {folder} ({path.name})", state, None, activation_of(path) or _activation(spec))
    return _known(opened, spec, [])


def _of_transformers(folder: Path, named: tuple[State, Path] | None = None) -> Opened:
    spec, notes = read_transformers_clip(folder)
    state, path = named or _weights(folder)
    took = f"transformers folder {folder} ({path.name}, converted)"
    return Opened(took, native_of(state), spec, _activation(spec), [f"note: {note}" for note in notes])


def _weights(folder: Path) -> tuple[State, Path]:
    files = weights_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights beside its description", expected="a .safetensors or .bin file")
    state: State = {}
    for path in files:
        state |= read_weights(path)
    return state, files[0]


def _of_file(path: Path, architecture: str | None) -> Opened:
    """A bare file: its architecture is what the user says, or the description that lies beside it."""
    state = read_weights(path)
    if architecture is None and (path.parent / OPEN_CLIP).is_file() and not is_transformers(state):
        return _of_open_clip(path.parent, (state, path))
    if is_transformers(state):
        if architecture is None and (path.parent / TRANSFORMERS).is_file():
            return _of_transformers(path.parent, (state, path))
        if architecture is None:
            raise UserError(
                f"{path} has weights of transformers without its {TRANSFORMERS}",
                remedy=f"put that beside it, or name an architecture of open_clip ({OPTION} NAME)",
            )
        state = native_of(state)
    opened = Opened(f"weights file {path}", state, None, activation_of(path))
    return opened if architecture is None else _known(opened, resolve_spec(architecture), [])


def _known(opened: Opened, spec: ModelSpec, notes: list[str]) -> Opened:
    """The weights as those of `spec`, which came from elsewhere than they."""
    return replace(opened, spec=spec, activation=_activation(spec), notes=[*notes, *check_weights(opened, spec)])


def check_weights(opened: Opened, spec: ModelSpec) -> list[str]:
    """Warnings where nobody knows whether towers of `spec` compute with these weights what they were trained for.

    Raises:
        UserError: they would compute something else.
    """
    if opened.spec is not None:
        return check_same(opened.spec, spec, opened.took)
    ours, said = _activation(spec), opened.activation
    if not has_activation(spec) or said == ours:
        return []
    if said is None:
        other = "gelu, as most since OpenAI's" if ours == "quick_gelu" else "quick_gelu, as OpenAI's"
        return [
            f"warning: {opened.took} does not say with which activation its weights were trained; model {spec.name} "
            f"computes {ours}, and features are wrong without a word if it was {other}"
        ]
    raise UserError(
        f"the weights of {opened.took} were trained with another activation than model {spec.name} computes",
        got=ours,
        expected=said,
        remedy="name their own architecture, with -quickgelu or without",
    )


def _guessed(opened: Opened) -> Opened:
    """The same with the one architecture of open_clip that the tensors fit. Raises UserError where that is not one."""
    names = architectures_of(opened.state)
    specs = {name: resolve_spec(name) for name in names}
    fitting = [name for name in names if opened.activation in (None, _activation(specs[name]))]
    if len(fitting) != 1:
        raise UserError(
            f"the architecture of {opened.took} is not known",
            got=f"tensors that fit {', '.join(fitting)}" if fitting else "tensors of none that open_clip lists",
            expected="one architecture",
            remedy=f"name it: {OPTION} NAME (finetune: architecture=NAME), an open_clip name or the path of its JSON",
        )
    spec, name = specs[fitting[0]], fitting[0]
    found = _known(opened, spec, [f"note: its tensors fit one architecture of open_clip alone, {name}"])
    return replace(found, took=f"{opened.took} as {name}")


def _activation(spec: ModelSpec) -> str:
    return "quick_gelu" if spec.model_cfg.get("quick_gelu") else "gelu"
