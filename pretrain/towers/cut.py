"""Text without padding: the rule by which a tower's texts may be cut, and cutting them. No tower is needed for either.

Under a causal mask a token sees only what stands before it, so cutting a text behind its end-of-text token leaves the
feature pooled there unchanged; a tower that masks its padding is as indifferent to it. Any other tower (SigLIP type: no
mask, last token pooled) keeps the full length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, takewhile

import torch

Rows = dict[str, torch.Tensor]  # of a field, each [n, ...], or with a size of its own, or a number [] of a micro-batch

LENGTHS = 16  # compiled towers see multiples of it, so that there are few shapes


@dataclass(frozen=True)
class TextRule:
    """How a tower's texts may be cut.

    Args:
        causal: the tower pools at the end of the text and sees nothing behind it.
        eos: id of the end-of-text token; None: it is the largest id of a text.
        pad: id of the padding that the tower masks by itself; None: it masks none.
        multiple: of what lengths are.
        buckets: into how many parts texts are sorted by length, at most.
    """

    causal: bool = False
    eos: int | None = None
    pad: int | None = None
    multiple: int = 1
    buckets: int = 1

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[n]`: tokens to keep of each row of `tokens` `[n, context]` (CPU)."""
        n, context = tokens.shape
        if self.causal:
            end = tokens if self.eos is None else (tokens == self.eos).int()
            return end.argmax(dim=-1) + 1
        if self.pad is not None:
            position = torch.arange(1, context + 1)
            return ((tokens != self.pad) * position).amax(dim=-1).clamp_(min=1)
        return torch.full((n,), context)

    def mask(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool `[n, length]`: which of `tokens` `[n, length]` belong to the text, as far as the tower tells."""
        if self.causal:
            end = tokens if self.eos is None else (tokens == self.eos).int()
            return torch.arange(tokens.shape[1], device=tokens.device) <= end.argmax(dim=-1, keepdim=True)
        return torch.ones_like(tokens, dtype=torch.bool) if self.pad is None else tokens != self.pad

    def __call__(self, tokens: torch.Tensor) -> Rows:
        """Cut `tokens` `[n, context]` (CPU) into parts of nearly equal count.

        Returns:
            `tokens.0`, `tokens.1`, ...: int64 `[n_k, length_k]`, texts sorted by length, each part cut to its longest;
            `restore`: int64 `[n]`, puts what was made of the parts, one after the other, into the order of `tokens`.
        """
        lengths = -(-self.lengths(tokens) // self.multiple) * self.multiple
        order = torch.argsort(lengths, stable=True)
        parts = [rows for rows in torch.tensor_split(order, self.buckets) if len(rows)]
        cut = {f"tokens.{k}": tokens[rows, : int(lengths[rows].max())].contiguous() for k, rows in enumerate(parts)}
        return {**cut, "restore": torch.argsort(order)}


def parts_of(rows: Rows) -> list[torch.Tensor]:
    """The parts of cut texts, `tokens.0` and so on; of texts that are not cut, `tokens` alone."""
    names = takewhile(rows.__contains__, (f"tokens.{k}" for k in count()))
    return [rows[name] for name in names] or [rows["tokens"]]


def uncut(rows: Rows) -> Rows:
    """Those of `rows` that have one row a sample: not what `TextRule` made of a micro-batch's texts, and no number of
    the micro-batch."""
    return {
        name: value
        for name, value in rows.items()
        if value.dim() and name != "restore" and not name.startswith("tokens.")
    }
