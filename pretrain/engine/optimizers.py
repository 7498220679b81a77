"""The optimizers. ZeRO cuts parameters into flat shards, so only those are here whose update of an element looks at no
other (LAMB and Muon look at whole matrices); a shard is then updated as the whole would be."""

from __future__ import annotations

import torch

from pretrain.config import OptimConfig

STATES = {"adamw": {"exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"}}  # tensors that each keeps, as large as a parameter


def make_optimizer(groups: list[dict], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of the settings over `groups`: AdamW (arXiv 1711.05101), or Lion (arXiv 2302.06675) from timm."""
    if optim.name == "lion":
        from timm.optim import Lion

        return Lion(groups, lr=optim.lr, betas=optim.betas)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
