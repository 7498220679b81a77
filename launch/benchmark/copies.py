"""`benchmark.py copies`: which planted copies of a folder's pictures their hashes tell, by kind and radius."""

from __future__ import annotations

import argparse
import io
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data_tools.dedup.near import distance
from data_tools.errors import UserError
from data_tools.hashing.perceptual import perceptual_hash
from data_tools.media.bad import BadSampleError
from data_tools.media.decode import decode_rgb
from data_tools.media.image import SUFFIXES
from launch.benchmark.report import show_table, write_report

Kind = Callable[[Image.Image, random.Random], bytes]
_COLORS = ("white", "black", (30, 90, 200))


def _resized(share: float) -> Kind:
    def resize(image: Image.Image, draw: random.Random) -> bytes:
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        return _jpeg(image.resize(size, Image.Resampling.BICUBIC))

    return resize


def _framed(image: Image.Image, draw: random.Random) -> bytes:
    left, top, right, bottom = (draw.randint(5, 60) for _ in range(4))
    return _jpeg(ImageOps.expand(image, (left, top, right, bottom), fill=draw.choice(_COLORS)))


def _cropped(image: Image.Image, draw: random.Random) -> bytes:
    x, y = image.width // 40, image.height // 40
    return _jpeg(image.crop((x, y, image.width - x, image.height - y)))


def _lettered(image: Image.Image, draw: random.Random) -> bytes:
    image, size = image.copy(), max(8, image.height // 10)
    ImageDraw.Draw(image).text((image.width // 10, image.height * 4 // 5), "SALE 50 % OFF", "white", font_size=size)
    return _jpeg(image)


def _jpeg(image: Image.Image, quality: int = 85) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


KINDS: dict[str, Kind] = {
    "compressed anew, quality 30": lambda image, draw: _jpeg(image, 30),
    "compressed anew, quality 60": lambda image, draw: _jpeg(image, 60),
    "resized to a half": _resized(0.5),
    "resized to 0.3": _resized(0.3),
    "resized to twice": _resized(2.0),
    "mirrored": lambda image, draw: _jpeg(ImageOps.mirror(image)),
    "framed, 5 to 60 pixels a side": _framed,
    "cropped by 5 %": _cropped,
    "text over it": _lettered,
}


def distances(pictures: list[bytes], kind: Kind, seed: int = 0) -> np.ndarray:
    """Bits between the hash of each encoded picture and that of its copy; 64 where one has none."""
    draw, found = random.Random(seed), []
    for data in pictures:
        one, other = perceptual_hash(data), perceptual_hash(kind(Image.fromarray(decode_rgb(data)), draw))
        lacking = one is None or other is None
        found.append(64 if lacking else int(distance(np.uint64(one), np.uint64(other))))
    return np.array(found)


def run_copies(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    pictures = _pictures(args.pictures, args.limit)
    radii = sorted(args.radii)
    shares = {}
    for name, kind in KINDS.items():
        off = distances(pictures, kind)
        shares[name] = {radius: float(np.mean(off <= radius)) for radius in radii}
    others, pairs = _others(pictures, radii)
    title = f"{len(pictures)} pictures of {args.pictures.name}: the share of copies within so many bits"
    rows = [(name, *(f"{share[radius]:.4f}" for radius in radii)) for name, share in shares.items()]
    rows.append((f"other pictures, of {pairs:,} pairs", *(str(others[radius]) for radius in radii)))
    show_table(title, ("copies", *map(str, radii)), rows)
    path = args.work_dir.resolve() / time.strftime("copies-%Y%m%d-%H%M%S") / "report.json"
    write_report(path, {"kind": "copies", "pictures": len(pictures), "shares": shares, "others": others})
    print(f"report: {path}")
    return 0


def _pictures(folder: Path, limit: int) -> list[bytes]:
    found = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES][:limit]
    sound = [data for data in found if _decodes(data)]
    if not sound:
        raise UserError(f"no pictures in {folder}", remedy="name a folder of them")
    return sound


def _decodes(data: bytes) -> bool:
    try:
        decode_rgb(data)
    except BadSampleError:
        return False
    return True


def _others(pictures: list[bytes], radii: list[int]) -> tuple[dict[int, int], int]:
    """How many pairs of different pictures are as near, and how many there are."""
    hashes = np.array([one for data in pictures if (one := perceptual_hash(data)) is not None], np.uint64)
    off = np.concatenate([distance(hashes[one + 1 :], hashes[one]) for one in range(len(hashes))])
    return {radius: int(np.count_nonzero(off <= radius)) for radius in radii}, len(off)
