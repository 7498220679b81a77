"""An image classifier on the image tower: what fine-tuning trains, and evaluation, prediction and export load."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pretrain.towers.build import DualEncoder
from pretrain.towers.model import Between, Inputs, Outputs
from pretrain.towers.spec import ModelSpec

SCORES = frozenset({"classes"})


class Classifier(nn.Module):
    """Class scores of images: scale * (unit-norm feature) @ head, as the zero-shot classifier computes them. It is a
    head around the towers and not one of `Model.heads`, because checkpoints call its parameters `towers.clip.*` and
    `head.weight`.

    `scale` is the pretrained exp(logit_scale), held fixed; `head.weight` is `[classes, d]`, without a bias. `classes`
    are their names, in the order of the scores.
    """

    def __init__(self, towers: DualEncoder, classes: Sequence[str], head: torch.Tensor, scale: float):
        super().__init__()
        self.towers = towers
        self.classes = tuple(classes)
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False)
        with torch.no_grad():
            self.head.weight.copy_(head)
        self.scale = scale

    @property
    def spec(self) -> ModelSpec:
        """That of its towers."""
        return self.towers.spec

    def forward(self, inputs: Inputs, want: frozenset[str] = frozenset(), between: Between | None = None) -> Outputs:
        """As `Model.forward`; `local["classes"]`, if wanted: fp32 scores `[n, classes]` of the images."""
        outputs = self.towers(inputs, want - SCORES, between)
        if want & SCORES:
            features = outputs["rows"]["image"]
            with torch.autocast(features.device.type, enabled=False):
                outputs["local"]["classes"] = self.scale * self.head(features)
        return outputs

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """fp32 scores `[n, classes]` of uint8 images `[n, 3, h, w]`."""
        return scores_of(self, images)


def scores_of(forward: Callable[..., Outputs], images: torch.Tensor) -> torch.Tensor:
    """The scores that a classifier, or the engine that runs one, gives images."""
    return forward({"image": {"pixels": images}}, SCORES)["local"]["classes"]
