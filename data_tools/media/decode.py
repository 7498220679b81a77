"""Image bytes -> upright 8-bit RGB pixels, of JPEGs at a fraction of their size where that is enough."""

from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from data_tools.media import MAX_PIXELS
from data_tools.media.image import (
    check_pixels,
    jpeg_orientation,
    jpeg_size,
    opened,
    orientation,
    to_rgb,
)

WHOLE = 8  # eighths
CHEAP_SCALES = (1, 2, 3, 4)  # eighths; libjpeg-turbo's 5/8 to 7/8 lack vector code and take longer than 8/8

Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels


class Stored(NamedTuple):
    """Pixels as they are stored, uint8 [height, width, 3], and the EXIF orientation by which they are to be turned."""

    pixels: np.ndarray
    orientation: int


def decode_rgb(data: bytes, eighths: int = WHOLE) -> np.ndarray:
    """Decode to RGB, uint8 [height, width, 3], upright. Alpha is dropped, 16 bits are scaled to 8, animations give
    frame one.

    Args:
        eighths: scale at which a JPEG is decoded, see `scaled_size`; what libjpeg refuses or warns of, and every other
            format, comes at its own size. Which bytes are bad does not depend on it: all of the stream is read.

    Raises:
        BadSampleError: `undecodable`, or `decompression_bomb` above `MAX_PIXELS`, judged by the header alone.
    """
    return turn(*decode_stored(data, eighths))


def decode_stored(data: bytes, eighths: int = WHOLE) -> Stored:
    """The same before it is turned upright, for those who cut a part out first."""
    pixels = decode_jpeg(data, eighths)
    if pixels is not None:
        return Stored(pixels, jpeg_orientation(data))
    return decode_with_pillow(data)


def scaled_size(length: int, eighths: int) -> int:
    """Pixels of a JPEG's side of `length` at that scale: libjpeg rounds up, the last pixel lies partly outside."""
    return -(-length * eighths // WHOLE)


def decode_jpeg(data: bytes, eighths: int) -> np.ndarray | None:
    """Pixels of a JPEG as they are stored; None where Pillow has to judge: of no JPEG, and of streams that libjpeg
    refuses or warns of (cut, or only untidy)."""
    size = jpeg_size(data)
    if size is None:
        return None
    width, height = size
    check_pixels(width, height, MAX_PIXELS)
    try:
        # simplejpeg takes the smallest of libjpeg's eighths that reaches both sides
        least = {"min_height": scaled_size(height, eighths), "min_width": scaled_size(width, eighths)}
        return simplejpeg.decode_jpeg(data, colorspace="RGB", **least)
    except ValueError:
        return None


def decode_with_pillow(data: bytes) -> Stored:
    """Pixels and orientation of whatever `decode_jpeg` does not take."""
    with opened(data) as image:
        image.load()
        return Stored(np.array(to_rgb(image)), orientation(image))


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [h, w, 3] upright, by EXIF orientation; contiguous. Those of orientation 1 are returned as they are."""
    if orientation == 1:
        return pixels
    mirrored, flipped, swapped = _STEPS[orientation]
    pixels = pixels[::-1] if flipped else pixels
    pixels = pixels[:, ::-1] if mirrored else pixels
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if swapped else pixels)


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height after turning."""
    return (height, width) if _STEPS[orientation][2] else (width, height)


def stored_box(box: Box, width: int, height: int, orientation: int) -> Box:
    """Where a box of the upright picture lies in the stored one, which has that width and height."""
    if orientation == 1:
        return box
    mirrored, flipped, swapped = _STEPS[orientation]
    left, top, right, bottom = box
    if swapped:
        left, top, right, bottom = top, left, bottom, right
    if mirrored:
        left, right = width - right, width - left
    if flipped:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


# EXIF orientation -> (mirror left and right, mirror top and bottom, then swap rows and columns)
_STEPS = {
    1: (False, False, False),
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}


def thumbnail(data: bytes, side: int) -> Image.Image:
    """The picture upright in RGB, shrunk to fit a square of `side` pixels; smaller ones keep their size.

    Raises BadSampleError as `decode_rgb` does.
    """
    size, eighths = jpeg_size(data), WHOLE
    if size is not None:  # twice the side is left, so that the last reduction is a smooth one
        enough = (scale for scale in CHEAP_SCALES if min(size) * scale >= 2 * side * WHOLE)
        eighths = next(enough, WHOLE)
    image = Image.fromarray(decode_rgb(data, eighths))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return image
