"""Where the logit scale and the logit bias start, and whether they learn."""

from __future__ import annotations

import math

import torch

from pretrain.config import LossConfig
from pretrain.towers.build import DualEncoder

SIGMOID_TEMPERATURE = 0.1  # of the SigLIP paper (arXiv 2303.15343), where CLIP has 0.07
_FAR = math.log(10)  # from -ln(global batch): ten times too many or too few pairs taken for positives


@torch.no_grad()
def start_logits(model: DualEncoder, loss: LossConfig, global_batch: int) -> None:
    """The start of a model that was just built, where the settings are silent too. See `set_logits`."""
    if loss.name == "sigmoid":
        if "init_logit_scale" not in model.spec.model_cfg:
            model.clip.logit_scale.fill_(-math.log(SIGMOID_TEMPERATURE))
        model.clip.logit_bias.fill_(-math.log(global_batch))
    set_logits(model, loss)


@torch.no_grad()
def set_logits(model: DualEncoder, loss: LossConfig) -> None:
    """What the settings name outranks the architecture and loaded weights; what the loss does not use is frozen."""
    scale, bias = model.clip.logit_scale, getattr(model.clip, "logit_bias", None)
    if loss.temperature is not None:
        scale.fill_(-math.log(loss.temperature))
    scale.requires_grad_(loss.learn_temperature and loss.name != "margin")
    if bias is not None:
        if loss.logit_bias is not None:
            bias.fill_(loss.logit_bias)
        bias.requires_grad_(loss.name == "sigmoid")


def doubt_bias(model: DualEncoder, loss: LossConfig, global_batch: int) -> str | None:
    """A warning where the bias does not suit the batch: one of B answers is yes, so it should be near -ln B."""
    if loss.name != "sigmoid":
        return None
    bias, fitting = float(model.clip.logit_bias.detach()), -math.log(global_batch)
    if abs(bias - fitting) < _FAR:
        return None
    return (
        f"warning: a logit bias of {bias:.1f} suits a global batch of {math.exp(-bias):,.0f}, this one is "
        f"{global_batch:,}: the first steps will learn the bias alone. Leave loss.logit_bias out for {fitting:.1f}"
    )
