"""The losses by their definitions, on the whole matrix of similarities and by plain autograd: what ours must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.objectives import InfoNCEConfig, MarginConfig, MultiPositiveConfig, SigmoidConfig

SETTINGS = {
    "infonce": InfoNCEConfig(),
    "infonce, smoothed": InfoNCEConfig(label_smoothing=0.1),
    "multi_positive": MultiPositiveConfig(),
    "multi_positive, smoothed": MultiPositiveConfig(label_smoothing=0.1),
    "sigmoid": SigmoidConfig(),
    "margin, sum": MarginConfig(margin=0.3, negatives="sum"),
    "margin, hardest": MarginConfig(margin=0.3, negatives="hardest"),
}


def plain_loss(settings, image, text, scale, bias=None, identity=None):
    """The loss of pairs `[B, d]` in one process; arguments as in `pretrain.objectives.Features`."""
    pairs, cosine = len(image), image @ text.T
    if settings.type == "margin":
        return _ranking(cosine, settings.margin, settings.negatives).mean()
    if settings.type == "sigmoid":
        answers = 2 * torch.eye(pairs, dtype=cosine.dtype) - 1
        return -F.logsigmoid(answers * (scale * cosine + bias)).sum(dim=1).mean()
    target = torch.eye(pairs, dtype=cosine.dtype)
    if settings.type == "multi_positive":
        target = (identity[:, None] == identity[None]).any(dim=2).to(cosine.dtype)
        target /= target.sum(dim=1, keepdim=True)
    target = (1 - settings.label_smoothing) * target + settings.label_smoothing / pairs
    return (F.cross_entropy(scale * cosine, target) + F.cross_entropy(scale * cosine.T, target)) / 2


def _ranking(cosine, margin, negatives):
    """Hinges of both directions for every pair, `[2, B]`."""
    own = cosine.diagonal()
    hinges = [(margin + s - own[:, None]).clamp(min=0).fill_diagonal_(0) for s in (cosine, cosine.T)]
    return torch.stack([h.sum(dim=1) if negatives == "sum" else h.amax(dim=1) for h in hinges])


def identities(pairs):
    """Some images come up to three times and some texts twice, near and far apart, so that they meet across ranks."""
    image, text = torch.arange(pairs) % (2 * pairs // 3), torch.arange(pairs)
    image[7] = image[8] = image[9]
    text[[3, pairs - 2]], text[[10, 11]] = 1000, -1
    return torch.stack([image, text], dim=1)
