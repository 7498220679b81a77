"""Images: which members and files are some, their formats and largest size, which way is up, how they become RGB.

Formats are those that Pillow decodes within the process: EPS, for one, would start another program.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from data_tools.media import MAX_PIXELS
from data_tools.media.bad import BadSampleError

# Format, as Pillow names it, -> extension of a member that holds it.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # opened as JPEG, then found to hold several
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
    "AVIF": "jpg",  # these two are found behind other names only: no reader of shards looks for theirs
    "JPEG2000": "jpg",
}
FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
# Other names of files of these formats: what browsers and cameras save, and the tools of biologists.
_FILES_ONLY = ("jfif", "jpe", "avif", "jp2", "j2k", "pgm", "pbm", "pnm", "dib")
SUFFIXES = frozenset(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *_FILES_ONLY))
JPEG_START = b"\xff\xd8"
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TELLS_ORIENTATION = (b"Exif\0\0", b"tiff:Orientation")  # in a JPEG: an EXIF segment, or XMP
_ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of an object, in Pillow's messages: it differs between runs
SNIFFED = 16  # bytes by which a format is told


def is_image_name(name: str) -> bool:
    """Whether a file or member of that name is taken for an image: by what follows its last dot."""
    return name.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS


def sniff(start: bytes) -> str | None:
    """The extension for the format of a file that starts so, as Pillow tells formats; None for none that is known."""
    Image.init()
    for name in FORMATS:
        accept = Image.OPEN[name][1] if name in Image.OPEN else None
        if start and accept is not None and accept(start[:SNIFFED]) is True:
            return EXTENSIONS[name]
    return None


def check_pixels(width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """Raises BadSampleError `decompression_bomb` for a picture of more than `limit` pixels."""
    if width * height > limit:
        raise BadSampleError("decompression_bomb", f"{width}x{height} pixels, at most {limit} are decoded")


@contextmanager
def opened(data: bytes, limit: int = MAX_PIXELS) -> Iterator[Any]:
    """The picture as Pillow opens it, nothing decoded yet, of at most `limit` pixels.

    Whatever Pillow raises within the block becomes a BadSampleError: `undecodable` or `decompression_bomb`.
    """
    try:
        with _pillow_takes(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, which say nothing about the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_pixels(*image.size, limit)
                yield image
    except (BadSampleError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError("decompression_bomb", str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds a memory address
        raise BadSampleError("undecodable", "no known image format") from error
    except Exception as error:  # Pillow's format plug-ins raise whatever their parser meets in damaged bytes
        detail = _ADDRESS.sub("", str(error))
        raise BadSampleError("undecodable", f"{type(error).__name__}: {detail}") from error


@contextmanager
def _raised_limit(limit: int) -> Iterator[None]:
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _pillow_takes(limit: int) -> Any:
    """Pillow's own limit is a global: it is raised only for a larger picture that packing is to shrink."""
    return _raised_limit(limit) if limit > MAX_PIXELS else nullcontext()


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an open picture: how it still has to be turned, by the rule of Pillow's
    `ImageOps.exif_transpose` (EXIF first, then XMP). Damaged metadata say nothing: 1. TIFF turns as it is loaded."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in UPRIGHT else 1
    except Exception:  # Pillow raises of many kinds on damaged metadata
        return 1


def jpeg_orientation(data: bytes) -> int:
    """The same of a JPEG. One without such metadata is not opened."""
    head = data[: _first_scan(data)]
    if not any(mark in head for mark in _TELLS_ORIENTATION):
        return 1
    try:
        with opened(data) as image:
            return orientation(image)
    except BadSampleError:  # the pixels are judged elsewhere
        return 1


def _first_scan(data: bytes) -> int:
    """Where the pixels of a JPEG begin; metadata stand before. All of it, where its segments do not follow each other:
    searching a whole picture takes a twentieth of the time of decoding it."""
    at, last = 2, len(data) - 4
    while at <= last and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return at
        at += 2 + max(2, data[at + 2] << 8 | data[at + 3])
    return len(data)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Stored width and height by the header; None where the bytes are no JPEG or libjpeg does not take their header."""
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    return width, height


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as Pillow's `convert` and so open_clip and most loaders make it: alpha is dropped, palettes are looked
    up. But 16 bits of grey are scaled to 8, where `convert` clips them.

    Raises BadSampleError `undecodable` for floating-point pixels; ValueError for a mode without a way to RGB.
    """
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise BadSampleError("undecodable", "floating-point pixels have no agreed range")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies in any case


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values 0..65535 scaled to 0..255: Pillow's own conversion would clip them."""
    return Image.fromarray(((grey16(image).astype(np.int64) + 128) // 257).astype(np.uint8)).convert("RGB")


def grey16(image: Image.Image) -> np.ndarray:
    """Grey values of any integer mode, uint16 [h, w]; what lies outside 0..65535 is clipped."""
    return np.clip(np.asarray(image).astype(np.int64), 0, 65535).astype(np.uint16)
