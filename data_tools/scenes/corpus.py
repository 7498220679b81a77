"""Choosing the scenes of every split and writing them as tables and folders that `pack` reads."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import simplejpeg

from data_tools.errors import UserError
from data_tools.format.commit import atomic_write
from data_tools.parallel import run_tasks
from data_tools.progress import Progress
from data_tools.scenes.captions import captions
from data_tools.scenes.render import render
from data_tools.scenes.scene import ATTRIBUTES, COLORS, TEXTURES, Scene, random_group, random_scene, swap
from data_tools.scenes.shortcuts import ceilings

RECORD_NAME = "scenes.json"
KINDS = (*ATTRIBUTES, "relation")
_CHUNK = 250
_JPEG_QUALITY = 92
# Raised when the same settings come to mean other pictures or captions.
_VERSION = 1


@dataclass(frozen=True)
class Amounts:
    """How many images of each kind; `class_*` are per class. The rest follows from the seed."""

    train: int
    test: int
    pairs: int
    class_train: int
    class_test: int
    seed: int


@dataclass(frozen=True)
class _Chunk:
    """Scenes to draw. `paths` are relative to `folder`; `extra` joins the caption table, None writes no captions."""

    folder: Path
    paths: list[str]
    scenes: list[Scene]
    extra: list[dict] | None
    seeds: list[str]


@dataclass(frozen=True)
class _Split:
    """A caption table with its images (`extra` given), or class folders without captions."""

    name: str
    paths: list[str]
    scenes: list[Scene]
    extra: list[dict] | None


def make_corpus(folder: Path, amounts: Amounts, workers: int) -> dict:
    """Write the whole corpus and return the shortcuts' ceilings; the same amounts give the same bytes.

    Raises UserError when `folder` holds anything but a corpus of the same amounts, whole or interrupted.
    """
    record = {"version": _VERSION, **asdict(amounts)}
    test, pairs = test_scenes(amounts), minimal_pairs(amounts)
    limits = ceilings(test, [pair[1:] for pair in pairs])
    if _begin(folder, record):
        return limits
    splits = [
        _table("train", train_scenes(amounts)),
        _table("test", test),
        _pairs_table(pairs),
        *_class_folders(amounts),
    ]
    for split in splits:
        for parent in {(folder / split.name / path).parent for path in split.paths}:
            parent.mkdir(parents=True, exist_ok=True)
    chunks = [chunk for split in splits for chunk in _chunks(folder, split, amounts.seed)]
    lines: dict[Path, dict[str, list[str]]] = {}
    with Progress("drawing", sum(len(chunk.paths) for chunk in chunks), "images") as progress:
        for chunk_folder, first, rows in run_tasks(_draw, chunks, workers, progress):
            lines.setdefault(chunk_folder, {})[first] = rows
    for chunk_folder, parts in lines.items():
        rows = [row for first in sorted(parts) for row in parts[first]]
        if rows:
            _write(chunk_folder / "captions.jsonl", "".join(rows))
    _write(folder / "test" / "shortcuts.json", json.dumps(limits, indent=1) + "\n")
    _write(folder / RECORD_NAME, json.dumps({**record, "complete": True}) + "\n")
    return limits


def train_scenes(amounts: Amounts) -> list[Scene]:
    """Scenes without held-out pairs; the same one may come twice."""
    return [random_scene(_rng(amounts.seed, "train", number), held_out=False) for number in range(amounts.train)]


def test_scenes(amounts: Amounts) -> list[Scene]:
    """Scenes with a held-out pair each, no two of the same meaning."""
    rng = _rng(amounts.seed, "test")
    found: dict[Scene, None] = {}
    while len(found) < amounts.test:
        found[random_scene(rng, held_out=True)] = None
    return list(found)


def minimal_pairs(amounts: Amounts) -> list[tuple[str, Scene, Scene]]:
    """(kind of swap, scene, swapped scene), kinds in turn. Both hold a held-out pair, so neither was trained on."""
    rng = _rng(amounts.seed, "minimal_pairs")
    found: dict[tuple[str, Scene, Scene], None] = {}
    while len(found) < amounts.pairs:
        scene, kind = random_scene(rng, held_out=True), KINDS[len(found) % len(KINDS)]
        other = swap(scene, kind) if scene.relation else None
        if other and other.held_out and (kind, other, scene) not in found:
            found[(kind, scene, other)] = None
    return list(found)


def _rng(*seed: object) -> random.Random:
    return random.Random("/".join(map(str, seed)))


def _begin(folder: Path, record: dict) -> bool:
    """Whether the corpus is there already; if not, write down what is being made."""
    path = folder / RECORD_NAME
    if folder.exists() and any(folder.iterdir()):
        found = json.loads(path.read_bytes()) if path.exists() else {}
        complete = found.pop("complete", False)
        if found != record:
            got = ", ".join(f"{name} {value}" for name, value in found.items()) or "other files"
            expected = ", ".join(f"{name} {value}" for name, value in record.items())
            raise UserError(
                f"{folder} is in use", got=got, expected=f"an empty folder, or {expected}", remedy="choose another"
            )
        if complete:
            return True
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps({**record, "complete": False}) + "\n")
    return False


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _table(name: str, scenes: list[Scene]) -> _Split:
    paths = [f"images/{name}-{number:06d}.jpg" for number in range(len(scenes))]
    return _Split(name, paths, scenes, [{} for _ in scenes])


def _pairs_table(pairs: list[tuple[str, Scene, Scene]]) -> _Split:
    paths, scenes, extra = [], [], []
    for number, (kind, *halves) in enumerate(pairs):
        for member, scene in enumerate(halves):
            paths.append(f"images/pair-{number:06d}-{member}.jpg")
            scenes.append(scene)
            extra.append({"pair": number, "member": member, "kind": kind})
    return _Split("minimal_pairs", paths, scenes, extra)


def _class_folders(amounts: Amounts) -> Iterator[_Split]:
    """One shape per image in folders named by texture and colour; held-out pairs come in the test part only."""
    for part, count in (("train", amounts.class_train), ("test", amounts.class_test)):
        paths, scenes = [], []
        for texture, color in product(TEXTURES, COLORS):
            for number in range(count):
                paths.append(f"{texture} {color}/{texture}-{color}-{part}-{number:04d}.jpg")
                rng = _rng(amounts.seed, "classes", part, texture, color, number)
                scenes.append(_class_scene(texture, color, part, rng))
        yield _Split(f"classes/{part}", paths, scenes, None)


def _class_scene(texture: str, color: str, part: str, rng: random.Random) -> Scene:
    while True:
        group = replace(random_group(rng), count=1, texture=texture, color=color)
        if part == "test" or not group.held_out:
            return Scene("", (group,))


def _chunks(folder: Path, split: _Split, seed: int) -> Iterator[_Chunk]:
    for start in range(0, len(split.paths), _CHUNK):
        span = slice(start, start + _CHUNK)
        paths = split.paths[span]
        seeds = [f"{seed}/{split.name}/{path}" for path in paths]
        yield _Chunk(folder / split.name, paths, split.scenes[span], split.extra and split.extra[span], seeds)


def _draw(chunk: _Chunk, advance: Callable[[int], None]) -> tuple[Path, str, list[str]]:
    """Draw a chunk's images; returns its folder, first path, and lines of the caption table."""
    rows = []
    for number, (path, scene) in enumerate(zip(chunk.paths, chunk.scenes, strict=True)):
        rng = random.Random(chunk.seeds[number])
        pixels = np.asarray(render(scene, rng))
        # No chroma subsampling: at this size it would smear the colours.
        data = simplejpeg.encode_jpeg(pixels, _JPEG_QUALITY, colorsubsampling="444")
        (chunk.folder / path).write_bytes(data)
        if chunk.extra is not None:
            row = {"image": path, "captions": captions(scene, rng), **chunk.extra[number], "scene": scene.to_dict()}
            rows.append(json.dumps(row) + "\n")
    advance(len(chunk.paths))
    return chunk.folder, chunk.paths[0], rows
