"""InfoNCE where several pairs of the batch may belong together (UniCL, arXiv 2204.03610).

Two pairs that share an image or a text are each other's positives: the five captions of a photo, or one caption of many
pictures, are no negatives. The target of a row is spread evenly over its positives, that of a column likewise. Costs
are those of InfoNCE, and 20 B bytes more on the wire for who is who.
"""

from __future__ import annotations

import torch

from pretrain.objectives import MultiPositiveConfig
from pretrain.objectives.infonce import (
    Smoothing,
    log_sum_exps,
    softmax_weights,
)
from pretrain.objectives.objective import SCALE, Facts, Tensors, present_of, rows_of
from pretrain.objectives.tiles import (
    Pairs,
    column_tiles,
    gather_rows,
    of_pairs,
    own_columns,
    pull_back,
    sharing,
    through_scale,
)


class MultiPositive:
    """The objective of the settings `fields` and `label_smoothing`."""

    def __init__(self, settings: MultiPositiveConfig):
        self.settings = settings
        self.reads = frozenset(settings.fields)

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """See `OverBatch`; every row has an `identity`."""
        fields = self.settings.fields
        return multi_positive(
            *rows_of(rows, fields),
            shared[SCALE],
            torch.stack([facts[field]["identity"] for field in fields], dim=1),
            label_smoothing=self.settings.label_smoothing,
            present=present_of(facts, fields),
        )


def multi_positive(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    identity: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's pairs against all pairs of all ranks, with all positives of each.

    Where no image and no text comes twice it is `infonce`, whose arguments and ranks it shares. Of the result only the
    mean over ranks has a meaning: it is the loss of the global batch.

    Args:
        identity: int64 `[b, 2]`, equal in the first column where two images are one, in the second where two texts are.
    """
    return of_pairs(_MultiPositive, image, text, scale, identity, label_smoothing, present=present)


class _MultiPositive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, identity, label_smoothing, pairs):
        texts = gather_rows(text)  # [B, d]
        targets = _Targets(identity, image.dtype, pairs)
        positive = image.new_zeros(len(image))

        def visit(tile, similarity):
            positive.add_((similarity * targets(tile)).sum(dim=1))

        row, column = log_sum_exps(image, texts, scale, pairs, visit)  # [b], [B]
        smoothing = Smoothing(image, texts, label_smoothing, pairs)
        ctx.save_for_backward(image, texts, scale, row, column)
        ctx.targets, ctx.smoothing, ctx.pairs = targets, smoothing, pairs
        loss = pairs.mean(row + own_columns(column, len(image)) - (1 - label_smoothing) * positive) / 2
        return loss - smoothing.loss(image, text, scale)

    @staticmethod
    def backward(ctx, grad):
        image, texts, scale, row, column = ctx.saved_tensors
        softmax = softmax_weights(scale, row, column, ctx.pairs)

        def weigh(tile, similarity):
            return softmax(tile, similarity).sub_(ctx.targets(tile), alpha=1 - ctx.smoothing.share)

        grad_image, grad_text = pull_back(image, texts, weigh)
        ctx.smoothing.subtract_from(grad_image, grad_text)
        return *through_scale(image, scale, grad_image, grad_text, grad / (2 * ctx.pairs.count)), None, None, None


class _Targets:
    """The share that each pair of a tile has in its row's target plus the one that it has in its column's, `[b, n]`."""

    def __init__(self, identity: torch.Tensor, dtype: torch.dtype, pairs: Pairs):
        self._pairs = pairs
        self._own, self._all = identity, gather_rows(identity)  # [b, 2], [B, 2]
        count = identity.new_zeros(len(identity))
        for tile in column_tiles(len(identity), len(self._all)):
            count += self._sharing(tile).sum(dim=1)
        self._row = pairs.keep_own(count.to(dtype).reciprocal_())  # a pair belongs to itself, so none has a count of 0
        self._column = gather_rows(self._row)  # belonging together is mutual

    def __call__(self, tile: slice) -> torch.Tensor:
        return self._sharing(tile) * (self._row[:, None] + self._column[tile])

    def _sharing(self, tile: slice) -> torch.Tensor:
        """Whether the pairs of a tile share their image or their text, bool `[b, n]`."""
        return self._pairs.strike(sharing(self._own, self._all, tile), tile)
