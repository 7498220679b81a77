"""What goes into a model and what comes out of it: one forward over plain dicts, encoders by field, heads by name.

Everything happens inside the one forward, because under ZeRO-3 a parameter is whole only there; inputs and outputs are
plain dicts of tensors, because ZeRO-3's hooks look into those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import nn

from pretrain.towers.cut import Rows

Inputs = dict[str, Rows]  # by field
Between = Callable[[dict[str, torch.Tensor]], Inputs]  # rows by field -> more inputs, those that were mined by them


class Outputs(TypedDict):
    """`rows`: `[n, d]` by field, which the gradient cache keeps; `shared`: scalars `[1]` of the whole model, such as
    `logit_scale`; `local`: what the heads give by name, of this micro-batch alone and never kept."""

    rows: dict[str, torch.Tensor]
    shared: dict[str, torch.Tensor]
    local: dict[str, Any]


class Model(nn.Module):
    """Encoders and heads behind one forward.

    `encoder_of` names the encoder of a field; several fields may share one, and a field without one (a label) is for
    heads and objectives to read. `heads`: modules called as `head(outputs, inputs)`, whose result is `local[name]`.
    """

    def __init__(self, encoder_of: Mapping[str, str]):
        super().__init__()
        self.encoder_of = dict(encoder_of)
        self.heads = nn.ModuleDict()

    def encode(self, encoder: str, rows: Rows) -> torch.Tensor:
        """Features `[n, d]` of a field's rows."""
        raise NotImplementedError

    def shared(self) -> dict[str, torch.Tensor]:
        """Copies of the model's scalars, `[1]` each: under ZeRO-3 a parameter itself is empty after the forward."""
        return {}

    def forward(self, inputs: Inputs, want: frozenset[str] = frozenset(), between: Between | None = None) -> Outputs:
        """Rows of all fields that have an encoder, the shared scalars, and what the heads named in `want` give.

        `between` gets the rows and returns further inputs, `FIELD#NAME`: the same encoders run on them before the
        heads do. Under ZeRO-3 all ranks must call it equally often, with the same fields and the same `want`.
        """
        rows = self._rows(inputs)
        if between is not None:
            mined = between(rows)
            rows |= self._rows(mined)
            inputs = inputs | mined
        outputs = Outputs(rows=rows, shared=self.shared(), local={})
        for name in sorted(want):
            outputs["local"][name] = self.heads[name](outputs, inputs)
        return outputs

    def _rows(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        encoders = {field: self.encoder_of.get(field.partition("#")[0]) for field in inputs}
        return {field: self.encode(encoder, inputs[field]) for field, encoder in encoders.items() if encoder}


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same on `device`; copies overlap with computation where the host memory is pinned."""
    return {
        field: {name: value.to(device, non_blocking=True) for name, value in rows.items()}
        for field, rows in inputs.items()
    }
