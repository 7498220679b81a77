"""Which parameters decay, and at which share of the learning rate each learns."""

from __future__ import annotations

from torch import nn

from pretrain.config.tree import PartConfig, PlainOptimConfig
from pretrain.towers.parts import in_block, layers_above, tower_of


def parameter_groups(model: nn.Module, optim: PlainOptimConfig) -> list[dict]:
    """Groups of the parameters that learn, with their `weight_decay` and `lr_scale`, the factor on the rate.

    Matrices decay; vectors, scalars (norms, biases, logit scale) and what a tower names in `no_weight_decay()`
    (position and class embeddings; unless `optim.decay_embeddings`) do not. Rates differ by `optim.parts` and, by
    `optim.layer_decay`, by layer. For Muon, `use_muon` marks the matrices of layers: embeddings, projections and
    vectors are AdamW's.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    above = layers_above(names) if optim.layer_decay != 1 else dict.fromkeys(names, 0)
    exempt = set() if optim.decay_embeddings else _exempt(model)
    groups: dict[tuple[float, bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = optim.parts.get(tower_of(name), PartConfig())
        scale = _either(part.lr, optim.lr) / optim.lr * optim.layer_decay ** above[name]
        plain = parameter.ndim < 2 or name in exempt
        decay = 0.0 if plain else _either(part.weight_decay, optim.weight_decay)
        inner = optim.name == "muon" and parameter.ndim == 2 and in_block(name)
        groups.setdefault((scale, plain, decay, inner), []).append(parameter)
    ordered = sorted(groups, key=lambda key: (-key[0], *key[1:]))
    return [
        {"params": groups[key], "lr_scale": key[0], "weight_decay": key[2]}
        | ({"use_muon": key[3]} if optim.name == "muon" else {})
        for key in ordered
    ]


def _exempt(model: nn.Module) -> set[str]:
    found = set()
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            found |= {f"{prefix}.{name}".lstrip(".") for name in module.no_weight_decay()}
    return found


def _either(value: float | None, default: float) -> float:
    return default if value is None else value
