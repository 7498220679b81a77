"""From an evaluation reader to the features of a whole corpus, on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pretrain.evaluate.bench import Bench, Forward
from pretrain.process.runtime import Runtime
from pretrain.stream.eval_reader import EvalBatch

TEXT_CHUNK = 512  # texts in one forward at most: the captions of a batch of images can be many


@dataclass(frozen=True)
class CorpusFeatures:
    """Features of a corpus, the same on every rank. Texts stand in the order of their images, captions in order.

    `images` [N, d], `texts` [M, d], `text_image` int64 [M]: the corpus position of each text's image; `hashes`: int64
    [N] and [M], equal where two images or two texts are one; `shared`: the model's scalars, such as `logit_scale`.
    """

    images: torch.Tensor
    texts: torch.Tensor
    text_image: torch.Tensor
    hashes: tuple[torch.Tensor, torch.Tensor] | None = None
    shared: dict[str, float] = field(default_factory=dict)

    def first_captions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(image positions [n], rows of their first captions [n]) of the images that have a caption, in order."""
        change = torch.ones_like(self.text_image, dtype=torch.bool)
        change[1:] = self.text_image[1:] != self.text_image[:-1]
        rows = torch.nonzero(change).squeeze(1)
        return self.text_image[rows], rows


def encode_corpus(
    bench: Bench, forward: Forward, reader: Iterable[EvalBatch], num_images: int, what: str
) -> CorpusFeatures:
    """Encode every image and caption once. Every rank must call it; each makes the same number of forwards with as many
    texts in each, as ZeRO-3 needs, because the reader pads batches and this pads texts.

    Args:
        reader: `EvalReader` of this rank: at least one text in a batch; rows at position -1 are padding.
        num_images: samples of the corpus.
        what: how progress is called.
    """
    of_images: list[list[torch.Tensor]] = []
    of_texts: list[list[torch.Tensor]] = []
    shared: dict[str, float] = {}
    for batch in bench.batches(reader, num_images, what):
        image, text, shared = _encode_batch(bench, forward, batch)
        of_images.append(without_padding(batch.positions, image, batch.identity["image"]))
        of_texts.append(without_padding(batch.text_image, text[: len(batch.text_image)], batch.identity["text"]))
    if not of_images:
        raise UserError("the evaluation corpus is empty", remedy="check --data")
    images, image_hash = in_corpus_order(of_images, num_images, bench.runtime)
    texts, text_image, text_hash = _shared_texts(of_texts, bench.runtime)
    return CorpusFeatures(images, texts, text_image, (image_hash, text_hash), shared)


def without_padding(positions: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
    """`positions`, int64 `[n]`, and the rows of `columns` there, where they are not -1; on the device of the first
    column."""
    device = columns[0].device
    real = (positions >= 0).to(device)
    return [values.to(device)[real] for values in (positions, *columns)]


def in_corpus_order(batches: list[list[torch.Tensor]], total: int, ranks: Runtime) -> list[torch.Tensor]:
    """Columns `[total, ...]` in the order of the corpus, the same on every rank. Every rank must call it.

    `batches`: what `without_padding` gives of each batch of this rank; every position is one rank's.
    """
    positions, *columns = _joined(batches)
    if ranks.world_size == 1:
        order = torch.argsort(positions)
        return [values[order] for values in columns]
    return [_merge(values, positions, total) for values in columns]


def _joined(batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _encode_batch(
    bench: Bench, forward: Forward, batch: EvalBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Features of a batch's images [n, d] and of its texts, padded to the largest count of any rank, and the model's
    scalars."""
    texts = batch.inputs["text"]["tokens"]
    count = _largest(len(texts), bench.runtime)
    first, *rest = texts[torch.arange(count) % len(texts)].split(TEXT_CHUNK)
    outputs = bench.run(forward, {"image": batch.inputs["image"], "text": bench.text_rows(first)})
    more = [bench.run(forward, {"text": bench.text_rows(chunk)})["rows"]["text"] for chunk in rest]
    shared = {name: value.item() for name, value in outputs["shared"].items()}
    return outputs["rows"]["image"].float(), torch.cat([outputs["rows"]["text"], *more]).float(), shared


def _largest(count: int, ranks: Runtime) -> int:
    if ranks.world_size == 1:
        return count
    largest = torch.tensor([count], device=ranks.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _shared_texts(batches: list[list[torch.Tensor]], ranks: Runtime) -> list[torch.Tensor]:
    """Features, image and hash of all ranks' texts, by their images; those of one image in their order."""
    text_image, texts, hashes = _joined(batches)
    columns = [texts, text_image, hashes]
    if ranks.world_size > 1:
        counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=texts.device)
        counts[ranks.rank] = len(texts)
        dist.all_reduce(counts)
        rows = torch.arange(len(texts), device=texts.device) + counts[: ranks.rank].sum()
        columns = [_merge(values, rows, int(counts.sum())) for values in columns]
    order = torch.argsort(columns[1], stable=True)
    return [values[order] for values in columns]


def _merge(values: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """All ranks' `values` at their `rows` of one tensor; every row belongs to one rank, so the sum is exact."""
    merged = values.new_zeros((total, *values.shape[1:]))
    merged[rows] = values
    dist.all_reduce(merged)
    return merged
