"""The sigmoid loss (SigLIP, arXiv 2303.15343): every image with every text is a question of its own, yes or no.

No row or column is summed up for another rank, so beside the texts nothing is sent. Like InfoNCE here it keeps no tile:
the backward computes each once more, 8 B^2 d / world FLOPs in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.objectives import SigmoidConfig
from pretrain.objectives.objective import BIAS, SCALE, Facts, Tensors, present_of, rows_of
from pretrain.objectives.tiles import (
    Pairs,
    gather_rows,
    of_pairs,
    own_pairs,
    pull_back,
    similarity_tiles,
    through_scale,
)


class Sigmoid:
    """The objective of the settings `fields`."""

    def __init__(self, settings: SigmoidConfig):
        self.settings = settings
        self.reads = frozenset(settings.fields)

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """See `OverBatch`."""
        fields, present = self.settings.fields, present_of(facts, self.settings.fields)
        return sigmoid(*rows_of(rows, fields), shared[SCALE], shared[BIAS], present=present)


def sigmoid(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over all texts of all ranks of -log sigmoid(+-(scale * cosine + bias)), + for the pair and - for all others.

    Arguments, result and ranks are `infonce`'s. The mean is over images, as in the paper, so the loss grows with the
    global batch unless `bias`, `[1]`, fits it: about -ln(global batch).
    """
    return of_pairs(_Sigmoid, image, text, scale, bias, present=present)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias, pairs):
        texts = gather_rows(text)  # [B, d]
        loss = image.new_zeros(len(image))
        for tile, similarity in similarity_tiles(image, texts):
            loss -= F.logsigmoid(_wrong(tile, similarity, scale, bias, pairs).neg_()).sum(dim=1)
        ctx.save_for_backward(image, texts, scale, bias)
        ctx.pairs = pairs
        return pairs.mean(loss)

    @staticmethod
    def backward(ctx, grad):
        image, texts, scale, bias = ctx.saved_tensors
        grad_bias = torch.zeros_like(bias)

        def weigh(tile, similarity):
            weight = _wrong(tile, similarity, scale, bias, ctx.pairs).sigmoid_()
            own_pairs(weight, tile).neg_()
            grad_bias.add_(weight.sum())
            return weight

        grad_image, grad_text = pull_back(image, texts, weigh)
        factor = grad / ctx.pairs.count
        return *through_scale(image, scale, grad_image, grad_text, factor), grad_bias * factor, None


def _wrong(
    tile: slice, similarity: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """The logit of the wrong answer for each entry of a tile, in place of its similarities."""
    logits = similarity.mul_(scale).add_(bias)
    own_pairs(logits, tile).neg_()
    return pairs.hide(logits, tile)
