"""The text of a sample with some of its words hidden (BERT, arXiv 1810.04805), and what they were.

A word here is a token of the tokenizer. Which ones are hidden is drawn by hash of (seed, epoch, sample id, position)
before the texts are cut, so it depends on no rank, worker or micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from data_tools.corpus import Sample
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.fields import MaskedTextConfig
from pretrain.stream.fields.field import FieldContext, Shown, Tokenize
from pretrain.stream.fields.text import Text, cut_for
from pretrain.towers.cut import Rows
from pretrain.towers.spec import Tokenizer
from pretrain.towers.vocabulary import Vocabulary, vocabulary_of

ABSENT = -100  # of `wanted`: a token that was not hidden


@dataclass(frozen=True)
class MaskedText:
    """`tokens` as the field `text` has them, of the same caption and the same words of it, but for the hidden ones;
    `wanted` int64 `[n, context]`: what those were, -100 elsewhere.

    Args:
        text: the field whose texts these are.
        vocabulary: of its tokenizer.
        share: of the words, each for itself, that are hidden.
        mask: share of those that become the token for it.
        random: share of those that become any word; the rest stays.
    """

    text: Text
    vocabulary: Vocabulary
    share: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    @classmethod
    def of(cls, settings: MaskedTextConfig, context: FieldContext) -> MaskedText:
        """See `FieldContext`. Raises UsageError where no token can stand for a hidden word."""
        text = context.text
        assert isinstance(text, Text)
        assert isinstance(text.tokenize, Tokenizer)
        vocabulary = vocabulary_of(text.tokenize, settings.mask_token, text.rule, f"fields.{context.name}.mask_token")
        return cls(text, vocabulary, settings.share, settings.mask, settings.random)

    @property
    def tokenize(self) -> Tokenize:
        """That of the text."""
        return self.text.tokenize

    @property
    def optional(self) -> bool:
        """See `Field`."""
        return self.text.optional

    def rows(self, n: int) -> Rows:
        """See `Field`; `draw` int64 `[n, 4]` is what the hidden words of a sample follow from."""
        tokens = self.text.rows(n)["tokens"]
        return {
            "tokens": tokens,
            "wanted": torch.full_like(tokens, ABSENT),
            "draw": torch.zeros(n, 4, dtype=torch.int64),
        }

    def train(self, sample: Sample, draw: Draw, out: Rows) -> Shown:
        """See `Field`. Raises as `Text` does."""
        _keep(draw, out["draw"])
        return self.text.train(sample, draw, out)

    def evaluate(self, sample: Sample, out: Rows) -> Shown:
        """See `Field`: the same words are hidden every time. Raises as `Text` does."""
        _keep(Draw(0, 0, sample.id), out["draw"])
        return self.text.evaluate(sample, out)

    def finish(self, rows: Rows, shown: Sequence[Shown], micro_batch: int | None) -> Rows:
        """See `Field`."""
        tokens = self.text.finish({}, shown, None)["tokens"]
        wanted = torch.full_like(tokens, ABSENT)
        draws = [
            _draw(kept)._replace(view=view)
            for kept, one in zip(rows["draw"], shown, strict=True)
            for view in range(len(one.texts))
        ]
        changed, true = tokens.numpy(), wanted.numpy()  # views: single elements of tensors are slow
        words = torch.nonzero(self.vocabulary.is_word(tokens), as_tuple=True)
        for row, place in zip(*(index.tolist() for index in words), strict=True):
            word = int(changed[row, place])
            shown_as = self._hidden(word, place, draws[row])
            if shown_as is not None:
                changed[row, place], true[row, place] = shown_as, word
        kept = {name: row for name, row in rows.items() if name != "draw"}
        return {**kept, "tokens": tokens, "wanted": wanted, **cut_for(micro_batch, tokens, self.text.rule)}

    def _hidden(self, word: int, place: int, draw: Draw) -> int | None:
        """What a hidden word is shown as; None: the word at this place of a text is not hidden."""
        chosen, becomes = draw.pair(Purpose.MASKED, 2 * place)
        if chosen >= self.share:
            return None
        if becomes < self.mask:
            return self.vocabulary.mask
        if becomes < self.mask + self.random:
            return int(self._words[draw.bits(Purpose.MASKED, 2 * place + 1) % len(self._words)])
        return word

    @cached_property
    def _words(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.vocabulary.size), self.vocabulary.special)

    def identity(self, rows: Rows, shown: Sequence[Shown]) -> torch.Tensor:
        """Hashes of the tokens."""
        return self.text.identity(rows, shown)

    def lacks(self, sample: Sample) -> str | None:
        """See `Field`."""
        return self.text.lacks(sample)


def _keep(draw: Draw, row: torch.Tensor) -> None:
    row.numpy()[:] = np.array(draw, np.uint64).view(np.int64)


def _draw(row: torch.Tensor) -> Draw:
    return Draw(*row.numpy().view(np.uint64).tolist())
