"""The samples of one training step: read, decoded and replaced exactly as training does."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from data_tools.errors import UsageError, printable, shown
from data_tools.format.commit import atomic_write
from data_tools.progress import Progress
from pretrain.config.batch import local_batch
from pretrain.engine.opening import resolve_checkpoint
from pretrain.engine.reader import CheckpointReader
from pretrain.process.runtime import Runtime, start
from pretrain.stream.batches import Batch
from pretrain.stream.loader import StreamSource, TrainStream
from pretrain.stream.mixture import Place, Places
from pretrain.stream.position import Position
from pretrain.stream.sources import train_stream
from pretrain.tasks import TaskConfig
from pretrain.tasks.recipe import recipe_of

_PIECE = 256  # samples read between two looks at the progress
_SIDE, _QUALITY = 224, 85  # of a picture on the page
_STYLE = (
    "body{font:13px sans-serif}main{display:grid;grid-template-columns:repeat(auto-fill,224px);gap:16px}"
    "figure{margin:0}img{width:224px;image-rendering:pixelated}small{color:#666;overflow-wrap:anywhere}"
    ".r img{outline:3px solid #c00}"
)


@dataclass(frozen=True)
class _Line:
    """One sample; `position` counts within the rank's slice."""

    rank: int
    position: int
    source: int
    epoch: int
    shard: str
    key: str
    said: str  # its caption, or the name of its class
    picture: torch.Tensor | None  # uint8 [3, size, size]
    replaces: bool  # it stands in for a bad sample

    def __str__(self) -> str:
        mark = "  in place of a bad sample" if self.replaces else ""
        place = f"rank {self.rank} {self.position:>5}  source {self.source} epoch {self.epoch}"
        return f"{place}  {printable(Path(self.shard).name)}  {shown(self.key)}  {shown(self.said)!r}{mark}"


def show(config: TaskConfig, options: argparse.Namespace) -> int:
    """Print the step's samples, or write the page; returns the exit code."""
    ranks = range(options.world_size) if options.rank is None else range(options.rank, options.rank + 1)
    checkpoint = options.checkpoint and resolve_checkpoint(options.checkpoint)
    lines = _read(config, options.step, options.world_size, ranks, checkpoint)
    if options.keys:
        for line in lines:
            print(line.rank, line.position, line.source, printable(line.shard), printable(line.key), sep="\t")
        return 0
    replaced = sum(line.replaces for line in lines)
    title = f"step {options.step}: {len(lines)} samples, {replaced} in place of bad ones"
    if options.html:
        _write_page(options.html, title, lines)
        print(options.html)
        return 0
    print(title)
    for line in lines:
        print(line)
    return 0


def _read(config: TaskConfig, step: int, world_size: int, ranks: range, checkpoint: Path | None) -> list[_Line]:
    """The samples of `ranks`, in pieces, so that the progress moves: pieces are the slices of a larger world size."""
    share = local_batch(config, world_size)
    piece = max(size for size in range(1, min(share, _PIECE) + 1) if share % size == 0)
    reader = None if checkpoint is None else CheckpointReader(checkpoint)
    recipe = recipe_of(config, reader, start(distributed=False))
    fields = recipe.fields(None)
    lines: list[_Line] = []
    with Progress("reading", share * len(ranks), "samples") as progress:
        for number in range(ranks.start * share // piece, ranks.stop * share // piece):
            runtime = Runtime(number, config.train.global_batch // piece, 0, torch.device("cpu"), 1)
            stream = train_stream(recipe.config, recipe.sources, fields, runtime, inspect_only=True)
            if reader is not None:
                stream.go_on_from(Position.from_dict(reader.state().position))
            _check_step(step, stream, config.train.duration)
            planned = stream.mixture.batch(step - 1, runtime.world_size, number)
            with stream:
                lines += _lines(next(stream.iterate(step - 1)), planned, recipe.sources, number * piece, share)
            progress.update(len(lines))
    return lines


def _check_step(step: int, stream: TrainStream, duration: str) -> None:
    last = stream.steps_until(duration, "train.duration")
    if step > last:
        raise UsageError(
            "--step is beyond the end of the run",
            got=step,
            expected=f"1 to {last}, by train.duration={duration}",
            remedy="a longer run has them: add train.duration='...' to the command",
        )


def _lines(batch: Batch, planned: Places, sources: Sequence[StreamSource], first: int, share: int) -> Iterator[_Line]:
    places = [Place(*place) for place in zip(*(column.tolist() for column in batch.slots), strict=True)]
    said, image = _said(batch, sources[0].corpus.classes), batch.inputs.get("image")
    for row, place in enumerate(places):
        rank, position = divmod(first + row, share)
        yield _Line(
            rank=rank,
            position=position,
            source=place.source,
            epoch=place.epoch,
            shard=sources[place.source].corpus.paths[place.shard],
            key=batch.keys[row],
            said=said[row],
            picture=None if image is None else image["pixels"][row],
            replaces=(planned.shards[row], planned.indices[row]) != (place.shard, place.number),
        )


def _said(batch: Batch, classes: Sequence[str]) -> list[str]:
    """Of each sample, in words."""
    if batch.captions or "label" not in batch.inputs:
        return batch.captions or [""] * len(batch.keys)
    return [classes[number] for number in batch.inputs["label"]["class"].tolist()]


def _write_page(path: Path, title: str, lines: list[_Line]) -> None:
    figures = []
    for line in lines:
        picture = "" if line.picture is None else f'<img alt="" src="{_embedded(line.picture)}">'
        name = f"rank {line.rank} / {line.position}, source {line.source}, "
        name += f"{printable(Path(line.shard).name)}, {shown(line.key)}"
        name += ", in place of a bad sample" if line.replaces else ""
        figures.append(
            f"<figure{' class=r' if line.replaces else ''}>{picture}"
            f"<div>{html.escape(shown(line.said))}</div><small>{html.escape(name)}</small></figure>"
        )
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    page = f"{head}<h1>{html.escape(title)}</h1><main>{''.join(figures)}</main>\n"
    with atomic_write(path.absolute()) as file:
        file.write(page.encode())


def _embedded(pixels: torch.Tensor) -> str:
    """A picture as a URL that holds it."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(file, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
