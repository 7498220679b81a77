"""torch's attention with its projections as plain linear layers, beside which matrices can be put.

`nn.MultiheadAttention` hands its weights to one function that no layer stands around: what wraps such a layer has no
place there, and ZeRO-3 never gathers what is added to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_NATIVE = {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}


class SplitAttention(nn.Module):
    """Self-attention as `attention` computes it, with its very parameters, which keep their names in the state dict. To
    be called as it is; no weights of the attention are returned."""

    def __init__(self, attention: Any):
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.in_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = weight, bias
        self.out_proj = attention.out_proj
        keep_names(self, _NATIVE)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """`[n, length, width]`, or `[length, n, width]` where `attention` takes that; a mask is `[length, length]`.
        `key` and `value` are `query`: the blocks of towers attend to themselves. (ZeRO-3 hands over views of it.)"""
        x = query if self.batch_first else query.transpose(0, 1)
        heads = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3)  # [n, heads, 3, length, width]
        q, k, v = heads.unbind(2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return x if self.batch_first else x.transpose(0, 1), None


def splits(module: nn.Module) -> bool:
    """Whether `SplitAttention` computes what `module` does."""
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.dropout == 0
    )


def keep_names(module: nn.Module, native: Mapping[str, str]) -> None:
    """Give parameters below `module` other names in state dicts: `native`, by those that they have."""

    def outward(_: nn.Module, state: dict, prefix: str, __: dict) -> None:
        for own, other in native.items():
            if prefix + own in state:
                state[prefix + other] = state.pop(prefix + own)

    def inward(_: nn.Module, state: dict, prefix: str, *__: object) -> None:
        for own, other in native.items():
            if prefix + other in state:
                state[prefix + own] = state.pop(prefix + other)

    module.register_state_dict_post_hook(outward)
    module.register_load_state_dict_pre_hook(inward)
