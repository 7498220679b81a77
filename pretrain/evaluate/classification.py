"""Zero-shot classification: an image belongs to the class whose prompts lie nearest (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_tools.errors import UserError
from pretrain.evaluate.features import Encode, Ranks
from pretrain.evaluate.ranking import hit_probability, require_finite, similarities

PROMPT_CHUNK = 256  # prompts in one forward


@torch.no_grad()
def class_embeddings(
    encode: Encode,
    tokenize: Callable[[list[str]], torch.Tensor],
    classes: Sequence[str],
    templates: Sequence[str],
    ranks: Ranks,
) -> torch.Tensor:
    """[C, d] fp32: per class the mean of its normalised prompt features, renormalised. Every rank must call it.

    Prompts are cut over the ranks in equal counts; the sums are fp64, so the ranks' number does not show.
    """
    prompts = [(index, template.replace("{c}", name)) for index, name in enumerate(classes) for template in templates]
    chunk = min(PROMPT_CHUNK, -(-len(prompts) // ranks.world_size))
    sums = None
    for start in range(chunk * ranks.rank, _round_up(len(prompts), chunk * ranks.world_size), chunk * ranks.world_size):
        mine = prompts[start : start + chunk]
        texts = [text for _, text in mine] + [prompts[0][1]] * (chunk - len(mine))
        features = F.normalize(encode(None, tokenize(texts))[1].double(), dim=-1)[: len(mine)]
        if sums is None:
            sums = features.new_zeros((len(classes), features.shape[1]))
        sums.index_add_(0, torch.tensor([index for index, _ in mine], dtype=torch.int64, device=sums.device), features)
    if ranks.world_size > 1:
        dist.all_reduce(sums)
    require_finite(sums, "prompt")
    return F.normalize(sums, dim=-1).float()


@dataclass
class ClassCounts:
    """Hits per class, summed over batches and then over ranks: fp64 [C] each, `invalid` labels beside them."""

    top1: torch.Tensor
    top5: torch.Tensor
    images: torch.Tensor
    invalid: torch.Tensor

    @classmethod
    def zeros(cls, num_classes: int, device: torch.device) -> ClassCounts:
        """Nothing counted yet."""
        sizes = (num_classes, num_classes, num_classes, 2)
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, features: torch.Tensor, labels: torch.Tensor, embeddings: torch.Tensor) -> None:
        """Count images `features` [n, d] with `labels` int64 [n] against `embeddings` [C, d].

        Faults are only counted here, for one rank alone must not raise while others wait in a collective.
        """
        self.add_scores(similarities(features, embeddings), labels)

    def add_scores(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Count images by their `scores` [n, C]; see `add`."""
        fits = (labels >= 0) & (labels < scores.shape[1])
        finite = torch.isfinite(scores).all(dim=1)
        self.invalid += torch.stack([(~fits).sum(), (~finite).sum()])
        scores, labels = scores[fits & finite], labels[fits & finite]
        own = scores.gather(1, labels[:, None])
        better = (scores > own).sum(dim=1)
        negatives = (scores == own).sum(dim=1) - 1
        one = torch.ones_like(better)
        for counts, k in ((self.top1, 1), (self.top5, 5)):
            counts.index_add_(0, labels, hit_probability(better, negatives, one, k))
        self.images.index_add_(0, labels, one.double())

    def merge(self, world_size: int) -> None:
        """Sum over the ranks. Every rank must call it.

        Raises:
            UserError: on every rank, where a label has no class or a feature was not finite.
        """
        if world_size > 1:
            for counts in (self.top1, self.top5, self.images, self.invalid):
                dist.all_reduce(counts)
        labels, features = self.invalid.long().tolist()
        if labels:
            raise UserError(
                f"{labels} images have a label that is no class",
                expected=f"0 to {len(self.images) - 1}",
                remedy="give the class names in the order of the labels (--classes FILE)",
            )
        if features:
            raise UserError(
                f"the features of {features} images are not finite", remedy="evaluate an earlier checkpoint"
            )

    def metrics(self) -> dict[str, float]:
        """`top1`, `top5` (above five classes only: with five it is 1 by definition) and `mean_per_class`.

        The mean is over classes that have images. Ties count as in `ranking.py`: a collapsed model gets 1 / C.
        """
        total, seen = self.images.sum(), self.images > 0
        metrics = {"top1": (self.top1.sum() / total).item()}
        if len(self.images) > 5:
            metrics["top5"] = (self.top5.sum() / total).item()
        metrics["mean_per_class"] = (self.top1[seen] / self.images[seen]).mean().item()
        return metrics

    def per_class(self, classes: Sequence[str]) -> list[dict]:
        """Name, images and top-1 accuracy of each class; accuracy is null without images."""
        rows = zip(classes, self.images.long().tolist(), self.top1.tolist(), strict=True)
        return [{"class": name, "n": n, "accuracy": hits / n if n else None} for name, n, hits in rows]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
