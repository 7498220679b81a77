"""InfoNCE (CLIP, arXiv 2103.00020) in one sweep over tiles of the similarity matrix.

The tile that gives a row its log-sum-exp gives the columns their partial sums, which two all-reduces of B floats merge;
the backward computes each tile once more. So a rank spends 8 B^2 d / world FLOPs (12 where both directions are computed
apart), holds a few tiles, and sends texts only. Memory-wise it stands beside Inf-CL (arXiv 2410.17243).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pretrain.objectives import InfoNCEConfig
from pretrain.objectives.objective import SCALE, Facts, Tensors, present_of, rows_of
from pretrain.objectives.tiles import (
    Pairs,
    gather_rows,
    mean_over_ranks,
    merge_log_sum_exp,
    of_pairs,
    own_columns,
    pull_back,
    similarity_tiles,
    through_scale,
)


class InfoNCE:
    """The objective of the settings `fields` and `label_smoothing`."""

    def __init__(self, settings: InfoNCEConfig):
        self.settings = settings
        self.reads = frozenset(settings.fields)

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """See `OverBatch`."""
        fields = self.settings.fields
        return infonce(
            *rows_of(rows, fields),
            shared[SCALE],
            label_smoothing=self.settings.label_smoothing,
            present=present_of(facts, fields),
        )


def infonce(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's pairs against all pairs of all ranks.

    All ranks must call it (forward and backward), each with the same number of pairs.

    Args:
        image: unit-norm features `[b, d]`, fp32 or fp64; row i belongs to row i of `text`.
        text: unit-norm features `[b, d]`.
        scale: the factor on cosine similarities, `[1]`, > 0.
        label_smoothing: share of the target that is spread over all pairs of the global batch (arXiv 1512.00567).
        present: which of this rank's pairs count, bool `[b]`; none may. None: all.

    Returns:
        The mean over this rank's pairs (with `present` its share of the mean over all that count), 0-dim. The mean over
        ranks is the loss of the global batch; and with gradients averaged over ranks, as DeepSpeed does, the gradients
        of towers and scale are those of the global batch.
    """
    return of_pairs(_InfoNCE, image, text, scale, label_smoothing, present=present)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, label_smoothing, pairs):
        texts = gather_rows(text)  # [B, d]
        row, column = log_sum_exps(image, texts, scale, pairs)  # [b], [B]
        smoothing = Smoothing(image, texts, label_smoothing, pairs)
        ctx.save_for_backward(image, text, texts, scale, row, column)
        ctx.smoothing, ctx.pairs = smoothing, pairs
        positive = 2 * (1 - label_smoothing) * scale * (image * text).sum(dim=1)  # [b]
        loss = pairs.mean(row + own_columns(column, len(image)) - positive) / 2
        return loss - smoothing.loss(image, text, scale)

    @staticmethod
    def backward(ctx, grad):
        image, text, texts, scale, row, column = ctx.saved_tensors
        grad_image, grad_text = pull_back(image, texts, softmax_weights(scale, row, column, ctx.pairs))
        grad_image.sub_(text, alpha=2 * (1 - ctx.smoothing.share))
        grad_text.sub_(image, alpha=2 * (1 - ctx.smoothing.share))
        ctx.smoothing.subtract_from(grad_image, grad_text)
        return *through_scale(image, scale, grad_image, grad_text, grad / (2 * ctx.pairs.count)), None, None


def log_sum_exps(
    image: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    pairs: Pairs,
    visit: Callable[[slice, torch.Tensor], None] = lambda tile, similarity: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of every row `[b]` and, over all ranks, of every column `[B]` of the scaled similarities; 0 for pairs
    that are absent.

    `visit` sees each tile of scaled similarities on the way. All ranks must call it.
    """
    row_max = image.new_full((len(image),), -torch.inf)
    row_sum = image.new_zeros(len(image))
    column_max = image.new_empty(len(texts))
    column_sum = image.new_empty(len(texts))
    for tile, similarity in similarity_tiles(image, texts):
        pairs.hide(similarity.mul_(scale), tile)
        visit(tile, similarity)
        new_max = torch.maximum(row_max, similarity.amax(dim=1))
        row_sum = row_sum * (row_max - new_max).exp() + (similarity - new_max[:, None]).exp_().sum(dim=1)
        row_max = new_max
        column_max[tile] = similarity.amax(dim=0)
        column_sum[tile] = similarity.sub_(column_max[tile]).exp_().sum(dim=0)
    column = merge_log_sum_exp(column_max, column_sum)
    return pairs.keep_own(row_max + row_sum.log()), pairs.keep_all(column)


def softmax_weights(
    scale: torch.Tensor, row: torch.Tensor, column: torch.Tensor, pairs: Pairs
) -> Callable[[slice, torch.Tensor], torch.Tensor]:
    """For `pull_back`: the probabilities that a tile's texts have for its images, and its images for its texts."""

    def weigh(tile: slice, similarity: torch.Tensor) -> torch.Tensor:
        pairs.hide(similarity.mul_(scale), tile)
        weight = (similarity - row[:, None]).exp_()
        weight += similarity.sub_(column[tile]).exp_()
        return weight

    return weigh


class Smoothing:
    """The `share` of the target that is spread over all pairs: it needs the mean image and text of all ranks alone, so
    the sweep knows nothing of it. All ranks must make it."""

    def __init__(self, image: torch.Tensor, texts: torch.Tensor, share: float, pairs: Pairs):
        self.share, self._pairs, self._means = share, pairs, None
        if share:  # features of absent pairs are zeros, so the means of all are those of the others but for the count
            here = pairs.count / len(image)
            self._means = mean_over_ranks(image.mean(dim=0)) / here, texts.mean(dim=0) / here  # [d], [d]

    def loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | float:
        """What it takes off the loss, 0-dim."""
        if self._means is None:
            return 0.0
        image_mean, text_mean = self._means
        by_image, by_text = self._pairs.mean(image @ text_mean), self._pairs.mean(text @ image_mean)
        return self.share * scale.squeeze() * (by_image + by_text) / 2

    def subtract_from(self, grad_image: torch.Tensor, grad_text: torch.Tensor) -> None:
        """Its part of the gradients, before they go through the scale."""
        if self._means is not None:
            grad_text -= 2 * self.share * self._means[0]
            grad_image -= 2 * self.share * self._means[1]
