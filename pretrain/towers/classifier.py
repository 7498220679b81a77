"""An image classifier on the image tower: what fine-tuning trains, and evaluation, prediction and export load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pretrain.towers.build import DualEncoder
from pretrain.towers.spec import ModelSpec


class Classifier(nn.Module):
    """Class scores of images: scale * (unit-norm feature) @ head, as the zero-shot classifier computes them.

    `scale` is the pretrained exp(logit_scale), held fixed; `head.weight` is `[classes, d]`, without a bias. `classes`
    are their names, in the order of the scores. `train_tower`: whether the image tower learns too.
    """

    def __init__(
        self, towers: DualEncoder, classes: Sequence[str], head: torch.Tensor, scale: float, train_tower: bool = False
    ):
        super().__init__()
        self.towers = towers
        self.classes = tuple(classes)
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False)
        with torch.no_grad():
            self.head.weight.copy_(head)
        self.scale = scale
        visual = {id(p) for p in towers.clip.visual.parameters()}
        for parameter in towers.parameters():
            parameter.requires_grad_(train_tower and id(parameter) in visual)

    @property
    def spec(self) -> ModelSpec:
        """That of its towers."""
        return self.towers.spec

    def forward(self, images: torch.Tensor, bits: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 scores `[n, classes]` of uint8 images `[n, 3, h, w]`. `bits`: see `DualEncoder.forward`."""
        features = self.towers(images, None, bits)[0]
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * self.head(features)
