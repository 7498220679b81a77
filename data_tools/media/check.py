"""Is this an image that training can use, whole? The one judge of packing and of verifying.

What it passes, decoding passes. It is stricter than decoding in one way: it also refuses damage that decoders pass over
with a wrong picture (checksums of PNG chunks, what libjpeg warns of).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import simplejpeg
from PIL import Image

from data_tools.media import MAX_PIXELS
from data_tools.media.bad import BadSampleError
from data_tools.media.image import (
    EXTENSIONS,
    JPEG_START,
    check_pixels,
    jpeg_orientation,
    jpeg_size,
    opened,
    orientation,
    to_rgb,
)

# libjpeg's warning about padding between segments: the picture is whole.
_HARMLESS = re.compile("extraneous bytes before marker")


class Facts(NamedTuple):
    """Of an image that decodes: extension for its format, size in pixels as Pillow gives it, EXIF orientation."""

    extension: str
    width: int
    height: int
    orientation: int


def check(data: bytes, limit: int = MAX_PIXELS) -> Facts:
    """Decode an image completely.

    Raises BadSampleError: `undecodable`, or `decompression_bomb` above `limit` pixels, judged by the header alone.
    """
    if data.startswith(JPEG_START):
        facts = _check_jpeg(data, limit)
        if facts:
            return facts
    with opened_sound(data, limit) as image:
        turned = load_whole(image)
        width, height = image.size
        return Facts(EXTENSIONS[image.format], width, height, turned)


@contextmanager
def opened_sound(data: bytes, limit: int) -> Iterator[Any]:
    """`opened`, after a look at the checksums of PNG chunks, which loading passes over."""
    with opened(data, limit) as image:
        image.verify()
    with opened(data, limit) as image:
        yield image


def load_whole(image: Image.Image) -> int:
    """Decode an open picture, which must be of a kind that has a way to RGB; returns its EXIF orientation."""
    turned = orientation(image)  # before loading, by which a TIFF is turned
    image.load()
    to_rgb(image.crop((0, 0, 1, 1)))
    return turned


def _check_jpeg(data: bytes, limit: int) -> Facts | None:
    """The short way; None where Pillow has to look at it."""
    size = jpeg_size(data)
    if size is None:
        return None
    check_pixels(*size, limit)
    try:
        # All entropy-coded data are decoded; the inverse transform, which cannot fail, runs at 1/8 and in grey.
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError as error:
        if _HARMLESS.search(str(error)):
            return None
        raise BadSampleError("undecodable", str(error)) from None
    return Facts("jpg", *size, jpeg_orientation(data))
