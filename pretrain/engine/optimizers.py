"""The optimizers. ZeRO cuts parameters into flat shards, which AdamW and Lion update as they would the whole: their
update of an element looks at no other. LAMB and Muon look at whole matrices and need stage 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pretrain.config.tree import PlainOptimConfig
from pretrain.process.precision import matrix_dtype

# Tensors that each keeps, as large as a parameter; Muon of the parameters that it leaves to AdamW.
STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "muon": ("exp_avg", "exp_avg_sq"),
}
_MUON_STATES = ("momentum_buffer",)


def make_optimizer(groups: list[dict], optim: PlainOptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the settings over `groups`: AdamW (arXiv 1711.05101), or from timm Lion (arXiv 2302.06675), LAMB
    (arXiv 1904.00962) or Muon (arXiv 2502.16982: its update has the size of AdamW's, so the rates are AdamW's too).
    `device`: where it will run. All ranks must call it."""
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    from timm.optim import Lamb, Lion

    if optim.name == "lion":
        return Lion(groups, lr=optim.lr, betas=optim.betas)
    if optim.name == "lamb":  # which would clip by itself
        return Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, max_grad_norm=None)
    from pretrain.engine.muon import Muon

    return Muon(groups, matrix_dtype(device), lr=optim.lr, betas=optim.betas)


def states_of(name: str, group: dict) -> tuple[str, ...]:
    """The tensors that optimizer `name` keeps of each parameter of `group`."""
    return _MUON_STATES if group.get("use_muon") else STATES[name]


def all_states(name: str, groups: Sequence[dict]) -> set[str]:
    """Those that it keeps of any parameter."""
    return {state for group in groups for state in states_of(name, group)}
