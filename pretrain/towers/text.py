"""The forward of a text tower over texts that were cut (cut.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from open_clip.transformer import text_global_pool
from torch import nn

from pretrain.towers.cut import Rows, TextRule, parts_of


def text_features(
    clip: nn.Module, rows: Rows, rule: TextRule, forward: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """Features `[n, d]`, not normalised, in the order the texts came in. `rows`: as `rule` cut them, or `tokens` whole;
    `forward`: a compiled `text_forward`."""
    forward = forward or functools.partial(text_forward, clip, rule)
    cut = parts_of(rows)
    parts = _embedded(clip, cut) if rule.causal else [(part, None) for part in cut]
    features = torch.cat([forward(*part) for part in parts])
    return features[rows["restore"]] if "restore" in rows else features


def text_forward(clip: nn.Module, rule: TextRule, tokens: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
    """Features of one part's `tokens` `[n, length]`, for causal towers with their embeddings `vectors` `[n, length,
    width]`: open_clip's own forward of these takes full length only."""
    return clip.encode_text(tokens) if vectors is None else _causal_features(clip, tokens, vectors, rule)


def _embedded(clip: nn.Module, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, embeddings) of each part. One look-up for all of them: its backward fills a gradient as large as the
    vocabulary, which for small towers costs more than a layer."""
    tower = getattr(clip, "text", clip)
    vectors = tower.token_embedding(torch.cat([part.flatten() for part in parts]))  # [tokens, width]
    for part, own in zip(parts, vectors.split([part.numel() for part in parts]), strict=True):
        yield part, own.view(*part.shape, -1)


def _causal_features(clip: nn.Module, tokens: torch.Tensor, x: torch.Tensor, rule: TextRule) -> torch.Tensor:
    """Features of `tokens` `[n, length]` with embeddings `x` `[n, length, width]`."""
    tower = getattr(clip, "text", clip)
    length = tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = x.to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x)
    pool = "argmax" if rule.eos is None else "eos"
    x = text_global_pool(x, tokens, pool, eos_token_id=rule.eos)
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
