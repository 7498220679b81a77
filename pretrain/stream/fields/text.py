"""The text of a sample: one of its captions in training, all of them in evaluation; tokens, sorted and cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from data_tools.corpus import Sample
from data_tools.errors import UsageError
from data_tools.media.members import DEFAULT_FIELDS, Fields
from pretrain.config.tree import CAPTION_CHOICES
from pretrain.stream.augment import drop_words
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.fields.field import Shown, Tokenize
from pretrain.towers.cut import Rows, TextRule


@dataclass(frozen=True)
class Text:
    """`tokens` int64 `[n, context]`; in training with a rule also the micro-batches' `tokens.0`, `tokens.1`, ... and
    `restore` (see `TextRule`).

    Args:
        tokenize: picklable (not a bound method of a model), and not defined in the script that runs.
        mapping: where the captions are in a sample.
        choose: which of several captions a training step sees: `random`, by a hash of (seed, epoch, sample id), or
            `first`.
        word_dropout: share of the words that a caption loses in training.
        rule: how texts are cut; None: they are not.
        optional: see `Field`.
    """

    tokenize: Tokenize
    mapping: Fields = DEFAULT_FIELDS
    choose: str = "random"
    word_dropout: float = 0.0
    rule: TextRule | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.choose not in CAPTION_CHOICES:
            raise UsageError("unknown rule to choose a caption", got=self.choose, expected=" or ".join(CAPTION_CHOICES))

    def rows(self, n: int) -> Rows:
        """See `Field`: tokens of no word."""
        return {"tokens": self.tokenize([""]).repeat(n, 1)}

    def train(self, sample: Sample, draw: Draw, out: Rows) -> Shown:
        """See `Field`; the tokens come with `finish`. Raises BadSampleError as `all_captions` does."""
        captions = self.mapping.all_captions(sample)
        first = self.choose == "first"
        caption = captions[0 if first else draw.bits(Purpose.CAPTION) % len(captions)]
        return Shown((drop_words(caption, self.word_dropout, draw),))

    def evaluate(self, sample: Sample, out: Rows) -> Shown:
        """See `Field`. Raises as `train` does."""
        return Shown(tuple(self.mapping.all_captions(sample)))

    def finish(self, rows: Rows, shown: Sequence[Shown], micro_batch: int | None) -> Rows:
        """See `Field`. In evaluation there are as many rows as texts, one of no word where there is none."""
        tokens = self.tokenize([text for one in shown for text in one.texts] or [""])
        return {**rows, "tokens": tokens, **cut_for(micro_batch, tokens, self.rule)}

    def identity(self, rows: Rows, shown: Sequence[Shown]) -> torch.Tensor:
        """Hashes of the tokens."""
        hashes = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows["tokens"].numpy()]
        return torch.from_numpy(np.array(hashes, np.uint64).view(np.int64))

    def lacks(self, sample: Sample) -> str | None:
        """See `Field`."""
        return self.mapping.lacks_caption(sample)


def cut_for(micro_batch: int | None, tokens: torch.Tensor, rule: TextRule | None) -> Rows:
    """What `rule` makes of the texts of each micro-batch of `tokens` `[n, context]`, as `Field.finish` calls it; in
    evaluation (None) texts are not cut."""
    parts: Rows = {}
    if micro_batch is not None and rule is not None:
        for number, part in enumerate(tokens.split(micro_batch)):
            parts |= {f"part{number}.{name}": row for name, row in rule(part).items()}
    return parts
