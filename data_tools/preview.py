"""`python -m data_tools preview`: what is in the shards, on one page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.errors import UsageError, shown

if TYPE_CHECKING:  # late otherwise: `--help` must answer at once
    from PIL.Image import Image as Picture

    from data_tools.corpus import Corpus, Sample
    from data_tools.media.members import Fields

EXAMPLES = """examples:
  python -m data_tools preview shards/ preview.png
  python -m data_tools preview 'laion/{00000..00099}.tar' preview.html --count 100 --seed 1

Each sample is shown upright with its key, its class and its captions, as training reads them; one that training would
replace says why. Text of any script is drawn in the fonts of this machine; characters that none has are named."""

_COLUMNS, _CELL, _MARGIN = 6, 224, 8
_TITLE, _TEXT, _SMALL = 18, 12, 10  # pixels
_LINES, _MAX_CAPTIONS, _MAX_CLASSES = 4, 5, 8
_MAX_DRAWN = 1000  # samples on a PNG; a page of HTML may hold more
_LABEL, _FAINT, _FAULT = (22, 101, 52), (120, 120, 120), (190, 18, 60)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("shards", help="a packed folder, a folder of tars, a tar or a pattern of tars")
    parser.add_argument("output", type=Path, help="a .png or .html file")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="samples to show (default: 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which samples are drawn (default: 0)")


@dataclass
class _Cell:
    """One sample: its picture, key, class name, captions, and what is bad about it."""

    picture: Picture
    key: str
    label: str | None = None
    captions: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Page:
    """What is shown, under its title and a line that counts."""

    title: str
    counts: str
    cells: list[_Cell]


def run(args: argparse.Namespace) -> int:
    """Draw the samples and write the page."""
    suffix = args.output.suffix.lower()
    if suffix not in (".png", ".html"):
        raise UsageError(f"cannot write {args.output}", got=suffix or "no suffix", expected=".png or .html")
    if args.count < 1:
        raise UsageError("--count is too small", got=args.count, expected=">= 1")
    if suffix == ".png" and args.count > _MAX_DRAWN:
        raise UsageError("--count is too large for a .png", got=args.count, expected=f"at most {_MAX_DRAWN}, or .html")
    from data_tools.corpus import open_corpus
    from data_tools.format.commit import atomic_write
    from data_tools.redaction import redact_source

    corpus = open_corpus(args.shards)
    cells = _cells(corpus, args.count, args.seed)
    page = _Page(shown(redact_source(args.shards)), _counts(corpus, cells, args.seed), cells)
    data = _sheet(page) if suffix == ".png" else _document(page)
    with atomic_write(args.output.absolute()) as file:
        file.write(data)
    print(args.output)
    return 0


def _counts(corpus: Corpus, cells: list[_Cell], seed: int) -> str:
    captions = sum(len(cell.captions) for cell in cells)
    shards = f"{len(corpus.paths)} shard{'s' if len(corpus.paths) > 1 else ''}"
    parts = [f"{len(cells)} of {corpus.num_samples} samples (seed {seed}) of {shards}", f"{captions} captions"]
    labels = Counter(cell.label for cell in cells if cell.label is not None)
    if labels:
        known = f"{len(corpus.classes)} classes" if corpus.classes else "classes without names"
        most = ", ".join(f"{label}: {count}" for label, count in labels.most_common(_MAX_CLASSES))
        more = f" and {len(labels) - _MAX_CLASSES} more" if len(labels) > _MAX_CLASSES else ""
        parts.append(f"{known}, here {most}{more}")
    bad = sum(bool(cell.faults) for cell in cells)
    parts += [f"{bad} that training would replace"] if bad else []
    return "; ".join(parts)


def _cells(corpus: Corpus, count: int, seed: int) -> list[_Cell]:
    from PIL import Image

    from data_tools.corpus import ShardReader
    from data_tools.format.tar import TarDamageError
    from data_tools.media.members import DEFAULT_FIELDS, fitting

    places = random.Random(seed).sample(range(corpus.num_samples), min(count, corpus.num_samples))
    fields = fitting(DEFAULT_FIELDS, corpus)
    cells = []
    with ShardReader(corpus) as reader:
        for place in places:
            shard, index = corpus.locate(place)
            try:
                cells.append(_cell(reader.read(shard, index), fields, corpus.classes))
            except TarDamageError as error:
                grey = Image.new("RGB", (_CELL, _CELL), "grey")
                cells.append(_Cell(grey, f"number {index}", faults=[f"damaged: {shown(error)}"]))
    return cells


def _cell(sample: Sample, fields: Fields, classes: tuple[str, ...]) -> _Cell:
    from PIL import Image

    from data_tools.media.bad import BadSampleError
    from data_tools.media.decode import thumbnail
    from data_tools.media.members import captions_at

    cell = _Cell(Image.new("RGB", (_CELL, _CELL), "grey"), shown(sample.key))
    try:
        cell.picture = _enlarged(thumbnail(fields.image_bytes(sample), _CELL))
    except BadSampleError as error:
        cell.faults.append(f"{error.kind}: {shown(error.reason)}")
    if "cls" in sample.members:
        number = sample.members["cls"].decode("utf-8", "replace").strip()
        known = number.isdecimal() and len(number) < 10 and int(number) < len(classes)
        cell.label = shown(classes[int(number)] if known else f"class {number}")
    for place in fields.captions:
        try:
            cell.captions = cell.captions or captions_at(sample, place)
        except BadSampleError as error:
            cell.faults.append(f"{error.kind}: {shown(error.reason)}")
    if not cell.captions and cell.label is None:
        cell.faults.append(f"no_caption: members are {shown(', '.join(sample.members))}")
    return cell


def _enlarged(picture: Picture) -> Picture:
    """Small pictures grow by whole pixels, so that what the model sees can be seen."""
    from PIL import Image

    scale = _CELL // max(picture.size)
    if scale < 2:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _texts(cell: _Cell) -> list[tuple[str, tuple[int, int, int]]]:
    """The lines below a picture and their colours: what is bad, the class, the first caption and how many more."""
    lines = [(fault, _FAULT) for fault in cell.faults]
    lines += [(cell.label, _LABEL)] if cell.label is not None else []
    if cell.captions:
        lines.append((cell.captions[0], (0, 0, 0)))
    if len(cell.captions) > 1:
        lines.append((f"and {len(cell.captions) - 1} more captions", _FAINT))
    return lines


def _sheet(page: _Page) -> bytes:
    from PIL import Image, ImageDraw

    from data_tools.media.lettering import Lettering

    title, text, small = (Lettering(size) for size in (_TITLE, _TEXT, _SMALL))
    columns = min(_COLUMNS, max(3, len(page.cells)))
    width = columns * (_CELL + _MARGIN) + _MARGIN
    counts = text.wrap(page.counts, width - 2 * _MARGIN, 3)
    top = _MARGIN + title.line_height + len(counts) * text.line_height + _MARGIN
    height = _CELL + small.line_height + (_LINES + 1) * text.line_height + _MARGIN
    rows = -(-len(page.cells) // columns)
    sheet = Image.new("RGB", (width, top + rows * height + _MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    title.draw_lines(canvas, (_MARGIN, _MARGIN), title.wrap(page.title, width - 2 * _MARGIN, 1))
    text.draw_lines(canvas, (_MARGIN, _MARGIN + title.line_height), counts, _FAINT)
    for number, cell in enumerate(page.cells):
        x, y = _MARGIN + number % columns * (_CELL + _MARGIN), top + number // columns * height
        sheet.paste(cell.picture, (x + (_CELL - cell.picture.width) // 2, y + (_CELL - cell.picture.height) // 2))
        small.draw_lines(canvas, (x, y + _CELL + 2), small.wrap(cell.key, _CELL, 1), _FAINT)
        y += _CELL + 2 + small.line_height
        room = _LINES + 1
        for words, colour in _texts(cell):
            lines = text.wrap(words, _CELL, min(room, _LINES))
            text.draw_lines(canvas, (x, y), lines, colour)
            y, room = y + len(lines) * text.line_height, room - len(lines)
    text.missing |= title.missing | small.missing
    if complaint := text.complaint():
        print(complaint, file=sys.stderr)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _document(page: _Page) -> bytes:
    style = (
        "body{font:13px sans-serif}main{display:grid;grid-template-columns:repeat(auto-fill,224px);gap:16px}"
        "figure{margin:0;overflow-wrap:anywhere}img{max-width:224px}ul{margin:4px 0;padding-left:16px}"
        "small{color:#666}b{color:#166534}em{color:#be123c}"
    )
    figures = []
    for cell in page.cells:
        file = io.BytesIO()
        cell.picture.save(file, "JPEG", quality=90)
        source = base64.b64encode(file.getvalue()).decode()
        parts = [f"<small>{_escaped(cell.key)}</small>", *(f"<br><em>{_escaped(fault)}</em>" for fault in cell.faults)]
        parts += [f"<br><b>{_escaped(cell.label)}</b>"] if cell.label is not None else []
        items = [_escaped(caption) for caption in cell.captions[:_MAX_CAPTIONS]]
        if len(cell.captions) > _MAX_CAPTIONS:
            items.append(f"and {len(cell.captions) - _MAX_CAPTIONS} more")
        parts.append("<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>")
        figures.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><div>{"".join(parts)}</div></figure>'
        )
    title = _escaped(page.title)
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    body = f"<h1>{title}</h1><p>{_escaped(page.counts)}</p><main>" + "\n".join(figures) + "</main>\n"
    return (head + body).encode()


def _escaped(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())
