"""A picture of retrieval: captions with the images the model finds for them, the right one framed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_tools.corpus import Corpus, ShardReader
from data_tools.format.commit import atomic_write
from data_tools.media.decode import decode_rgb
from data_tools.media.lettering import Lettering
from data_tools.media.members import DEFAULT_FIELDS, Fields, fitting
from pretrain.evaluate.features import CorpusFeatures
from pretrain.evaluate.ranking import similarities

TILE, FRAME, GAP, TEXT_WIDTH = 128, 5, 10, 270
RIGHT, WRONG = (22, 163, 74), (225, 225, 225)


def write_retrieval_picture(
    path: str | Path,
    features: CorpusFeatures,
    corpus: Corpus,
    queries: int = 8,
    top: int = 5,
    seed: int = 0,
    fields: Fields = DEFAULT_FIELDS,
) -> None:
    """Write a PNG with one row per query: a caption, the rank of its image, and the `top` images, its own framed.

    The queries are captions of different images, drawn by `seed`; `fields` is what the features were read with. One
    rank calls it.
    """
    positions, _ = features.first_captions()
    generator = torch.Generator().manual_seed(seed)
    drawn = positions.cpu()[torch.randperm(len(positions), generator=generator)[:queries]].sort().values
    rows = [_draw_caption(features, int(position), generator) for position in drawn]
    scores = similarities(features.texts[rows], features.images).cpu()
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    fields, letters = fitting(fields, corpus), Lettering(14)
    with ShardReader(corpus) as reader:
        strips = [
            _strip(reader, fields, letters, features, row, int(position), found.tolist(), top)
            for row, position, found in zip(rows, drawn, order, strict=True)
        ]
    page = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for number, strip in enumerate(strips):
        page.paste(strip, (0, number * strip.height))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        page.save(file, "PNG")
    if complaint := letters.complaint():
        print(complaint, file=sys.stderr)


def _draw_caption(features: CorpusFeatures, position: int, generator: torch.Generator) -> int:
    own = torch.nonzero(features.text_image.cpu() == position).flatten()
    return int(own[torch.randint(len(own), (1,), generator=generator)])


def _strip(
    reader: ShardReader,
    fields: Fields,
    letters: Lettering,
    features: CorpusFeatures,
    row: int,
    position: int,
    found: list[int],
    top: int,
) -> Image.Image:
    first = int(torch.nonzero(features.text_image == position)[0])
    caption = fields.all_captions(_sample(reader, position))[row - first]
    rank = found.index(position) + 1
    strip = Image.new("RGB", (TEXT_WIDTH + top * (TILE + GAP) + GAP, TILE + GAP), "white")
    draw = ImageDraw.Draw(strip)
    letters.draw_lines(draw, (GAP, GAP), letters.wrap(caption, TEXT_WIDTH - 2 * GAP, 5))
    note = "found first" if rank == 1 else f"its image: place {rank} of {len(found)}"
    draw.text((GAP, TILE - GAP), note, fill=RIGHT if rank <= top else "grey", font=ImageFont.load_default(12))
    for place, candidate in enumerate(found[:top]):
        image = Image.fromarray(decode_rgb(fields.image_bytes(_sample(reader, candidate))))
        inner = ImageOps.pad(image, (TILE - 2 * FRAME, TILE - 2 * FRAME), color="white")
        tile = ImageOps.expand(inner, FRAME, RIGHT if candidate == position else WRONG)
        strip.paste(tile, (TEXT_WIDTH + place * (TILE + GAP), GAP // 2))
    return strip


def _sample(reader: ShardReader, position: int):
    return reader.read(*reader.corpus.locate(position))
