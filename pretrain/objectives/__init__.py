"""Contrastive losses, exact across ranks and under gradient caching, on tiles of the similarity matrix.

A loss is a file, and a line in LOSSES that picks what it takes from the features and the settings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pretrain.config.tree import LossConfig
from pretrain.objectives.infonce import infonce
from pretrain.objectives.margin import margin_ranking
from pretrain.objectives.multi_positive import multi_positive
from pretrain.objectives.sigmoid import sigmoid


class Features(NamedTuple):
    """What the towers made of this rank's pairs, and what the batch says of them."""

    image: torch.Tensor  # unit norm, [b, d], fp32 or fp64
    text: torch.Tensor  # likewise; row i belongs to row i of `image`
    scale: torch.Tensor  # the factor on cosine similarities, [1], > 0
    bias: torch.Tensor | None = None  # added to scaled similarities, [1]; None where the model has none
    identity: torch.Tensor | None = None  # int64 [b, 2]: a hash of each image and of each text


LOSSES = {
    "infonce": lambda f, settings: infonce(f.image, f.text, f.scale, label_smoothing=settings.label_smoothing),
    "multi_positive": lambda f, settings: multi_positive(
        f.image, f.text, f.scale, f.identity, label_smoothing=settings.label_smoothing
    ),
    "sigmoid": lambda f, settings: sigmoid(f.image, f.text, f.scale, f.bias),
    "margin": lambda f, settings: margin_ranking(f.image, f.text, settings.margin, settings.negatives),
}


def contrastive_loss(features: Features, settings: LossConfig) -> torch.Tensor:
    """The loss that the settings name: this rank's share, 0-dim, whose mean over ranks is the global batch's.

    All ranks must call it, forward and backward, each with the same number of pairs. With gradients averaged over
    ranks, as DeepSpeed does, those of towers, scale and bias are those of the global batch.
    """
    return LOSSES[settings.name](features, settings)
