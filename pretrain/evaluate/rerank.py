"""Re-ranking: which candidates of each query are judged anew, their judgements, and the ranks that follow.

The first K candidates by cosine are put into the order of another score; all others keep their places behind them.
Candidates that tie in cosine at the K-th place are taken by hash, those that tie in score stand in random order
(`ranking.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.evaluate.ranking import Tied, require_finite, similarities
from pretrain.evaluate.retrieval import Counts
from pretrain.objectives.tied import NONE, halves, hashes, keys
from pretrain.process.collectives import gather
from pretrain.stream.eval_reader import EvalBatch
from pretrain.towers.cut import Rows

Score = Callable[[Rows, torch.Tensor, Rows], torch.Tensor]
"""`score(images, tokens, pairs)` -> `[p]`: of rows of the field image, texts int64 `[m, context]`, and which of them
are paired: `image` and `text`, int64 `[p]`."""

PAIRS = 256  # judged in one forward at most
_GRID = 2.0**12  # scores are compared to 1 / _GRID: the same pair is off by rounding from one batch to the next


@dataclass(frozen=True)
class Candidates:
    """The first K candidates of every query of one direction, the same on every rank: `rows` int64 [Q, K] and their
    cosines fp32 [Q, K]."""

    rows: torch.Tensor
    cosines: torch.Tensor


def top_candidates(
    queries: torch.Tensor, candidates: torch.Tensor, k: int, rank: int = 0, world_size: int = 1, block: int = 1024
) -> Candidates:
    """The `k` most similar of `candidates` [C, d] (or all, where there are fewer) for each of `queries` [Q, d].

    Every rank must call it, with the same features; each takes its share of the queries. Memory: `block`^2.
    """
    k = min(k, len(candidates))
    numbers = torch.arange(max(len(queries), len(candidates)), device=queries.device)
    rows = numbers.new_zeros(len(queries), k)
    cosines = torch.zeros(len(queries), k, device=queries.device)
    first, last = (len(queries) * r // world_size for r in (rank, rank + 1))
    for start in range(first, last, block):
        own = slice(start, min(start + block, last))
        best = numbers.new_full((own.stop - start, k), NONE)
        for column in range(0, len(candidates), block):
            tile = slice(column, min(column + block, len(candidates)))
            found = similarities(queries[own], candidates[tile])
            bits = halves(hashes(numbers[own], numbers[tile]))[0]
            best, at = torch.cat([best, keys(found, bits)], dim=1).topk(k, dim=1)
            rows[own] = torch.cat([rows[own], numbers[tile].expand(len(found), -1)], dim=1).gather(1, at)
            cosines[own] = torch.cat([cosines[own], found], dim=1).gather(1, at)
    if world_size > 1:
        dist.all_reduce(rows)
        dist.all_reduce(cosines)
    return Candidates(rows, cosines)


class Judged:
    """Scores of all pairs of an image and a text that are candidates of each other, in either direction.

    Pairs are scored by the rank that reads their image, once each, whichever of the two is the query.
    """

    def __init__(self, to_text: Candidates, to_image: Candidates):
        self._texts = len(to_image.rows)
        by_image, by_text = self._codes(to_text, True), self._codes(to_image, False)
        self.codes = torch.cat([by_image.flatten(), by_text.flatten()]).unique()  # sorted, so by image
        self.scores = torch.zeros(len(self.codes), device=self.codes.device)
        self._by_image, self._by_text = by_image, by_text

    def _codes(self, found: Candidates, images_ask: bool) -> torch.Tensor:
        asking = torch.arange(len(found.rows), device=found.rows.device)[:, None]
        return asking * self._texts + found.rows if images_ask else found.rows * self._texts + asking

    def of(self, positions: torch.Tensor) -> torch.Tensor:
        """Numbers of the pairs of the images at `positions`, neighbours in the corpus; int64 [p]."""
        real = positions[positions >= 0].to(self.codes.device)
        if not len(real):
            return real
        ends = torch.stack([real.min(), real.max() + 1]) * self._texts
        low, high = torch.searchsorted(self.codes, ends).tolist()
        return torch.arange(low, high, device=self.codes.device)

    def pair(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The image and the text of each of these pairs."""
        codes = self.codes[numbers]
        return codes // self._texts, codes % self._texts

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of all ranks, on a grid: [N, K] of each image's texts, [M, K] of each text's images. Every rank
        must call it. Raises UserError for scores that are no numbers."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.scores)
        require_finite(self.scores[:, None], "match")
        scores = (self.scores.double() * _GRID).round()
        by_image, by_text = (scores[torch.searchsorted(self.codes, own)] for own in (self._by_image, self._by_text))
        return by_image, by_text


