"""Contrastive losses, exact across ranks and under gradient caching: what each takes of the features and settings."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pretrain.objectives import (
    OBJECTIVES,
    InfoNCEConfig,
    MarginConfig,
    MultiPositiveConfig,
    ObjectiveConfig,
    SigmoidConfig,
)
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

    @classmethod
    def of(
        cls, rows: dict[str, torch.Tensor], shared: dict[str, torch.Tensor], identity: torch.Tensor | None = None
    ) -> Features:
        """Those of a model's outputs."""
        return cls(rows["image"], rows["text"], shared["logit_scale"], shared.get("logit_bias"), identity)


def of_infonce(features: Features, settings: InfoNCEConfig) -> torch.Tensor:
    """See `contrastive_loss`."""
    return infonce(features.image, features.text, features.scale, label_smoothing=settings.label_smoothing)


def of_multi_positive(features: Features, settings: MultiPositiveConfig) -> torch.Tensor:
    """See `contrastive_loss`."""
    assert features.identity is not None
    pairs = features.image, features.text, features.scale, features.identity
    return multi_positive(*pairs, label_smoothing=settings.label_smoothing)


def of_sigmoid(features: Features, settings: SigmoidConfig) -> torch.Tensor:
    """See `contrastive_loss`."""
    assert features.bias is not None
    return sigmoid(features.image, features.text, features.scale, features.bias)


def of_margin(features: Features, settings: MarginConfig) -> torch.Tensor:
    """See `contrastive_loss`."""
    return margin_ranking(features.image, features.text, settings.margin, settings.negatives)


def contrastive_loss(features: Features, settings: ObjectiveConfig) -> torch.Tensor:
    """The objective of the settings, times its weight: this rank's share, 0-dim, whose mean over ranks is the global
    batch's.

    All ranks must call it, forward and backward, each with the same number of pairs. With gradients averaged over
    ranks, as DeepSpeed does, those of towers, scale and bias are those of the global batch.
    """
    loss = OBJECTIVES[settings.type].load()(features, settings)
    return loss if settings.weight == 1 else settings.weight * loss
