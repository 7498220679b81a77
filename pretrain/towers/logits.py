"""Where the logit scale and the logit bias start, and whether they learn."""

from __future__ import annotations

import math

import torch

from pretrain.objectives import ObjectiveConfig, ScaledConfig, SigmoidConfig
from pretrain.towers.build import DualEncoder

SIGMOID_TEMPERATURE = 0.1  # of the SigLIP paper (arXiv 2303.15343), where CLIP has 0.07
_FAR = math.log(10)  # from -ln(global batch): ten times too many or too few pairs taken for positives


@torch.no_grad()
def start_logits(model: DualEncoder, objective: ObjectiveConfig, global_batch: int) -> None:
    """The start of a model whose scale and bias were not trained together, where the settings are silent too: one of B
    answers is yes, so the bias is -ln B at similarities near 0, which a trained scale would make large."""
    if isinstance(objective, SigmoidConfig):
        start = model.spec.model_cfg.get("init_logit_scale", -math.log(SIGMOID_TEMPERATURE))
        model.clip.logit_scale.fill_(start)
        model.clip.logit_bias.fill_(-math.log(global_batch))
    set_logits(model, objective)


@torch.no_grad()
def set_logits(model: DualEncoder, objective: ObjectiveConfig) -> None:
    """What the settings name outranks the architecture and loaded weights; what no objective uses is frozen."""
    scale, bias = model.clip.logit_scale, getattr(model.clip, "logit_bias", None)
    scaled = isinstance(objective, ScaledConfig)
    if scaled and objective.temperature is not None:
        scale.fill_(-math.log(objective.temperature))
    scale.requires_grad_(scaled and objective.learn_temperature)
    if bias is not None:
        biased = isinstance(objective, SigmoidConfig)
        if biased and objective.logit_bias is not None:
            bias.fill_(objective.logit_bias)
        bias.requires_grad_(biased)


def warn_of_bias(objective: ObjectiveConfig, global_batch: int) -> str | None:
    """A warning where the settings start the bias far from -ln(global batch)."""
    bias, fitting = getattr(objective, "logit_bias", None), -math.log(global_batch)
    if bias is None or abs(bias - fitting) < _FAR:
        return None
    return (
        f"warning: logit_bias={bias:g} suits a global batch of {math.exp(-bias):,.0f}, this one is "
        f"{global_batch:,}: the first steps will learn the bias alone; without the setting it starts at {fitting:.1f}"
    )
