"""Which parameters decay."""

from __future__ import annotations

from torch import nn

from pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict]:
    """Two AdamW groups: matrices decay; vectors, scalars (norms, biases, logit scale) and what a tower names in
    `no_weight_decay()` (position and class embeddings; unless `optim.decay_embeddings`) do not."""
    exempt = set()
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay") and not optim.decay_embeddings:
            exempt |= {f"{prefix}.{name}".lstrip(".") for name in module.no_weight_decay()}
    decay, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or name in exempt else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
