"""Minimal pairs: two images and two captions that differ in one binding (Winoground, arXiv 2204.03162).

Random captions do not prove that a model binds attributes to objects: a bag of words is enough to tell them apart. The
members of a pair share their words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from data_tools.corpus import Corpus, Sample, ShardReader
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import parse_json
from pretrain.evaluate import PairsConfig
from pretrain.evaluate.bench import Bench, Forward
from pretrain.evaluate.evaluator import Evaluator, Outcome
from pretrain.evaluate.features import CorpusFeatures, encode_corpus
from pretrain.evaluate.ranking import paired_similarities, require_finite

CHANCE = {
    "image_to_text_accuracy": 1 / 2,
    "text_to_image_accuracy": 1 / 2,
    "text_score": 1 / 4,
    "image_score": 1 / 4,
    "group_score": 1 / 6,
}


class Pairs(Evaluator):
    """Accuracy on the minimal pairs of a corpus."""

    def __init__(self, settings: PairsConfig, bench: Bench):
        super().__init__(settings, bench)
        self._reader = bench.reader(self.corpus, texts=True, captions=settings.captions)
        self._pairs = read_pairs(self.corpus)
        if settings.captions is not None:
            self.shown = self.decisive = {"captions": settings.captions}

    def __call__(self, forward: Forward) -> Outcome:
        """See `Evaluator`."""
        features = encode_corpus(self.bench, forward, self._reader, self.corpus.num_samples, "pairs")
        metrics, count = pair_metrics(features, self._pairs.positions), len(self._pairs.kinds)
        by_kind = metrics_by_kind(features, self._pairs)
        return Outcome(metrics, dict(CHANCE), {"images": 2 * count, "pairs": count}, by_kind)


@dataclass(frozen=True)
class MinimalPairs:
    """`positions` int64 [P, 2]: corpus positions of each pair's images; `kinds` [P]: what was swapped, or ""."""

    positions: torch.Tensor
    kinds: tuple[str, ...]


def read_pairs(corpus: Corpus) -> MinimalPairs:
    """The pairs of a corpus, by the `pair` id (and the `kind`) in the `.json` of its samples; others are left out.

    Raises:
        UserError: no pairs at all, or an id that does not have exactly two samples.
    """
    members, kinds = defaultdict(list), {}
    for position, facts in enumerate(_facts(corpus)):
        if (pair := facts.get("pair")) is not None:
            members[pair].append(position)
            kinds[pair] = str(facts.get("kind", ""))
    if not members:
        raise UserError("the corpus has no minimal pairs", expected='samples with a "pair" id in their .json')
    for pair, positions in members.items():
        if len(positions) != 2:
            raise UserError(f"pair {pair!r} is not a pair", got=f"{len(positions)} samples", expected="2")
    return MinimalPairs(torch.tensor(list(members.values())), tuple(kinds[pair] for pair in members))


def _facts(corpus: Corpus) -> Iterator[dict]:
    """The `.json` of every sample, in corpus order."""
    with ShardReader(corpus) as reader:
        for shard, count in enumerate(corpus.counts.tolist()):
            for index in range(count):
                yield _fields(reader.read(shard, index))


def _fields(sample: Sample) -> dict:
    try:
        fields = parse_json(sample.members["json"]) if "json" in sample.members else {}
    except BadSampleError as error:
        raise UserError(f"the json of sample {sample.key} cannot be read", got=error.reason) from None
    if not isinstance(fields, dict) or isinstance(fields.get("pair"), dict | list):
        raise UserError(f"the json of sample {sample.key} names no pair", expected='an object with a "pair" id')
    return fields


def metrics_by_kind(features: CorpusFeatures, pairs: MinimalPairs) -> list[dict] | None:
    """`pair_metrics` of each kind of swap with its number of pairs, or None where the pairs have no kinds."""
    if not any(pairs.kinds):
        return None
    rows = []
    for kind in sorted(set(pairs.kinds)):
        chosen = [row for row, name in enumerate(pairs.kinds) if name == kind]
        rows.append({"kind": kind, "n": len(chosen), **pair_metrics(features, pairs.positions[chosen])})
    return rows


def pair_metrics(features: CorpusFeatures, pairs: torch.Tensor) -> dict[str, float]:
    """Share of images and texts nearer to their own partner, and Winoground's scores; first captions are used.

    `image_to_text_accuracy`: images nearer to their own caption than to the other's; `text_to_image_accuracy`: captions
    nearer to their own image; a tie counts half, so a collapsed model gets 1/2. `text_score`, `image_score` (both
    images, both captions of the pair right) and `group_score` (all four) count a tie as wrong, as the paper does.

    Args:
        features: of the whole corpus.
        pairs: int64 [P, 2], positions of `read_pairs`.

    Raises:
        UserError: an image of a pair has no caption; features that are not finite.
    """
    require_finite(features.images, "image")
    require_finite(features.texts, "text")
    positions, rows = features.first_captions()
    row_of = torch.full((len(features.images),), -1, dtype=torch.int64, device=rows.device)
    row_of[positions] = rows
    pairs = pairs.to(rows.device)
    if int(row_of[pairs].min()) < 0:
        raise UserError("an image of a pair has no caption", expected="one caption for each image")
    images = [features.images[pairs[:, side]] for side in (0, 1)]
    texts = [features.texts[row_of[pairs[:, side]]] for side in (0, 1)]
    own = [paired_similarities(images[side], texts[side]) for side in (0, 1)]
    other = [paired_similarities(images[side], texts[1 - side]) for side in (0, 1)]  # image `side`, the other's text
    to_text = torch.stack([own[0] - other[0], own[1] - other[1]])
    to_image = torch.stack([own[0] - other[1], own[1] - other[0]])
    text_right, image_right = ((margin > 0).all(dim=0) for margin in (to_text, to_image))
    return {
        "image_to_text_accuracy": _accuracy(to_text),
        "text_to_image_accuracy": _accuracy(to_image),
        "text_score": text_right.double().mean().item(),
        "image_score": image_right.double().mean().item(),
        "group_score": (text_right & image_right).double().mean().item(),
    }


def _accuracy(margins: torch.Tensor) -> float:
    return ((margins.sign() + 1) / 2).double().mean().item()