@torch.no_grad()
def judge(judged: Judged, batches: Iterable[EvalBatch], tokens: torch.Tensor, score: Score) -> None:
    """Score this rank's pairs. Every rank must call it; each makes the same number of forwards, as ZeRO-3 needs.

    Args:
        batches: of the rank's `EvalReader`.
        tokens: int64 [M, context] of all texts (CPU).
    """
    for batch in batches:
        numbers = judged.of(batch.positions)
        images, texts = judged.pair(numbers)
        first = int(batch.positions[0])
        for chunk in range(max(gather(-(-len(numbers) // PAIRS)))):
            part = slice(chunk * PAIRS, (chunk + 1) * PAIRS)
            own, asked = images[part].cpu() - first, texts[part].cpu()
            if not len(own):  # other ranks have more: take part with anything
                own, asked = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            image, of_image = own.unique(return_inverse=True)
            text, of_text = asked.unique(return_inverse=True)
            rows = {name: value[image] for name, value in batch.inputs["image"].items()}
            found = score(rows, tokens[text], {"image": of_image, "text": of_text})
            judged.scores[numbers[part]] = found.float().to(judged.scores.device)[: len(numbers[part])]


def places(
    judged: Judged, to_text: Candidates, to_image: Candidates, text_image: torch.Tensor, cosine: Counts
) -> tuple[Tied, Tied]:
    """Where the best positive of every image that has a text stands, and of every text. Every rank must call it."""
    by_image, by_text = judged.both()
    asking = cosine.asking
    of_images = Candidates(to_text.rows[asking], to_text.cosines[asking])
    right = text_image[of_images.rows] == torch.nonzero(asking)
    return (
        reranked(of_images, by_image[asking], right, cosine.image_queries(), cosine.best[asking]),
        reranked(to_image, by_text, to_image.rows == text_image[:, None], cosine.text_queries(), cosine.own),
    )


def reranked(found: Candidates, scores: torch.Tensor, positive: torch.Tensor, cosine: Tied, best: torch.Tensor) -> Tied:
    """Where the best positive of each query stands among all candidates once its first K are in the order of `scores`.

    Args:
        scores: [Q, K] of the candidates `found`.
        positive: bool [Q, K], which of them are right.
        cosine: where the best positive stands by cosine alone.
        best: fp32 [Q], its cosine.
    """
    top = torch.where(positive, scores, -torch.inf).amax(dim=1, keepdim=True)
    equal = scores == top
    within = Tied((scores > top).sum(dim=1), (equal & ~positive).sum(dim=1), (equal & positive).sum(dim=1))
    above, beside = ((compare(found.cosines, best[:, None])).sum(dim=1) for compare in (torch.gt, torch.eq))
    # None of the right ones is among the first K: these all stand before it, whatever their cosines
    behind = Tied(
        found.rows.shape[1] + (cosine.better - above).clamp(min=0),
        (cosine.negatives - beside).clamp(min=0),
        cosine.positives,
    )
    any_within = positive.any(dim=1)
    return Tied(*(torch.where(any_within, inside, outside) for inside, outside in zip(within, behind, strict=True)))
