"""Where the logit scale and the logit bias start, and whether they learn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from pretrain.objectives import ObjectiveConfig, ScaledConfig, SigmoidConfig
from pretrain.towers.build import DualEncoder

SIGMOID_TEMPERATURE = 0.1  # of the SigLIP paper (arXiv 2303.15343), where CLIP has 0.07
_FAR = math.log(10)  # from -ln(global batch): ten times too many or too few pairs taken for positives


def biased(objectives: Mapping[str, ObjectiveConfig]) -> bool:
    """Whether one of the objectives uses a bias."""
    return any(isinstance(one, SigmoidConfig) for one in objectives.values())


@torch.no_grad()
def start_logits(model: DualEncoder, objectives: Mapping[str, ObjectiveConfig], global_batch: int) -> None:
    """The start of a model whose scale and bias were not trained together, where the settings are silent too: one of B
    answers is yes, so the bias is -ln B at similarities near 0, which a trained scale would make large."""
    if biased(objectives):
        start = model.spec.model_cfg.get("init_logit_scale", -math.log(SIGMOID_TEMPERATURE))
        model.clip.logit_scale.fill_(start)
        model.clip.logit_bias.fill_(-math.log(global_batch))
    set_logits(model, objectives)


@torch.no_grad()
def set_logits(model: DualEncoder, objectives: Mapping[str, ObjectiveConfig]) -> None:
    """What the settings name outranks the architecture and loaded weights; what no objective uses is frozen. All that
    scale share the one scale, and are asked for one temperature by the rules of the settings."""
    scale, bias = model.clip.logit_scale, getattr(model.clip, "logit_bias", None)
    scaled = [one for one in objectives.values() if isinstance(one, ScaledConfig)]
    for one in scaled:
        if one.temperature is not None:
            scale.fill_(-math.log(one.temperature))
    scale.requires_grad_(any(one.learn_temperature for one in scaled))
    if bias is not None:
        for one in scaled:
            if isinstance(one, SigmoidConfig) and one.logit_bias is not None:
                bias.fill_(one.logit_bias)
        bias.requires_grad_(biased(objectives))


def warn_of_bias(objectives: Mapping[str, ObjectiveConfig], global_batch: int) -> str | None:
    """A warning where the settings start the bias far from -ln(global batch)."""
    given = [getattr(one, "logit_bias", None) for one in objectives.values()]
    bias, fitting = next((one for one in given if one is not None), None), -math.log(global_batch)
    if bias is None or abs(bias - fitting) < _FAR:
        return None
    return (
        f"warning: logit_bias={bias:g} suits a global batch of {math.exp(-bias):,.0f}, this one is "
        f"{global_batch:,}: the first steps will learn the bias alone; without the setting it starts at {fitting:.1f}"
    )
