"""Small corpora for tests of the stream, written with the project's own shard writer."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from data_tools.corpus import Corpus, open_corpus
from data_tools.format.writer import write_shard
from data_tools.media.members import DEFAULT_FIELDS, fitting
from pretrain.stream.eval_reader import EvalReader, labels_of
from pretrain.stream.fields.field import Field
from pretrain.stream.fields.image import Image
from pretrain.stream.fields.label import Label
from pretrain.stream.fields.text import Text
from pretrain.stream.loader import FieldsOf, StreamSettings, StreamSource, TrainStream
from pretrain.stream.transform import ImageSettings

CONTEXT = 12
IMAGE = ImageSettings(16)


def fields_of(image: ImageSettings = IMAGE, tokenize=None, word_dropout=0.0, rule=None, phases=()) -> FieldsOf:
    """What `StreamSettings` take: pictures, with a tokenizer their captions, else their labels."""

    def fields(source: StreamSource, phase: int) -> dict[str, Field]:
        size = [*(phase.image_size for phase in phases), None][phase] or image.size
        picture = Image(replace(image, size=size), source.mapping)
        if tokenize is None:
            return {"label": Label(), "image": picture}
        return {"text": Text(tokenize, source.mapping, source.choose, word_dropout, rule), "image": picture}

    return fields


def stream_of(sources: Corpus | list[StreamSource], **settings) -> TrainStream:
    """A stream by the settings of `fields_of` and of `StreamSettings`."""
    names = ("image", "tokenize", "word_dropout", "rule")
    own = {name: settings.pop(name) for name in names if name in settings}
    settings.setdefault("fields", fields_of(phases=settings.get("phases", ()), **own))
    return TrainStream(sources, StreamSettings(**settings))


def reader_of(corpus: Corpus, tokenize=None, batch=4, image=IMAGE, mapping=DEFAULT_FIELDS, **settings) -> EvalReader:
    """An evaluation reader of pictures, with a tokenizer of their captions, of labels where there are any."""
    mapping = fitting(mapping, corpus)
    texts = {} if tokenize is None else {"text": Text(tokenize, mapping)}
    return EvalReader(corpus, {"image": Image(image, mapping), **texts, **labels_of(corpus)}, batch, **settings)


def pixels(batch) -> torch.Tensor:
    """Of the images of a Batch or EvalBatch."""
    return batch.inputs["image"]["pixels"]


def tokens(batch) -> torch.Tensor:
    """Of its texts."""
    return batch.inputs["text"]["tokens"]


def classes(batch) -> torch.Tensor:
    """Of its labels."""
    return batch.inputs["label"]["class"]


def characters(texts: list[str]) -> torch.Tensor:
    """A tokenizer: the code points of the first characters, int64 [n, CONTEXT]."""
    rows = [[ord(c) for c in text[:CONTEXT].ljust(CONTEXT)] for text in texts]
    return torch.tensor(rows, dtype=torch.int64)


def picture(number: int, format: str = "JPEG") -> bytes:
    """A noisy picture of its own size and content for each number."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(coarse).resize((24 + number % 9, 20 + number % 7), PIL.Image.Resampling.BILINEAR).save(
        buffer, format
    )
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """Image, first caption, three captions and a label."""
    captions = [f"{word} {number}" for word in ("one", "two", "three")]
    return {
        "jpg": picture(number),
        "txt": captions[0].encode(),
        "json": json.dumps({"captions": captions}).encode(),
        "cls": str(number % 3).encode(),
    }


def write_corpus(folder: Path, counts: list[int], change: dict[int, dict[str, bytes | None]] | None = None) -> Corpus:
    """Shards of `counts` samples. `change`: sample number -> members to replace (None: to leave out)."""
    number, names = 0, []
    for shard, count in enumerate(counts):
        samples = []
        for n in range(number, number + count):
            changed = members(n) | (change or {}).get(n, {})
            samples.append((f"{n:06d}", {name: data for name, data in changed.items() if data is not None}))
        number += count
        names.append(folder / f"s-{shard:06d}.tar")
        write_shard(names[-1], samples)
    return open_corpus(names)
