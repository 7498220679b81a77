"""The loss that a run trains, on a corpus that it does not train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from pretrain.evaluate.features import CorpusFeatures, Ranks
from pretrain.objectives import InfoNCEConfig, ObjectiveConfig, PairsConfig
from pretrain.objectives.objective import BIAS, SCALE, build
from pretrain.objectives.tiles import alone

LOSS_BATCH = 256  # pairs in one validation batch; the loss grows with it, so it is part of the result


@dataclass(frozen=True)
class PairLoss:
    """A contrastive loss with the logit scale and bias of the weights that are evaluated: what training computes of a
    batch, here of a part of a corpus. Of several objectives it is the weighted sum of those over pairs of an image and
    a text, for features alone say nothing of others. The default settings are InfoNCE (CLIP)."""

    scale: float
    bias: float | None = None
    settings: Mapping[str, ObjectiveConfig] = field(default_factory=lambda: {"infonce": InfoNCEConfig()})

    def __call__(self, features: CorpusFeatures, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """The loss, 0-dim, fp64, of the batch of pairs of these rows, int64 [n] each. No collective."""
        rows = {"image": features.images[images].double(), "text": features.texts[texts].double()}
        scalars = {SCALE: self.scale} | ({} if self.bias is None else {BIAS: self.bias})
        shared = {name: rows["image"].new_tensor([value]) for name, value in scalars.items()}
        facts: dict[str, dict[str, torch.Tensor]] = {}
        if features.hashes is not None:
            hashes = features.hashes[0][images], features.hashes[1][texts]
            facts = {field: {"identity": own} for field, own in zip(rows, hashes, strict=True)}
        over = build(of_features(self.settings)).values()
        with alone():
            return sum(
                (one.weight * one.objective.loss(rows, shared, facts) for one in over), rows["image"].new_zeros(())
            )


def of_features(objectives: Mapping[str, ObjectiveConfig]) -> dict[str, ObjectiveConfig]:
    """Those of the objectives that are over pairs of an image and a text, and so have a value for features alone."""
    pairs = {name: one for name, one in objectives.items() if isinstance(one, PairsConfig)}
    return {name: one for name, one in pairs.items() if set(one.fields) == {"image", "text"}}


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
