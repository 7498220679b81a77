"""The tensors and small files of one checkpoint. Its manifest says which bytes are there, not that they make sense:
what is read is looked at before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data_tools.errors import UserError
from pretrain.engine.committed import MODEL, STATE, rank_files
from pretrain.engine.state import TrainState
from pretrain.towers.adapt.adapter import Adapter
from pretrain.towers.adapt.order import merge
from pretrain.towers.files import is_number, read_json
from pretrain.towers.weights_file import refuse_non_finite

_WEIGHT = "weight"


class CheckpointReader:
    """The tensors of a committed checkpoint, found by parameter name and element range.

    Raises:
        UserError: files that hold something else than a checkpoint's, here or when they are read.
    """

    def __init__(self, checkpoint: Path):
        self.folder = checkpoint
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[safe_open, int, int]]] = {}  # name -> (file, start, numel), by start
        self._keys: set[str] = set()
        for path in rank_files(checkpoint):
            try:
                file = safe_open(path, framework="pt")
                fragments = json.loads((file.metadata() or {}).get("fragments", "null"))
            except (SafetensorError, OSError, ValueError, RecursionError) as error:
                raise UserError(f"{path} is no file of a checkpoint", got=error) from None
            self._take(path, file, fragments)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[1])

    def _take(self, path: Path, file: safe_open, fragments: object) -> None:
        keys = set(file.keys())
        for name, told in fragments.items() if isinstance(fragments, dict) else [("", None)]:
            place = _place(told)
            if place is None or self.shapes.setdefault(name, place.shape) != place.shape:
                raise UserError(f"{path} does not say where in its parameter {name or 'a tensor'} lies", got=told)
            held = [key for key in keys if key.rpartition("|")[0] == name]
            odd = [key for key in held if file.get_slice(key).get_shape() != [place.numel]]
            if odd or f"{name}|{_WEIGHT}" not in keys:
                raise UserError(f"{path} does not hold {odd[0] if odd else f'{name}|{_WEIGHT}'} as it says")
            self._pieces.setdefault(name, []).append((file, place.start, place.numel))
        self._keys |= keys

    @property
    def kinds(self) -> set[str]:
        """What is kept of parameters: "weight", the optimizer's states, EMA."""
        return {key.rpartition("|")[2] for key in self._keys}

    def holds(self, name: str, kind: str) -> bool:
        """Whether there is `kind` of parameter `name`: of one that did not learn there are weights alone."""
        return f"{name}|{kind}" in self._keys

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start` .. `start + numel` of `kind` ("weight" or an optimizer state) of parameter `name`, flat."""
        parts, end = [], start
        for file, first, count in self._pieces.get(name, ()):
            low, high = max(start, first), min(start + numel, first + count)
            if low < high and low == end and f"{name}|{kind}" in file.keys():  # noqa: SIM118  (not a dict)
                parts.append(file.get_slice(f"{name}|{kind}")[low - first : high - first])
                end = high
        if end != start + numel:
            got = f"{end - start} elements from {start} on"
            raise UserError(f"checkpoint {self.folder} does not cover {name}|{kind}", got=got, expected=numel)
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def weights(self, kind: str = _WEIGHT) -> dict[str, torch.Tensor]:
        """Every parameter, whole, by the name it has in the trained module; `kind` EMA: its moving average.

        Raises:
            UserError: parts that are missing, or values that are not finite.
        """
        whole = {}
        for name, shape in self.shapes.items():
            found = kind if self.holds(name, kind) else _WEIGHT
            whole[name] = self.read(name, found, 0, math.prod(shape)).reshape(shape)
        refuse_non_finite(whole, f"checkpoint {self.folder}")
        return whole

    def load_into(self, model: nn.Module, adapters: Sequence[Adapter] = ()) -> None:
        """Give `model`, the one that was trained, its weights; with `adapters` the plain one, and what they added is
        merged into it. Raises UserError where they are another model's."""
        state, own = merge(adapters, self.weights()), dict(model.state_dict())
        odd = sorted(state.keys() ^ own.keys()) or [key for key in own if own[key].shape != state[key].shape]
        if odd:
            raise UserError(f"checkpoint {self.folder} holds other weights than its {MODEL} describes", got=odd[0])
        model.load_state_dict(state)

    def state(self) -> TrainState:
        """The run's TrainState."""
        return TrainState.from_dict(read_json(self.folder / STATE))

    def model(self) -> dict:
        """The model's description, as the job that trained it wrote it."""
        return read_json(self.folder / MODEL)


class _Place(NamedTuple):
    """Elements `start` .. `start + numel` of a parameter of `shape`."""

    start: int
    numel: int
    shape: tuple[int, ...]


def _place(told: object) -> _Place | None:
    """The place that a file tells of; None where that is no range of elements of a shape."""
    if not isinstance(told, dict) or not isinstance(told.get("shape"), list):
        return None
    start, numel, *shape = numbers = [told.get("start"), told.get("numel"), *told["shape"]]
    if not all(is_number(number) and number >= 0 for number in numbers) or start + numel > math.prod(shape):
        return None
    return _Place(start, numel, tuple(shape))
