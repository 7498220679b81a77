"""Retrieval whose first candidates are put into the order of a head that sees image and text together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pretrain.evaluate import RerankedConfig
from pretrain.evaluate.bench import Bench, Forward
from pretrain.evaluate.evaluator import Evaluator, Outcome
from pretrain.evaluate.features import CorpusFeatures, encode_corpus
from pretrain.evaluate.ranking import recall_and_rank
from pretrain.evaluate.rerank import Judged, Score, judge, places, top_candidates
from pretrain.evaluate.retrieval import count_candidates, retrieval_chance
from pretrain.objectives.match import FIELDS, HEAD
from pretrain.process.collectives import gather
from pretrain.stream.eval_reader import EvalBatch, EvalReader
from pretrain.towers.cut import Rows

_PREFIX = "reranked_"  # the same metrics without it are those of the cosine alone


class Reranked(Evaluator):
    """Multi-caption retrieval over a corpus. Candidates by cosine; the first of them are judged one by one, by a rank
    each, and stand in the order of these judgements. A text and an image that are each other's candidates are judged
    once."""

    def __init__(self, settings: RerankedConfig, bench: Bench):
        super().__init__(settings, bench)
        if HEAD not in bench.heads:
            raise UserError(
                "re-ranking needs a model that judges whether an image and a text match",
                got=f"heads: {', '.join(sorted(bench.heads)) or 'none'}",
                expected=f"the head {HEAD}",
                remedy="train with the objective match, or evaluate retrieval",
            )
        self._candidates = settings.candidates
        self._reader = bench.reader(self.corpus, texts=True, captions=settings.captions)
        self.shown = {"candidates": settings.candidates}
        if settings.captions is not None:
            self.shown["captions"] = settings.captions
        self.decisive = self.shown

    def __call__(self, forward: Forward) -> Outcome:
        """See `Evaluator`."""
        bench, count = self.bench, self.corpus.num_samples
        kept = _Kept(self._reader)
        features = encode_corpus(bench, forward, kept, count, "retrieval")
        images, texts, owners = features.images, features.texts, features.text_image
        place = bench.runtime.rank, bench.runtime.world_size
        cosine = count_candidates(images, texts, owners, *place)
        to_text = top_candidates(images, texts, self._candidates, *place)
        to_image = top_candidates(texts, images, self._candidates, *place)
        judged = Judged(to_text, to_image)
        batches = bench.batches(self._reader, count, "re-ranking")
        judge(judged, batches, kept.shared(features), self._score(forward))
        ways = zip(("image_to_text", "text_to_image"), places(judged, to_text, to_image, owners, cosine), strict=True)
        metrics = {name: value for way, tied in ways for name, value in recall_and_rank(way, tied).items()}
        counts = {"images": count, "texts": len(texts), "candidates": self._candidates, "judged": len(judged.codes)}
        chance = retrieval_chance(count, owners)
        return Outcome(_prefixed(metrics), _prefixed(chance), counts)

    def _score(self, forward: Forward) -> Score:
        def score(images: Rows, tokens: torch.Tensor, pairs: Rows) -> torch.Tensor:
            inputs = {"image": images, "text": self.bench.text_rows(tokens), "pairs": pairs}
            return self.bench.run(forward, inputs, frozenset({HEAD}))["local"][HEAD]["+".join(FIELDS)]

        return score


class _Kept:
    """A reader's batches, whose texts' tokens are kept as they pass."""

    def __init__(self, reader: EvalReader):
        self._reader = reader
        self._tokens: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch in self._reader:
            self._tokens.append(batch.inputs["text"]["tokens"][batch.text_image >= 0])
            yield batch

    def shared(self, features: CorpusFeatures) -> torch.Tensor:
        """Those of all ranks, int64 [M, context] (CPU), in the order of `features.texts`. Every rank must call it."""
        own = torch.cat(self._tokens)
        counts = gather(len(own))
        if len(counts) == 1:
            return own
        first = sum(counts[: dist.get_rank()])  # ranks have parts of the corpus in its order
        everyone = torch.zeros(sum(counts), own.shape[1], dtype=torch.int32, device=features.texts.device)
        everyone[first : first + len(own)] = own.to(everyone)
        dist.all_reduce(everyone)
        return everyone.cpu().long()


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {_PREFIX + name: value for name, value in metrics.items()}
