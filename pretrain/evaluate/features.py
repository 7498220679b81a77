"""From an evaluation reader to the features of a whole corpus, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from data_tools.errors import UserError
from pretrain.process.precision import is_bf16
from pretrain.process.watchdog import heartbeat
from pretrain.towers.build import DualEncoder
from pretrain.towers.model import Inputs, Outputs

Encode = Callable[[torch.Tensor | None, torch.Tensor | None], tuple[torch.Tensor | None, torch.Tensor | None]]
"""`encode(images uint8 [n, 3, h, w] | None, texts int64 [m, context] | None)` -> unit-norm features or None of each."""

Progress = Callable[[int], None]

TEXT_CHUNK = 512  # texts in one forward at most: the captions of a batch of images can be many


class Ranks(Protocol):
    """What evaluation needs of `pretrain.process.runtime.Runtime`."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    @property
    def device(self) -> torch.device:
        """That of this rank."""


@dataclass(frozen=True)
class CorpusFeatures:
    """Features of a corpus, the same on every rank. Texts stand in the order of their images, captions in order.

    `images` [N, d], `texts` [M, d], `text_image` int64 [M]: the corpus position of each text's image; `hashes`: int64
    [N] and [M], equal where two images or two texts are one.
    """

    images: torch.Tensor
    texts: torch.Tensor
    text_image: torch.Tensor
    hashes: tuple[torch.Tensor, torch.Tensor] | None = None

    def first_captions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(image positions [n], rows of their first captions [n]) of the images that have a caption, in order."""
        change = torch.ones_like(self.text_image, dtype=torch.bool)
        change[1:] = self.text_image[1:] != self.text_image[:-1]
        rows = torch.nonzero(change).squeeze(1)
        return self.text_image[rows], rows


def encoder(
    model: DualEncoder, device: torch.device, precision: str = "fp32", forward: Callable[..., Outputs] | None = None
) -> Encode:
    """`model` as the evaluations call it: batches from the CPU, features on `device`, in autocast where asked.
    `forward`: the engine that runs it, which has its own precision."""
    run = forward or model

    def encode(images, texts):
        heartbeat()
        inputs: Inputs = {} if images is None else {"image": {"pixels": images.to(device, non_blocking=True)}}
        if texts is not None:
            inputs["text"] = model.text_rows(texts)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(precision)):
            rows = run(inputs)["rows"]
        return rows.get("image"), rows.get("text")

    return encode


def counted(reader: Iterable, progress: Progress | None) -> Iterator:
    """The reader's batches; after each `progress` is told how many images are done."""
    done = 0
    for batch in reader:
        yield batch
        done += len(batch.positions)
        if progress:
            progress(done)


@torch.no_grad()
def encode_corpus(
    encode: Encode, reader: Iterable, num_images: int, ranks: Ranks, progress: Progress | None = None
) -> CorpusFeatures:
    """Encode every image and caption once. Every rank must call it; each makes the same number of forwards with as many
    texts in each, as ZeRO-3 needs, because the reader pads batches and this pads texts.

    Args:
        encode: the towers (see `Encode`), in evaluation mode.
        reader: `EvalReader` of this rank: at least one text in a batch; rows at position -1 are padding.
        num_images: samples of the corpus.
        progress: called after each batch with the images that this rank has done, padding included.
    """
    of_images: list[list[torch.Tensor]] = []
    of_texts: list[list[torch.Tensor]] = []
    for batch in counted(reader, progress):
        image, text = _encode_batch(encode, batch, ranks)
        real, captions = batch.positions >= 0, batch.text_image >= 0
        rows = (image, batch.positions, batch.identity["image"])
        of_images.append([values.to(image.device)[real.to(image.device)] for values in rows])
        rows = (text[: len(captions)], batch.text_image, batch.identity["text"])
        of_texts.append([values.to(text.device)[captions.to(text.device)] for values in rows])
    if not of_images:
        raise UserError("the evaluation corpus is empty", remedy="check --data")
    return _share(_joined(of_images), _joined(of_texts), num_images, ranks)


def _joined(batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _encode_batch(encode: Encode, batch, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a batch's images [n, d] and of its texts, padded to the largest count of any rank."""
    texts = batch.inputs["text"]["tokens"]
    count = _largest(len(texts), ranks)
    chunks = texts[torch.arange(count) % len(texts)].split(TEXT_CHUNK)
    image, text = encode(batch.inputs["image"]["pixels"], chunks[0])
    rest = [encode(None, chunk)[1] for chunk in chunks[1:]]
    return image.float(), torch.cat([text, *rest]).float()


def _largest(count: int, ranks: Ranks) -> int:
    if ranks.world_size == 1:
        return count
    largest = torch.tensor([count], device=ranks.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _share(
    of_images: list[torch.Tensor], of_texts: list[torch.Tensor], num_images: int, ranks: Ranks
) -> CorpusFeatures:
    """What all ranks have. Of images: features, positions, hashes; of texts: features, their image, hashes."""
    _, positions, _ = of_images
    if ranks.world_size > 1:
        counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=positions.device)
        counts[ranks.rank] = len(of_texts[0])
        dist.all_reduce(counts)
        rows = torch.arange(len(of_texts[0]), device=positions.device) + counts[: ranks.rank].sum()
        of_images = [_merge(values, positions, num_images) for values in of_images]
        of_texts = [_merge(values, rows, int(counts.sum())) for values in of_texts]
    else:
        of_images = [values[torch.argsort(positions)] for values in of_images]
    images, _, image_hash = of_images
    texts, text_image, text_hash = (values[torch.argsort(of_texts[1], stable=True)] for values in of_texts)
    return CorpusFeatures(images, texts, text_image, (image_hash, text_hash))


def _merge(values: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """All ranks' `values` at their `rows` of one tensor; every row belongs to one rank, so the sum is exact."""
    merged = values.new_zeros((total, *values.shape[1:]))
    merged[rows] = values
    dist.all_reduce(merged)
    return merged
