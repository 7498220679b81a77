"""By which rule a text tower's texts may be cut (cut.py), and its forward over texts that were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer, text_global_pool
from torch import nn

from data_tools.errors import UserError
from pretrain.towers.clip import Clip, text_tower
from pretrain.towers.cut import Rows, TextRule, parts_of

_END_POOLED = ("argmax", "eos")


def text_rule(clip: Clip, buckets: int = 1) -> TextRule:
    """The rule of an open_clip model's text tower."""
    tower = text_tower(clip)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    masked = getattr(tower, "attn_mask", None) is not None
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    if masked and plain and pool in _END_POOLED:
        eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)) if pool == "eos" else None
        return TextRule(causal=True, eos=eos, buckets=buckets)
    # Hugging Face towers mask their padding themselves
    return TextRule(pad=getattr(getattr(tower, "config", None), "pad_token_id", None), buckets=buckets)


def text_tokens(clip: Clip, rows: Rows, rule: TextRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`text_features`, and the states of all tokens `[n, length, width]` with their mask, bool `[n, length]`. `length`:
    that of the longest part."""
    cut = parts_of(rows)
    whole = _embedded(clip, cut) if rule.causal else [(part, None) for part in cut]
    found = [(*_with_states(clip, rule, *part), rule.mask(part[0])) for part in whole]
    length = max(part.shape[1] for part in cut)
    features = torch.cat([one[0] for one in found])
    states = torch.cat([F.pad(one[1], (0, 0, 0, length - one[1].shape[1])) for one in found])
    mask = torch.cat([F.pad(one[2], (0, length - one[2].shape[1])) for one in found])
    if "restore" not in rows:
        return features, states, mask
    return features[rows["restore"]], states[rows["restore"]], mask[rows["restore"]]


def text_width(clip: Clip) -> int:
    """Numbers of a token's state. Raises UserError where `text_tokens` could not tell them."""
    tower = text_tower(clip)
    _refuse_silent(clip)
    return tower.config.hidden_size if isinstance(tower, HFTextEncoder) else tower.ln_final.normalized_shape[0]


def text_features(
    clip: Clip, rows: Rows, rule: TextRule, forward: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """Features `[n, d]`, not normalised, in the order the texts came in. `rows`: as `rule` cut them, or `tokens` whole;
    `forward`: a compiled `text_forward`."""
    forward = forward or functools.partial(text_forward, clip, rule)
    cut = parts_of(rows)
    parts = _embedded(clip, cut) if rule.causal else [(part, None) for part in cut]
    features = torch.cat([forward(*part) for part in parts])
    return features[rows["restore"]] if "restore" in rows else features


def text_forward(clip: Clip, rule: TextRule, tokens: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
    """Features of one part's `tokens` `[n, length]`, for causal towers with their embeddings `vectors` `[n, length,
    width]`: open_clip's own forward of these takes full length only."""
    return clip.encode_text(tokens) if vectors is None else _causal_features(clip, tokens, vectors, rule)


def _with_states(
    clip: Clip, rule: TextRule, tokens: torch.Tensor, vectors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of one part, as `text_forward` gives them, and the states of its tokens."""
    tower = text_tower(clip)
    if vectors is not None:
        states = _causal_states(clip, tokens, vectors)
        return _pooled(clip, tokens, states, rule), states
    if isinstance(tower, HFTextEncoder):  # its own `output_tokens` leave one out, so places would not fit
        mask = (tokens != tower.config.pad_token_id).long()
        out = tower.transformer(input_ids=tokens, attention_mask=mask)
        return tower.proj(tower.pooler(out, mask)), out.last_hidden_state
    _refuse_silent(clip)
    tower.output_tokens = True
    try:
        return tower(tokens)
    finally:
        tower.output_tokens = False


def _refuse_silent(clip: Clip) -> None:
    tower = text_tower(clip)
    known = isinstance(tower, TextTransformer | HFTextEncoder)
    if not known and not (isinstance(tower, CLIP) and text_rule(clip).causal):
        raise UserError(
            "the text tower does not tell what it makes of single tokens",
            got=f"{type(tower).__name__}{' without a causal mask' if isinstance(tower, CLIP) else ''}",
            expected="a tower of open_clip or of transformers, which an objective over tokens needs",
            remedy="custom_text: true in the architecture makes the text tower a module of its own",
        )


def _embedded(clip: Clip, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, embeddings) of each part. One look-up for all of them: its backward fills a gradient as large as the
    vocabulary, which for small towers costs more than a layer."""
    tower = text_tower(clip)
    vectors = tower.token_embedding(torch.cat([part.flatten() for part in parts]))  # [tokens, width]
    for part, own in zip(parts, vectors.split([part.numel() for part in parts]), strict=True):
        yield part, own.view(*part.shape, -1)


def _causal_features(clip: Clip, tokens: torch.Tensor, x: torch.Tensor, rule: TextRule) -> torch.Tensor:
    """Features of `tokens` `[n, length]` with embeddings `x` `[n, length, width]`."""
    return _pooled(clip, tokens, _causal_states(clip, tokens, x), rule)


def _causal_states(clip: Clip, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """States `[n, length, width]` of `tokens`, likewise."""
    tower = text_tower(clip)
    length = tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = x.to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
    return tower.ln_final(x)


def _pooled(clip: Clip, tokens: torch.Tensor, x: torch.Tensor, rule: TextRule) -> torch.Tensor:
    """Features of the states `x` of `tokens`."""
    tower = text_tower(clip)
    pool = "argmax" if rule.eos is None else "eos"
    x = text_global_pool(x, tokens, pool, eos_token_id=rule.eos)
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection
