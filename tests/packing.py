"""Images and inputs for the tests of data_tools, made on the spot."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ORIENTATION = 0x0112


def picture(seed: int = 0, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """Smooth colours that differ with the seed and in every corner."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed: int = 0, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
        options["exif"] = exif.tobytes()
    return encoded(picture(seed), "JPEG", **options)


def photo_folder(folder: Path, count: int = 12) -> Path:
    """`count` photos with captions beside them."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"photo.{number}.jpg").write_bytes(jpeg(number))
        (folder / f"photo.{number}.txt").write_text(f"caption of photo {number}\n")
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_tools(*args: object, ok: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a verb as a user does; `ok` says which exit is expected."""
    command = [sys.executable, "-m", "data_tools", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
