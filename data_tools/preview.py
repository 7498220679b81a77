"""`python -m data_tools preview`: what is in the shards, on one page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UsageError

if TYPE_CHECKING:  # late otherwise: `--help` must answer at once
    from PIL.Image import Image as Picture

    from data_tools.shards import Corpus, Sample

EXAMPLES = """examples:
  python -m data_tools preview shards/ preview.png
  python -m data_tools preview 'laion/{00000..00099}.tar' preview.html --count 100 --seed 1"""

_COLUMNS, _CELL, _TEXT_HEIGHT, _MARGIN = 6, 224, 64, 8
_LINE, _LINES, _FONT = 36, 4, 12
_MAX_CAPTIONS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("shards", help="a packed folder, a tar or a brace pattern of tars")
    parser.add_argument("output", type=Path, help="a .png or .html file")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="samples to show (default: 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which samples are drawn (default: 0)")


@dataclass(frozen=True)
class _Cell:
    """One sample: its picture, and its label and captions."""

    picture: Picture
    captions: list[str]


def run(args: argparse.Namespace) -> int:
    """Draw the samples and write the page."""
    suffix = args.output.suffix.lower()
    if suffix not in (".png", ".html"):
        raise UsageError(f"cannot write {args.output}", got=suffix or "no suffix", expected=".png or .html")
    if args.count < 1:
        raise UsageError("--count is too small", got=args.count, expected=">= 1")
    from data_tools.redaction import redact_source
    from data_tools.shards import open_corpus
    from data_tools.shards.commit import atomic_write

    cells = _cells(open_corpus(args.shards), args.count, args.seed)
    data = _sheet(cells) if suffix == ".png" else _page(cells, redact_source(args.shards))
    with atomic_write(args.output.absolute()) as file:
        file.write(data)
    print(args.output)
    return 0


def _cells(corpus: Corpus, count: int, seed: int) -> list[_Cell]:
    import numpy as np

    from data_tools.shards import ShardReader

    edges = np.concatenate([[0], np.cumsum(corpus.counts)])
    places = random.Random(seed).sample(range(corpus.num_samples), min(count, corpus.num_samples))
    with ShardReader(corpus) as reader:
        cells = []
        for place in places:
            shard = int(np.searchsorted(edges, place, "right")) - 1
            cells.append(_cell(reader.read(shard, int(place - edges[shard])), corpus.classes))
    return cells


def _cell(sample: Sample, classes: tuple[str, ...]) -> _Cell:
    from PIL import Image

    from data_tools.media.bad import BadSampleError
    from data_tools.media.decode import thumbnail
    from data_tools.media.members import DEFAULT_FIELDS

    members, captions = sample.members, _captions(sample)
    if "cls" in members:
        number = members["cls"].decode("utf-8", "replace").strip()
        known = number.isdecimal() and int(number) < len(classes)
        captions = [classes[int(number)] if known else number, *captions]
    try:
        picture: Picture = thumbnail(DEFAULT_FIELDS.image_bytes(sample), _CELL)
    except BadSampleError as error:
        return _Cell(Image.new("RGB", (_CELL, _CELL), "grey"), [f"{error.kind}: {error.reason}", *captions])
    scale = _CELL // max(picture.size)
    if scale > 1:  # small pictures grow by whole pixels, so that what the model sees can be seen
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return _Cell(picture, captions)


def _captions(sample: Sample) -> list[str]:
    from data_tools.media.bad import BadSampleError
    from data_tools.media.members import DEFAULT_FIELDS

    try:
        return DEFAULT_FIELDS.all_captions(sample)
    except BadSampleError as error:
        return [f"{error.kind}: {error.reason}"]


def _sheet(cells: list[_Cell]) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    step_x, step_y = _CELL + _MARGIN, _CELL + _TEXT_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for number, cell in enumerate(cells):
        x, y = _MARGIN + number % columns * step_x, _MARGIN + number // columns * step_y
        sheet.paste(cell.picture, (x + (_CELL - cell.picture.width) // 2, y + (_CELL - cell.picture.height) // 2))
        lines = textwrap.wrap(cell.captions[0] if cell.captions else "", _LINE, max_lines=_LINES, placeholder=" ...")
        draw.multiline_text((x, y + _CELL + 2), "\n".join(lines), "black", font, spacing=1)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _page(cells: list[_Cell], title: str) -> bytes:
    style = (
        "body{font:13px sans-serif;display:grid;grid-template-columns:repeat(auto-fill,224px);gap:16px}"
        "figure{margin:0}img{max-width:224px}ul{margin:4px 0;padding-left:16px}"
    )
    figures = []
    for cell in cells:
        file = io.BytesIO()
        cell.picture.save(file, "JPEG", quality=90)
        items = "".join(f"<li>{html.escape(caption)}</li>" for caption in cell.captions[:_MAX_CAPTIONS])
        source = base64.b64encode(file.getvalue()).decode()
        figures.append(f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><ul>{items}</ul></figure>')
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return (head + "\n".join(figures) + "\n").encode()
