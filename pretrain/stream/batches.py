"""Building a training batch, in the loader processes: order -> read -> decode, crop, caption or label -> tensors."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from data_tools.corpus import Sample, ShardReader
from data_tools.errors import UserError
from data_tools.format.tar import TarDamageError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import Target, describe, label
from pretrain.stream.augment import drop_words
from pretrain.stream.bad import BadSample
from pretrain.stream.draw import Draw
from pretrain.stream.members import Fields
from pretrain.stream.mixture import Mixture, Place, Slots
from pretrain.stream.transform import ImageTransform

Tokenize = Callable[[list[str]], torch.Tensor]

SUBSTITUTE_ATTEMPTS = 64
_TELLING = 16  # samples of a shard that tell of its kind where none is as expected; fewer are just bad


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch; b = global batch / world size.

    `captions` are the texts before tokenisation, without the words that were dropped; [] for labels.
    """

    step: int  # global step, from 0
    epoch: int  # of the run
    phase: int  # number of model.phases it belongs to; after the last, how many there are
    slots: Slots  # where each sample lies, substitutes included; an epoch and an id seed what is random about a sample
    images: torch.Tensor  # uint8 [b, 3, size, size]
    texts: torch.Tensor | None  # int64 [b, context]
    labels: torch.Tensor | None  # int64 [b]
    ids: np.ndarray  # uint64 [b]
    keys: list[str]
    captions: list[str]
    identity: torch.Tensor | None = None  # int64 [b, 2]: a hash of each image's bytes and of each text's tokens
    bad: list[BadSample] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory; the loader calls it."""
        tensors = {name: getattr(self, name) for name in ("images", "texts", "labels", "identity")}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items() if tensor is not None})


class _Row(NamedTuple):
    place: Place
    id: int
    key: str
    caption: str
    label: int
    image_hash: int


@dataclass
class BatchBuilder:
    """Builds rank `rank`'s batch of any global step: a function of (corpus, settings, step) alone.

    `reader` reads the joined shards of all sources; `first_shards` [sources] is where each source's begin; `fields`
    [sources] are their key mappings; `transforms` [phases + 1] are those of the run's phases, which end at the steps
    `ends` [phases]; `word_dropout` is the share of the words that captions lose.
    """

    reader: ShardReader
    mixture: Mixture
    fields: tuple[Fields, ...]
    first_shards: tuple[int, ...]
    transforms: tuple[ImageTransform, ...]
    ends: tuple[int, ...]
    word_dropout: float
    tokenize: Tokenize | None
    target: Target
    rank: int
    world_size: int
    _checked: set[int] = field(default_factory=set)  # shards known to hold what their source's mapping names

    def __call__(self, step: int) -> Batch:
        """Raises UserError for a shard that is gone or changed, for one without a single sample of the expected kind,
        and where no substitute of a bad sample can be read."""
        slots = self.mixture.batch(step, self.world_size, self.rank)
        phase = bisect_right(self.ends, step)
        transform = self.transforms[phase]
        size = transform.settings.size
        images = torch.empty((len(slots.shards), 3, size, size), dtype=torch.uint8)
        rows: list[_Row] = []
        bad: list[BadSample] = []
        with _one_thread():
            for picture, *slot in zip(images.numpy(), *(column.tolist() for column in slots), strict=True):
                place = Place(*slot)
                try:
                    rows.append(self._load(place, picture, transform))
                except BadSampleError as error:
                    bad.append(BadSample.of(error, self._path(place), place.index))
                    rows.append(self._load_substitute(place, picture, transform))
        captions = [row.caption for row in rows] if self.target == "caption" else []
        texts = self.tokenize(captions) if captions and self.tokenize else None
        return Batch(
            step=step,
            epoch=int(self.mixture.epochs_at(step)),
            phase=phase,
            slots=Slots(*np.array([row.place for row in rows]).T),
            images=images,
            texts=texts,
            labels=torch.tensor([row.label for row in rows]) if self.target == "label" else None,
            ids=np.array([row.id for row in rows], dtype=np.uint64),
            keys=[row.key for row in rows],
            captions=captions,
            identity=None if texts is None else torch.stack(hashes_of([row.image_hash for row in rows], texts), dim=1),
            bad=bad,
        )

    def shard(self, place: Place) -> int:
        """The number of a place's shard in the joined corpus."""
        return self.first_shards[place.source] + place.shard

    def _load(self, place: Place, picture: np.ndarray, transform: ImageTransform) -> _Row:
        """Fills `picture`, uint8 [3, size, size]. Raises BadSampleError, its `key` set once the sample was read."""
        shard = self.shard(place)
        sample = read_sample(self.reader, shard, place.index)
        fields = self.fields[place.source]
        draw = Draw(self.mixture.orders[place.source].seed, place.epoch, sample.id)
        try:
            if shard not in self._checked and self.reader.corpus.counts[shard] >= _TELLING:
                refuse_foreign_shard(self.reader, shard, sample, fields, self.target)
                self._checked.add(shard)
            caption, number = "", -1
            if self.target == "caption":
                caption = fields.training_caption(sample, draw)
                caption = drop_words(caption, self.word_dropout, draw)
            else:
                number = label(sample, len(self.reader.corpus.classes))
            data = fields.image_bytes(sample)
            pixels = transform.train(data, draw)
            picture[:] = pixels.transpose(2, 0, 1)
        except BadSampleError as error:
            error.key = sample.key
            raise
        return _Row(place, sample.id, sample.key, caption, number, image_hash(data))

    def _load_substitute(self, place: Place, picture: np.ndarray, transform: ImageTransform) -> _Row:
        order, reason = self.mixture.orders[place.source], ""
        for attempt in range(SUBSTITUTE_ATTEMPTS):
            shard, index = order.substitute(place.epoch, place.shard, place.index, attempt)
            try:
                return self._load(place._replace(shard=shard, index=index), picture, transform)
            except BadSampleError as error:
                reason = error.reason
        raise UserError(
            f"no readable sample found in place of sample {place.index} of {self._path(place)}",
            got=f"{SUBSTITUTE_ATTEMPTS} bad ones, the last: {reason}",
            remedy="run `python -m data_tools verify` on the shards",
        )

    def _path(self, place: Place) -> str:
        return self.reader.corpus.paths[self.shard(place)]


