"""The sigmoid loss (SigLIP, arXiv 2303.15343): every image with every text is a question of its own, yes or no.

No row or column is summed up for another rank, so beside the texts nothing is sent. Like InfoNCE here it keeps no tile:
the backward computes each once more, 8 B^2 d / world FLOPs in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.objectives.tiles import gather_rows, of_pairs, own_pairs, pull_back, similarity_tiles, through_scale


def sigmoid(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum over all texts of all ranks of -log sigmoid(+-(scale * cosine + bias)), + for the pair and - for all others.

    Arguments, result and ranks are `infonce`'s. The mean is over images, as in the paper, so the loss grows with the
    global batch unless `bias`, `[1]`, fits it: about -ln(global batch).
    """
    return of_pairs(_Sigmoid, image, text, scale, bias)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, bias):
        texts = gather_rows(text)  # [B, d]
        loss = image.new_zeros(len(image))
        for tile, similarity in similarity_tiles(image, texts):
            loss -= F.logsigmoid(_wrong(tile, similarity, scale, bias).neg_()).sum(dim=1)
        ctx.save_for_backward(image, texts, scale, bias)
        return loss.mean()

    @staticmethod
    def backward(ctx, grad):
        image, texts, scale, bias = ctx.saved_tensors
        grad_bias = torch.zeros_like(bias)

        def weigh(tile, similarity):
            weight = _wrong(tile, similarity, scale, bias).sigmoid_()
            own_pairs(weight, tile).neg_()
            grad_bias.add_(weight.sum())
            return weight

        grad_image, grad_text = pull_back(image, texts, weigh)
        factor = grad / len(image)
        return *through_scale(image, scale, grad_image, grad_text, factor), grad_bias * factor


def _wrong(tile: slice, similarity: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The logit of the wrong answer for each entry of a tile, in place of its similarities."""
    logits = similarity.mul_(scale).add_(bias)
    own_pairs(logits, tile).neg_()
    return logits
