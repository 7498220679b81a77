"""The loss that a run trains, on a corpus that it does not train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist

from pretrain.evaluate.features import CorpusFeatures
from pretrain.objectives import ObjectiveConfig
from pretrain.objectives.objective import OverBatch, build
from pretrain.objectives.tiles import alone
from pretrain.process.runtime import Runtime


def pair_loss(
    features: CorpusFeatures, objectives: Mapping[str, ObjectiveConfig], images: torch.Tensor, texts: torch.Tensor
) -> torch.Tensor:
    """What training minimises, 0-dim, fp64, for the batch of pairs of these rows, int64 [n] each: the weighted sum of
    `objectives`, with the logit scale and bias of the weights that are evaluated. No collective."""
    rows = {"image": features.images[images].double(), "text": features.texts[texts].double()}
    shared = {name: rows["image"].new_tensor([value]) for name, value in features.shared.items()}
    facts: dict[str, dict[str, torch.Tensor]] = {}
    if features.hashes is not None:
        hashes = features.hashes[0][images], features.hashes[1][texts]
        facts = {field: {"identity": own} for field, own in zip(rows, hashes, strict=True)}
    with alone():
        losses = [
            one.weight * cast(OverBatch, one.objective).loss(rows, shared, facts)  # `objectives.of_features` sees to it
            for one in build(objectives).values()
        ]
    return torch.stack(losses).sum()


@torch.no_grad()
def validation_loss(
    features: CorpusFeatures, objectives: Mapping[str, ObjectiveConfig], ranks: Runtime, batch: int
) -> float:
    """The loss of consecutive batches of (image, its first caption) in corpus order, averaged. Every rank must call it,
    with the same features; they take turns with the batches, and the value is the same at any world size.

    A last batch that is not full is left out, for its loss is lower; a corpus smaller than `batch` is one batch.
    """
    positions, rows = features.first_captions()
    batch = min(batch, len(rows))
    losses = torch.zeros(len(rows) // batch, dtype=torch.float64, device=features.images.device)
    for number in range(ranks.rank, len(losses), ranks.world_size):
        pairs = slice(number * batch, (number + 1) * batch)
        losses[number] = pair_loss(features, objectives, positions[pairs], rows[pairs])
    if ranks.world_size > 1:
        dist.all_reduce(losses)
    return losses.mean().item()
