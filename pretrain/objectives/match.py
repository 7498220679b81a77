"""Image-text matching with hard negatives (ALBEF, arXiv 2107.07651; BLIP, arXiv 2201.12086).

Of every pair three things are judged by a head that sees the tokens of both: the pair, its image with a wrong text, and
a wrong image with its text. The wrong ones come from the global batch: the more similar the likelier, or the most
similar. One sweep of tiles finds both, as for InfoNCE: texts are gathered, images are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.objectives import MatchConfig
from pretrain.objectives.objective import Draw, Facts, Inputs, Tensors, present_of
from pretrain.objectives.tied import NONE, gumbel, halves, hashes, keys
from pretrain.objectives.tiles import Pairs, gather_rows, merge_arg_max, own_columns, sharing, similarity_tiles, world

FIELDS = ("image", "text")
HEAD = "fusion"
Keys = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Match:
    """The objective of the settings `negatives` and `mining_temperature`, and of a head that gives the logits `[n]` of
    pairings by the names of their fields, `image+text` and so on. `name`: the objective's own."""

    wants = frozenset({HEAD})
    reads = frozenset(FIELDS)

    def __init__(self, settings: MatchConfig, name: str):
        self.settings, self.name = settings, name

    def count(self, inputs: Inputs) -> torch.Tensor | int:
        """Three judgements a pair: see `PerSample`."""
        present = present_of(inputs, FIELDS)
        return 3 * (len(inputs["image"]["identity"]) if present is None else present.sum())

    def mine(self, rows: Tensors, facts: Facts, draw: Draw) -> dict[str, torch.Tensor]:
        """See `PerSample`; every row has an `identity`. A pair without any negative gets itself."""
        identity = torch.stack([facts[field]["identity"] for field in FIELDS], dim=1)
        seeds = (draw(1)[:, 0] * 2**53).long()
        score = self._sampled if self.settings.negatives == "sampled" else keys
        text, image = negatives(rows["image"], rows["text"], identity, present_of(facts, FIELDS), seeds, score)
        return {"text": text, "image": image}

    def loss(self, outputs: Mapping[str, Any], inputs: Inputs) -> torch.Tensor:
        """See `PerSample`. A judgement for which there is no negative is 0."""
        present = present_of(inputs, FIELDS)
        sums = []
        for wrong in (None, *FIELDS):
            logits = outputs["local"][HEAD]["+".join(f"{f}#{self.name}" if f == wrong else f for f in FIELDS)]
            wanted = torch.full_like(logits, wrong is None)
            terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            counts = torch.ones_like(logits, dtype=torch.bool) if present is None else present
            if wrong is not None:
                counts = counts & (inputs[f"{wrong}#{self.name}"]["identity"] != inputs[wrong]["identity"])
            sums.append(torch.where(counts, terms, 0).sum())
        return torch.stack(sums).sum()

    def _sampled(self, cosine: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        return keys(cosine / self.settings.mining_temperature + gumbel(bits), bits)


def negatives(
    image: torch.Tensor,
    text: torch.Tensor,
    identity: torch.Tensor,
    present: torch.Tensor | None,
    seeds: torch.Tensor,
    score: Keys,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of this rank's pairs the number of a wrong text and of a wrong image in the global batch, int64 `[b]`
    each: the best by `score` of those that are present and share neither image nor text with the pair; the pair's own
    number where there is none.

    All ranks must call it, each with as many pairs. It sends the texts, and a few numbers of each pair.

    Args:
        image, text: unit-norm features `[b, d]`, fp32.
        identity: int64 `[b, 2]`, equal in the first column where two images are one, in the second where two texts are.
        present: which pairs have both, bool `[b]`; None: all.
        seeds: int64 `[b]`, random for each pair, the same at any world size.
        score: keys int64 `[b, n]` of a tile, larger is better, from its cosines and from 32 random bits each.
    """
    pairs = Pairs(len(image), present, image)
    if present is not None:
        image, text = (torch.where(present[:, None], features, 0) for features in (image, text))
    texts, everyone = gather_rows(text), gather_rows(identity)
    numbers = torch.arange(len(texts), device=image.device)
    own = own_columns(numbers, len(image))
    row_best, column_of_row = torch.full_like(own, NONE), own.clone()
    column_best, row_of_column = torch.empty_like(numbers), torch.empty_like(numbers)
    for tile, cosine in similarity_tiles(image, texts):
        negative = pairs.strike(~sharing(identity, everyone, tile), tile)
        of_text, of_image = halves(hashes(seeds, numbers[tile]))
        best, column = score(cosine, of_text).masked_fill_(~negative, NONE).max(dim=1)
        better = best > row_best
        row_best = torch.where(better, best, row_best)
        column_of_row = torch.where(better, column + tile.start, column_of_row)
        column_best[tile], row = score(cosine, of_image).masked_fill_(~negative, NONE).max(dim=0)
        row_of_column[tile] = row + world()[0] * len(image)
    row_of_column = torch.where(column_best == NONE, numbers, row_of_column)
    return column_of_row, own_columns(merge_arg_max(column_best, row_of_column), len(image))
