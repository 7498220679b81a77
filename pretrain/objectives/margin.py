"""Margin ranking (VSE++, arXiv 1707.05612): a pair must be more similar than its negatives, by a margin.

Either all negatives count, or of each image and each text only the hardest in the global batch.
"""

from __future__ import annotations

import torch

from pretrain.objectives import MarginConfig
from pretrain.objectives.objective import Facts, Tensors, present_of, rows_of
from pretrain.objectives.tiles import (
    Pairs,
    gather_rows,
    merge_arg_max,
    of_pairs,
    own_pairs,
    pull_back,
    scatter_sum,
    similarity_tiles,
    world,
)


class Margin:
    """The objective of the settings `fields`, `margin` and `negatives`."""

    def __init__(self, settings: MarginConfig):
        self.settings = settings
        self.reads = frozenset(settings.fields)

    def loss(self, rows: Tensors, shared: Tensors, facts: Facts) -> torch.Tensor:
        """See `OverBatch`."""
        settings = self.settings
        present = present_of(facts, settings.fields)
        pair = rows_of(rows, settings.fields)
        return margin_ranking(*pair, settings.margin, settings.negatives, present=present)


def margin_ranking(
    image: torch.Tensor, text: torch.Tensor, margin: float, negatives: str, *, present: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over this rank's pairs of max(0, margin + cosine of a negative - cosine of the pair), in both directions.

    Arguments, result and ranks are `infonce`'s; there is no scale. `negatives`: `sum` adds the hinges of all negatives
    of the global batch (8 B^2 d / world FLOPs); `hardest` takes the largest, among equals the first (2 B^2 d / world,
    for its backward is sparse; on GPUs gradients of a feature that is the hardest of several add up in no fixed order).
    """
    return of_pairs({"sum": _Sum, "hardest": _Hardest}[negatives], image, text, margin, present=present)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, margin, pairs):
        texts, own, all_own = _gather(image, text, margin)
        loss = image.new_zeros(len(image))
        for tile, similarity in similarity_tiles(image, texts):
            pairs.hide(_negatives(similarity, tile), tile)
            loss += (similarity - own[:, None]).relu_().sum(dim=1)
            loss += similarity.sub_(all_own[tile]).relu_().sum(dim=1)
        ctx.save_for_backward(image, text, texts, own, all_own)
        ctx.pairs = pairs
        return pairs.mean(loss) / 2

    @staticmethod
    def backward(ctx, grad):
        image, text, texts, own, all_own = ctx.saved_tensors
        of_rows, of_columns = torch.zeros_like(own), torch.zeros_like(all_own)  # hinges that are not 0

        def weigh(tile, similarity):
            ctx.pairs.hide(_negatives(similarity, tile), tile)
            weight = (similarity > own[:, None]).to(image.dtype)
            by_column = similarity > all_own[tile]
            of_rows.add_(weight.sum(dim=1))
            of_columns[tile] = by_column.sum(dim=0).to(image.dtype)
            return weight.add_(by_column)

        grad_image, grad_text = pull_back(image, texts, weigh)
        hinges = of_rows + scatter_sum(of_columns)
        return *_finish(grad / (2 * ctx.pairs.count), image, text, grad_image, grad_text, hinges), None, None


class _Hardest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, margin, pairs):
        texts, own, all_own = _gather(image, text, margin)
        (row_max, column_of_row), (column_max, row_of_column) = _hardest(image, texts, pairs)
        first = world()[0] * len(image)
        winner = merge_arg_max(column_max, row_of_column + first)
        of_row = ~(row_max <= own)  # [b]; what is not a number counts, so that the loss says so
        of_column = ~(column_max <= all_own) & (winner == row_of_column + first)  # [B]; by the rank that has the row
        ctx.save_for_backward(image, text, texts, of_row, column_of_row, of_column, row_of_column)
        loss = torch.where(of_row, row_max - own, 0).sum() + torch.where(of_column, column_max - all_own, 0).sum()
        ctx.pairs = pairs
        return loss / (2 * pairs.count)

    @staticmethod
    def backward(ctx, grad):
        image, text, texts, of_row, column_of_row, of_column, row_of_column = ctx.saved_tensors
        of_row, of_column = of_row.to(image.dtype), of_column.to(image.dtype)
        grad_image = texts[column_of_row] * of_row[:, None]
        grad_texts = image[row_of_column] * of_column[:, None]
        grad_image.index_add_(0, row_of_column, texts * of_column[:, None])
        grad_texts.index_add_(0, column_of_row, image * of_row[:, None])
        hinges = of_row + scatter_sum(of_column)
        factor = grad / (2 * ctx.pairs.count)
        return *_finish(factor, image, text, grad_image, scatter_sum(grad_texts), hinges), None, None


def _negatives(similarity: torch.Tensor, tile: slice) -> torch.Tensor:
    """A tile of similarities in which a pair is no negative of its own."""
    own_pairs(similarity, tile).fill_(-torch.inf)
    return similarity


def _gather(image: torch.Tensor, text: torch.Tensor, margin: float) -> tuple[torch.Tensor, ...]:
    """Texts of all ranks `[B, d]`, and what a negative must not exceed: of this rank's pairs `[b]`, of all `[B]`."""
    own = (image * text).sum(dim=1) - margin
    return gather_rows(text), own, gather_rows(own)


def _finish(
    factor: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    grad_image: torch.Tensor,
    grad_text: torch.Tensor,
    hinges: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of images and texts, in place of those by their negatives: the pair's own part, once for each of its
    `hinges` `[b]` that are not 0, and the `factor` of the mean."""
    grad_image.addcmul_(hinges[:, None], text, value=-1)
    grad_text.addcmul_(hinges[:, None], image, value=-1)
    return grad_image.mul_(factor), grad_text.mul_(factor)


def _hardest(image: torch.Tensor, texts: torch.Tensor, pairs: Pairs) -> tuple[tuple, tuple]:
    """The most similar text of each of this rank's images, (similarity, column) `[b]`; and of its images the most
    similar to each text, (similarity, row) `[B]`. Pairs do not count; among equals the first."""
    row_max = image.new_full((len(image),), -torch.inf)
    column_of_row = torch.zeros(len(image), dtype=torch.long, device=image.device)
    column_max = image.new_empty(len(texts))
    row_of_column = torch.empty(len(texts), dtype=torch.long, device=image.device)
    for tile, similarity in similarity_tiles(image, texts):
        pairs.hide(_negatives(similarity, tile), tile)
        best, column = similarity.max(dim=1)
        better = ~(best <= row_max) & ~row_max.isnan()
        row_max = torch.where(better, best, row_max)
        column_of_row = torch.where(better, column + tile.start, column_of_row)
        column_max[tile], row_of_column[tile] = similarity.max(dim=0)
    return (row_max, column_of_row), (column_max, row_of_column)
