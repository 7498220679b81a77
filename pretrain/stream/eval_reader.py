"""The evaluation reader: every sample once, in corpus order, with equal padded batches on every rank."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_tools.corpus import Corpus, Sample, ShardReader
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import DEFAULT_FIELDS, Fields, fitting, label
from pretrain.stream.batches import Tokenize, hashes_of, image_hash, read_sample
from pretrain.stream.loader import check_first_shard
from pretrain.stream.transform import ImageSettings, ImageTransform
from pretrain.stream.workers import BatchIterator

PADDING = -1


@dataclass(frozen=True)
class EvalBatch:
    """n images and all m captions of them. Padding has position, text_image and label -1, black pixels, key ""."""

    images: torch.Tensor  # uint8 [n, 3, size, size]
    positions: torch.Tensor  # int64 [n], place of each image in the corpus
    texts: torch.Tensor | None  # int64 [m, context], m >= 1: one padding text where there is no caption
    text_image: torch.Tensor  # int64 [m], corpus position of each text's image
    captions: list[str]  # [m]
    labels: torch.Tensor | None  # int64 [n]
    hashes: tuple[torch.Tensor, torch.Tensor] | None  # with texts: int64 [n] of images, [m] of texts, as in training
    keys: list[str]  # [n]

    def pin_memory(self) -> "EvalBatch":
        """The same batch with its tensors in page-locked memory; the loader calls it."""
        tensors = {name: getattr(self, name) for name in ("images", "texts", "labels")}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items() if tensor is not None})


class EvalReader:
    """Iterates over this rank's EvalBatches; may be iterated again. Rank r has the r-th contiguous part of the corpus.

    Every rank has as many batches, with as many images in each, as the others: the end of the last parts is padding.

    Args:
        image: picture size and resize mode.
        tokenize: list of m texts -> int64 [m, context], picklable; None leaves out the captions.
        batch: images per batch.
        workers: loader processes; 0 reads in this one.
        fields: where images and captions are; lines of a txt are captions also where the corpus's layout says so.

    Raises:
        UserError: the first shard has no image (or, with `tokenize`, no caption) member; when iterated: an unreadable
            sample, which is never substituted here. Labels are read where the first sample has a `cls` member.
    """

    def __init__(
        self,
        corpus: Corpus,
        image: ImageSettings,
        tokenize: Tokenize | None,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        fields: Fields = DEFAULT_FIELDS,
    ):
        self.fields = fitting(fields, corpus)
        check_first_shard(corpus, self.fields, "caption" if tokenize else None)
        with ShardReader(corpus) as reader:
            self.labelled = "cls" in _read(reader, 0, 0).members
        share = -(-corpus.num_samples // world_size)
        self._build = _EvalBuilder(
            ShardReader(corpus), self.fields, ImageTransform(image), tokenize, self.labelled, batch, rank * share, share
        )
        self._batches, self._workers = -(-share // batch), workers

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[EvalBatch]:
        pin = torch.cuda.is_available()
        with BatchIterator(self._build, range(len(self)), self._workers, pin_memory=pin) as batches:
            yield from batches
        self._build.reader.close()


@dataclass
class _EvalBuilder:
    """Builds the batches of positions first .. first + share."""

    reader: ShardReader
    fields: Fields
    transform: ImageTransform
    tokenize: Tokenize | None
    labelled: bool
    batch: int
    first: int
    share: int

    def __call__(self, number: int) -> EvalBatch:
        start = self.first + number * self.batch
        positions = np.arange(start, min(start + self.batch, self.first + self.share))
        positions[positions >= self.reader.corpus.num_samples] = PADDING
        size = self.transform.settings.size
        images = torch.zeros((len(positions), 3, size, size), dtype=torch.uint8)
        labels = torch.full((len(positions),), PADDING)
        keys, captions, text_image, of_images = [""] * len(positions), [], [], [0] * len(positions)
        for row, position in enumerate(positions.tolist()):
            if position == PADDING:
                continue
            sample, texts, labels[row], of_images[row] = self._load(position, images[row].numpy())
            keys[row] = sample.key
            captions += texts
            text_image += [position] * len(texts)
        if not captions:
            captions, text_image = [""], [PADDING]
        tokens = self.tokenize(captions) if self.tokenize else None
        return EvalBatch(
            images=images,
            positions=torch.from_numpy(positions),
            texts=tokens,
            text_image=torch.tensor(text_image),
            captions=captions,
            labels=labels if self.labelled else None,
            hashes=None if tokens is None else hashes_of(of_images, tokens),
            keys=keys,
        )

    def _load(self, position: int, picture: np.ndarray) -> tuple[Sample, list[str], int, int]:
        """The sample, its captions, its label, and the hash of its image; fills `picture`."""
        shard, index = self.reader.corpus.locate(position)
        sample = _read(self.reader, shard, index)
        try:
            data = self.fields.image_bytes(sample)
            picture[:] = self.transform.evaluate(data).transpose(2, 0, 1)
            texts = self.fields.all_captions(sample) if self.tokenize else []
            number = label(sample, len(self.reader.corpus.classes)) if self.labelled else PADDING
        except BadSampleError as error:
            raise _unreadable(self.reader.corpus, shard, sample.key, error) from error
        return sample, texts, number, image_hash(data)


def _read(reader: ShardReader, shard: int, index: int) -> Sample:
    try:
        return read_sample(reader, shard, index)
    except BadSampleError as error:
        raise _unreadable(reader.corpus, shard, f"number {index}", error) from error


def _unreadable(corpus: Corpus, shard: int, key: str, error: BadSampleError) -> UserError:
    return UserError(
        f"cannot evaluate on sample {key} of {corpus.paths[shard]}",
        got=f"{error.kind}: {error.reason}",
        remedy="evaluation leaves out no sample: repair the shard or take the sample out",
    )
