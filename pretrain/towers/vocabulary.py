"""What the ids of a tokenizer stand for: which are words, and which one can stand where a word is hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.tokenizer import SimpleTokenizer

from data_tools.errors import UsageError
from pretrain.towers.cut import TextRule
from pretrain.towers.spec import Tokenizer

# Tokens that no text holds, where a tokenizer has none to hide words with: T5's first sentinel, and the byte 255 of
# sentencepiece, which is no part of UTF-8.
_UNUSED = ("<extra_id_0>", "<0xFF>")
_NO_BYTE = 0xFF  # of open_clip's byte-level vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a tokenizer.

    Args:
        size: all ids are below it.
        special: ids that are no words: of start, end, padding, and `mask`.
        mask: what stands where a word is hidden.
        end: the id behind which nothing is a word; None: padding has an id of its own, one of `special`.
    """

    size: int
    special: tuple[int, ...]
    mask: int
    end: int | None = None

    def is_word(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where `tokens` int64 `[n, context]` are words, bool."""
        special = torch.isin(tokens, torch.tensor(self.special))
        if self.end is not None:
            special |= (tokens == self.end).cumsum(dim=1) > 0
        return ~special


def vocabulary_of(
    tokenizer: Tokenizer, mask: int | None = None, rule: TextRule | None = None, setting: str = "mask_token"
) -> Vocabulary:
    """The vocabulary of `tokenizer`, with the token `mask` in place of hidden words; None: one that no text holds.
    `setting`: where `mask` is set, for messages.

    open_clip's own tokenizer has no such token. That of the byte 255 does its work: no text in UTF-8 has that byte, the
    embedding is there in every published model, and its id is below that of the end, which towers take for the largest.

    Raises:
        UsageError: no id, or one that has another meaning to the tokenizer or to a tower that cuts by `rule`.
    """
    library = tokenizer.library
    if isinstance(library, SimpleTokenizer):
        unused, size, end = library.encoder[library.byte_encoder[_NO_BYTE]], library.vocab_size, library.eot_token_id
        special = marks = library.all_special_ids
    else:
        inner, end = library.tokenizer, None
        known = inner.get_vocab()
        unused = next((known[word] for word in (inner.mask_token, *_UNUSED) if word in known), None)
        size, special = max(known.values()) + 1, inner.all_special_ids
        marks = [getattr(inner, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep", "unk")]
        special = [*special, 0] if library.strip_sep_token else special  # 0 takes the separator's place
    found = unused if mask is None else mask
    if found is None:
        raise UsageError(
            "the tokenizer has no token to hide words with",
            got=f"no {', '.join(_UNUSED)} nor a mask token among {size} tokens",
            remedy=f"set {setting} to an id that no text holds",
        )
    if found >= size:
        raise UsageError(f"{setting} is no id of the tokenizer", got=found, expected=f"below {size}")
    if found in marks or (rule is not None and not _keeps_lengths(tokenizer, found, rule)):
        raise UsageError(
            f"{setting} has a meaning of its own",
            got=f"{found}, by which the tower sees where a text begins or ends",
            remedy="null takes an id that no text holds",
        )
    return Vocabulary(size, tuple(sorted({*special, found})), found, end)


def _keeps_lengths(tokenizer: Tokenizer, mask: int, rule: TextRule) -> bool:
    """Whether a text is as long where its second token is `mask`."""
    tokens = tokenizer(["a a"])
    hidden = tokens.clone()
    hidden[0, 1] = mask
    return bool(torch.equal(rule.lengths(tokens), rule.lengths(hidden)))
