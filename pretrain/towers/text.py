"""Text without padding. Exact wherever later tokens cannot reach the pooled feature.

Under a causal mask a token sees only what stands before it, so cutting a text behind its end-of-text token leaves the
feature pooled there unchanged; a tower that masks its padding is as indifferent to it. Any other tower (SigLIP type: no
mask, last token pooled) keeps the full length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from open_clip.transformer import text_global_pool
from torch import nn

LENGTHS = 16  # compiled towers see multiples of it, so that there are few shapes
_END_POOLED = ("argmax", "eos")


@dataclass
class TextParts:
    """Texts sorted by length, in buckets cut to their longest: `parts[i]` is int64 `[n_i, length_i]`; `restore` `[n]`
    puts the concatenated features back into the order the texts came in."""

    parts: list[torch.Tensor]
    restore: torch.Tensor

    def to(self, device: torch.device) -> TextParts:
        """The same on `device`."""
        parts = [part.to(device, non_blocking=True) for part in self.parts]
        return TextParts(parts, self.restore.to(device, non_blocking=True))

    @property
    def num_tokens(self) -> int:
        """Tokens that the tower will see."""
        return sum(part.numel() for part in self.parts)


class TextCut:
    """The rule by which a tower's texts may be cut; made once from the model. `multiple`: of what their length is."""

    def __init__(self, clip: nn.Module):
        self.multiple = 1
        tower = getattr(clip, "text", clip)
        self.eos_id: int | None = None
        self.pad_id: int | None = None
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        causal = getattr(tower, "attn_mask", None) is not None
        plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
        self.causal = causal and plain and pool in _END_POOLED
        if self.causal:
            self.eos_id = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)) if pool == "eos" else None
        elif hasattr(tower, "config") and getattr(tower.config, "pad_token_id", None) is not None:
            self.pad_id = tower.config.pad_token_id  # Hugging Face towers mask their padding themselves

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[n]`: tokens to keep of each row of `tokens` `[n, context]` (CPU)."""
        n, context = tokens.shape
        if self.causal:
            end = tokens if self.eos_id is None else (tokens == self.eos_id).int()
            return end.argmax(dim=-1) + 1
        if self.pad_id is not None:
            position = torch.arange(1, context + 1)
            return ((tokens != self.pad_id) * position).amax(dim=-1).clamp_(min=1)
        return torch.full((n,), context)

    def __call__(self, tokens: torch.Tensor, buckets: int) -> TextParts:
        """Cut `tokens` `[n, context]` (CPU) into at most `buckets` parts of nearly equal count."""
        lengths = -(-self.lengths(tokens) // self.multiple) * self.multiple
        order = torch.argsort(lengths, stable=True)
        parts = [
            tokens[rows, : int(lengths[rows].max())].contiguous()
            for rows in torch.tensor_split(order, buckets)
            if len(rows)
        ]
        return TextParts(parts, torch.argsort(order))


def text_features(
    clip: nn.Module, texts: TextParts, cut: TextCut, forward: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """Features `[n, d]`, not normalised, in the order the texts came in. `forward`: a compiled `text_forward`."""
    forward = forward or functools.partial(text_forward, clip, cut)
    parts = _embedded(clip, texts.parts) if cut.causal else [(part, None) for part in texts.parts]
    return torch.cat([forward(*part) for part in parts])[texts.restore]


def text_forward(clip: nn.Module, cut: TextCut, tokens: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
    """Features of one part's `tokens` `[n, length]`, for causal towers with their embeddings `vectors` `[n, length,
    width]`: open_clip's own forward of these takes full length only."""
    return clip.encode_text(tokens) if vectors is None else _causal_features(clip, tokens, vectors, cut)


def _embedded(clip: nn.Module, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, embeddings) of each part. One look-up for all of them: its backward fills a gradient as large as the
    vocabulary, which for small towers costs more than a layer."""
    tower = getattr(clip, "text", clip)
    vectors = tower.token_embedding(torch.cat([part.flatten() for part in parts]))  # [tokens, width]
    for part, own in zip(parts, vectors.split([part.numel() for part in parts]), strict=True):
        yield part, own.view(*part.shape, -1)


def _causal_features(clip: nn.Module, tokens: torch.Tensor, x: torch.Tensor, cut: TextCut) -> torch.Tensor:
    """Features of `tokens` `[n, length]` with embeddings `x` `[n, length, width]`."""
    tower = getattr(clip, "text", clip)
    length = tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = x.to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    x = tower.ln_final(x)
    pool = "argmax" if cut.eos_id is None else "eos"
    x = text_global_pool(x, tokens, pool, eos_token_id=cut.eos_id)
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
