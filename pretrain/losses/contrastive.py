"""InfoNCE (CLIP, arXiv 2103.00020) in one sweep over tiles of the similarity matrix.

The tile that gives a row its log-sum-exp gives the columns their partial sums, which two all-reduces of B floats merge;
the backward computes each tile once more. So a rank spends 8 B^2 d / world FLOPs (12 where both directions are computed
apart), holds one tile, and sends texts only. Memory-wise it stands beside Inf-CL (arXiv 2410.17243).
"""

from __future__ import annotations

import torch

from pretrain.losses.tiles import column_tiles, gather_rows, merge_log_sum_exp, scatter_sum, world


def infonce(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's pairs against all pairs of all ranks.

    All ranks must call it (forward and backward), each with the same number of pairs.

    Args:
        image: unit-norm features `[b, d]`, fp32 or fp64; row i belongs to row i of `text`.
        text: unit-norm features `[b, d]`.
        scale: the factor on cosine similarities, `[1]`, > 0.

    Returns:
        The mean over this rank's pairs, 0-dim. The mean over ranks is the loss of the global batch; and with gradients
        averaged over ranks, as DeepSpeed does, the gradients of towers and scale are those of the global batch.
    """
    if image.shape != text.shape:
        raise ValueError(
            f"image features {tuple(image.shape)} and text features {tuple(text.shape)} must have one shape"
        )
    with torch.autocast(image.device.type, enabled=False):
        return _InfoNCE.apply(image, text, scale)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale):
        rank, _ = world()
        b = image.shape[0]
        texts = gather_rows(text)  # [B, d]
        row, column = _log_sum_exps(image, texts, scale)  # [b], [B]
        positive = scale * (image * text).sum(dim=1)  # [b]
        own_column = column[rank * b : (rank + 1) * b]
        ctx.save_for_backward(image, text, texts, scale, row, column)
        return ((row - positive).mean() + (own_column - positive).mean()) / 2

    @staticmethod
    def backward(ctx, grad):
        image, text, texts, scale, row, column = ctx.saved_tensors
        grad_image = image * 0  # [b, d]
        grad_texts = torch.empty_like(texts)  # [B, d], this rank's rows' share
        for tile in column_tiles(len(image), len(texts)):
            similarity = (image @ texts[tile].T).mul_(scale)
            weight = (similarity - row[:, None]).exp_()
            weight += similarity.sub_(column[tile]).exp_()
            torch.addmm(grad_image, weight, texts[tile], out=grad_image)
            torch.mm(weight.T, image, out=grad_texts[tile])
        grad_text = scatter_sum(grad_texts)
        grad_image -= 2 * text
        grad_text -= 2 * image
        factor = grad / (2 * len(image))
        grad_scale = (grad_image * image).sum().reshape(scale.shape) * factor
        return grad_image * (scale * factor), grad_text * (scale * factor), grad_scale


def _log_sum_exps(image: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of every row `[b]` and, over all ranks, of every column `[B]` of the scaled similarities."""
    row_max = image.new_full((len(image),), -torch.inf)
    row_sum = image.new_zeros(len(image))
    column_max = image.new_empty(len(texts))
    column_sum = image.new_empty(len(texts))
    for tile in column_tiles(len(image), len(texts)):
        similarity = (image @ texts[tile].T).mul_(scale)
        new_max = torch.maximum(row_max, similarity.amax(dim=1))
        row_sum = row_sum * (row_max - new_max).exp() + (similarity - new_max[:, None]).exp_().sum(dim=1)
        row_max = new_max
        column_max[tile] = similarity.amax(dim=0)
        column_sum[tile] = similarity.sub_(column_max[tile]).exp_().sum(dim=0)
    return row_max + row_sum.log(), merge_log_sum_exp(column_max, column_sum)
