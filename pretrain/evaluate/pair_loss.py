"""The loss that a run trains, on a corpus that it does not train on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from pretrain.evaluate.features import CorpusFeatures, Ranks
from pretrain.objectives import InfoNCEConfig, ObjectiveConfig
from pretrain.objectives.contrastive import Features, contrastive_loss
from pretrain.objectives.tiles import alone

LOSS_BATCH = 256  # pairs in one validation batch; the loss grows with it, so it is part of the result


@dataclass(frozen=True)
class PairLoss:
    """A contrastive loss with the logit scale and bias of the weights that are evaluated: what training computes of a
    batch, here of a part of a corpus. The default settings are InfoNCE (CLIP)."""

    scale: float
    bias: float | None = None
    settings: ObjectiveConfig = field(default_factory=InfoNCEConfig)

    def __call__(self, features: CorpusFeatures, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The loss, 0-dim, fp64, of the batch of pairs of these rows, int64 [n] each. No collective."""
        image, text = features.images[images].double(), features.texts[texts].double()
        scale, bias = (None if value is None else image.new_tensor([value]) for value in (self.scale, self.bias))
        identity = features.hashes and torch.stack([features.hashes[0][images], features.hashes[1][texts]], dim=1)
        with alone():
            return contrastive_loss(Features(image, text, scale, bias, identity), self.settings)


@torch.no_grad()
def validation_loss(features: CorpusFeatures, objective: PairLoss, ranks: Ranks, batch: int = LOSS_BATCH) -> float:
    """The loss of consecutive batches of (image, its first caption) in corpus order, averaged. Every rank must call it,
    with the same features; they take turns with the batches, and the value is the same at any world size.

    A last batch that is not full is left out, for its loss is lower; a corpus smaller than `batch` is one batch.
    """
    positions, rows = features.first_captions()
    batch = min(batch, len(rows))
    losses = torch.zeros(len(rows) // batch, dtype=torch.float64, device=features.images.device)
    for number in range(ranks.rank, len(losses), ranks.world_size):
        pairs = slice(number * batch, (number + 1) * batch)
        losses[number] = objective(features, positions[pairs], rows[pairs])
    if ranks.world_size > 1:
        dist.all_reduce(losses)
    return losses.mean().item()
