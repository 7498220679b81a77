"""What goes into a model and what comes out of it: one forward over plain dicts, encoders by field, heads by name.

Everything happens inside the one forward, because under ZeRO-3 a parameter is whole only there; inputs and outputs are
plain dicts of tensors, because ZeRO-3's hooks look into those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypedDict

import torch
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.cut import Rows

STORED = "stored"  # the encoder of a field whose `values`, `[n, d]`, are its rows as they are

Inputs = dict[str, Rows]  # by field
Between = Callable[[dict[str, torch.Tensor]], Inputs]  # rows by field -> more inputs, those that were mined by them


class Tokens(TypedDict):
    """The states of a field's tokens, `values` `[n, length, width]`, and which of them are there, `mask` bool
    `[n, length]`. Those of a text stand at the places of its tokens."""

    values: torch.Tensor
    mask: torch.Tensor


class Outputs(TypedDict):
    """`rows`: `[n, d]` by field, or by the name of a head that gives rows, which the gradient cache keeps; `shared`:
    scalars `[1]` of the whole model, such as `logit_scale`; `local`: what the other heads give by name, of this
    micro-batch alone and never kept. Heads find in it `tokens`, by field, what the encoders made of each token."""

    rows: dict[str, torch.Tensor]
    shared: dict[str, torch.Tensor]
    local: dict[str, Any]


class Model(nn.Module):
    """Encoders and heads behind one forward.

    `encoder_of` names the encoder of a field; several fields may share one, and a field without one (a label) is for
    heads and objectives to read. `sizes`: d of the fields whose encoder is STORED. `heads`: see `heads.head.Head`.
    """

    def __init__(self, encoder_of: Mapping[str, str]):
        super().__init__()
        self.encoder_of = dict(encoder_of)
        self.sizes: dict[str, int] = {}
        self.heads = nn.ModuleDict()

    def encode(self, encoder: str, rows: Rows) -> torch.Tensor:
        """Features `[n, d]` of a field's rows."""
        raise NotImplementedError

    def encode_tokens(self, encoder: str, rows: Rows) -> tuple[torch.Tensor, Tokens]:
        """The same, and what they were made of. Raises UserError where the encoder does not tell."""
        raise NotImplementedError

    def width(self, encoder: str) -> int:
        """Numbers of a token's state. Raises UserError where the encoder has none."""
        raise NotImplementedError

    def size_of(self, field: str) -> int:
        """d of the rows of a field."""
        raise NotImplementedError

    def token_embedding(self, encoder: str) -> nn.Embedding:
        """The table `[tokens, width]` of an encoder's tokens. Raises UserError where it has none."""
        raise UserError(f"the {encoder} encoder has no table of tokens")

    def shared(self) -> dict[str, torch.Tensor]:
        """Copies of the model's scalars, `[1]` each: under ZeRO-3 a parameter itself is empty after the forward."""
        return {}

    def forward(self, inputs: Inputs, want: frozenset[str] = frozenset(), between: Between | None = None) -> Outputs:
        """Rows of all fields that have an encoder, the shared scalars, and what the heads named in `want` give.

        `between` gets the rows of the fields and returns further inputs, `FIELD#NAME`: the same encoders run on them
        before the heads do. Under ZeRO-3 all ranks must call it equally often, with the same fields and the same
        `want`.
        """
        heads = sorted(
            ((name, self.heads[name]) for name in want), key=lambda item: (not _gives_rows(item[1]), item[0])
        )
        reads = frozenset().union(*(getattr(head, "reads", ()) for _, head in heads))
        rows, tokens = self._encoded(inputs, reads)
        if between is not None:
            mined = between(rows)
            more, their_tokens = self._encoded(mined, reads)
            rows, tokens, inputs = rows | more, tokens | their_tokens, inputs | mined
        outputs = Outputs(rows=rows, shared=self.shared(), local={"tokens": tokens} if reads else {})
        for name, head in heads:
            outputs["rows" if _gives_rows(head) else "local"][name] = head(outputs, inputs)
        outputs["local"].pop("tokens", None)
        return outputs

    def _encoded(self, inputs: Inputs, reads: Collection[str]) -> tuple[dict[str, torch.Tensor], dict[str, Tokens]]:
        """Rows by field, and the tokens of those fields that are in `reads`."""
        rows: dict[str, torch.Tensor] = {}
        tokens: dict[str, Tokens] = {}
        for field, own in inputs.items():
            plain = field.partition("#")[0]
            encoder = self.encoder_of.get(plain)
            if encoder == STORED:
                rows[field] = own["values"]
            elif encoder and plain in reads:
                rows[field], tokens[field] = self.encode_tokens(encoder, own)
            elif encoder:
                rows[field] = self.encode(encoder, own)
        return rows, tokens


def _gives_rows(head: nn.Module) -> bool:
    return getattr(head, "gives_rows", False)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same on `device`; copies overlap with computation where the host memory is pinned. Numbers of a micro-batch,
    0-dim, stay on the host, where reading one waits for nothing."""
    return {
        field: {name: value.to(device, non_blocking=True) if value.dim() else value for name, value in rows.items()}
        for field, rows in inputs.items()
    }
