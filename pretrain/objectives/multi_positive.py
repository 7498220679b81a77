"""InfoNCE where several pairs of the batch may belong together (UniCL, arXiv 2204.03610).

Two pairs that share an image or a text are each other's positives: the five captions of a photo, or one caption of many
pictures, are no negatives. The target of a row is spread evenly over its positives, that of a column likewise. Costs
are those of InfoNCE, and 20 B bytes more on the wire for who is who.
"""

from __future__ import annotations

import torch

from pretrain.objectives.infonce import (
    Smoothing,
    log_sum_exps,
    softmax_weights,
)
from pretrain.objectives.tiles import column_tiles, gather_rows, of_pairs, own_columns, pull_back, through_scale


def multi_positive(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    identity: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's pairs against all pairs of all ranks, with all positives of each.

    Where no image and no text comes twice it is `infonce`, whose arguments and ranks it shares. Of the result only the
    mean over ranks has a meaning: it is the loss of the global batch.

    Args:
        identity: int64 `[b, 2]`, equal in the first column where two images are one, in the second where two texts are.
    """
    return of_pairs(_MultiPositive, image, text, scale, identity, label_smoothing)


class _MultiPositive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, identity, label_smoothing):
        texts = gather_rows(text)  # [B, d]
        targets = _Targets(identity, image.dtype)
        positive = image.new_zeros(len(image))

        def visit(tile, similarity):
            positive.add_((similarity * targets(tile)).sum(dim=1))

        row, column = log_sum_exps(image, texts, scale, visit)  # [b], [B]
        smoothing = Smoothing(image, texts, label_smoothing)
        ctx.save_for_backward(image, texts, scale, row, column)
        ctx.targets, ctx.smoothing = targets, smoothing
        loss = (row + own_columns(column, len(image)) - (1 - label_smoothing) * positive).mean() / 2
        return loss - smoothing.loss(image, text, scale)

    @staticmethod
    def backward(ctx, grad):
        image, texts, scale, row, column = ctx.saved_tensors
        softmax = softmax_weights(scale, row, column)

        def weigh(tile, similarity):
            return softmax(tile, similarity).sub_(ctx.targets(tile), alpha=1 - ctx.smoothing.share)

        grad_image, grad_text = pull_back(image, texts, weigh)
        ctx.smoothing.subtract_from(grad_image, grad_text)
        return *through_scale(image, scale, grad_image, grad_text, grad / (2 * len(image))), None, None


class _Targets:
    """The share that each pair of a tile has in its row's target plus the one that it has in its column's, `[b, n]`."""

    def __init__(self, identity: torch.Tensor, dtype: torch.dtype):
        self._own, self._all = identity, gather_rows(identity)  # [b, 2], [B, 2]
        count = identity.new_zeros(len(identity))
        for tile in column_tiles(len(identity), len(self._all)):
            count += self._together(tile).sum(dim=1)
        self._row = count.to(dtype).reciprocal_()  # a pair belongs to itself, so no count is 0
        self._column = gather_rows(self._row)  # belonging together is mutual

    def __call__(self, tile: slice) -> torch.Tensor:
        return self._together(tile) * (self._row[:, None] + self._column[tile])

    def _together(self, tile: slice) -> torch.Tensor:
        """Whether the pairs of a tile share their image or their text, bool `[b, n]`."""
        same = self._own[:, None, 0] == self._all[tile, 0]
        same |= self._own[:, None, 1] == self._all[tile, 1]
        return same