def image_hash(data: bytes) -> int:
    """What tells whether two images are one: a hash of the bytes that hold it."""
    return xxhash.xxh3_64_intdigest(data)


def hashes_of(images: Sequence[int], texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[n]` of images, by their `image_hash`, and `[m]` of texts, by their tokens `[m, context]`."""
    of_texts = [xxhash.xxh3_64_intdigest(text.tobytes()) for text in texts.numpy()]
    image, text = (torch.from_numpy(np.array(hashes, np.uint64).view(np.int64)) for hashes in (images, of_texts))
    return image, text


def refuse_foreign_shard(
    reader: ShardReader, shard: int, sample: Sample, fields: Fields, target: Target | None
) -> None:
    """Raises UserError, with the keys that there are, where no sample of the shard has what `fields` name. The corpus
    is then of another kind, and substitutes would only hide it. `sample` is one of the shard."""
    missing = fields.missing(sample, target)
    if missing is None:
        return
    count = int(reader.corpus.counts[shard])
    if any(fields.missing(other, target) is None for other in _readable(reader, shard, count)):
        return
    raise UserError(
        f"no sample of {reader.corpus.paths[shard]} has the expected {missing}",
        got=describe(sample),
        remedy="name the members with data.train.N.image and data.train.N.captions, or pack the corpus with "
        "`python -m data_tools pack`",
    )


def _readable(reader: ShardReader, shard: int, count: int) -> Iterator[Sample]:
    for index in range(count):
        with suppress(BadSampleError):
            yield read_sample(reader, shard, index)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One picture is too little work for several threads; in a loader process there is one anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_sample(reader: ShardReader, shard: int, index: int) -> Sample:
    """Raises BadSampleError `damaged`; and UserError for a shard that is gone, changed or out of reach, because a
    substitute would hide that and differ between ranks."""
    try:
        return reader.read(shard, index)
    except TarDamageError as error:
        raise BadSampleError("damaged", str(error)) from error
    except OSError as error:
        raise UserError(
            f"cannot read shard {reader.corpus.paths[shard]}", got=error.strerror, remedy="check the disk or mount"
        ) from error
