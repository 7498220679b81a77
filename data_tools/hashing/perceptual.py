"""A 64-bit hash of what a picture looks like: alike pictures differ in few bits.

It is the sign of the 64 lowest frequencies of the discrete cosine transform of the picture in grey, 32 by 32 (pHash,
Zauner 2010), with three changes. Signs in place of a comparison with the median make the mirrored picture's hash
`hash ^ MIRROR` to the bit, because mirroring turns the sign of every odd horizontal frequency. Uniform borders are cut
off first. And all is computed in integers, so that a picture has one hash on every processor, given the pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_tools.media.decode import CHEAP_SCALES, WHOLE, decode_rgb
from data_tools.media.image import jpeg_size

_SIDE, _LOWEST = 32, 9  # pixels; frequencies of each direction that are looked at
_LOOKED_AT = 256  # pixels of the longer side, at which borders are sought
_SHADE, _ODD = 4, 0.03  # of 256 shades, and of a row's pixels that may be off: what is of one colour
_BLURRED, _BLURRED_ODD, _BLURRED_ROWS = 12, 0.1, 6  # the same of the rows between it and the picture, after compression
_LEAST = 16  # pixels of a side, which cutting leaves
_PASSES = 8  # a border around a border


def _frequencies() -> list[tuple[int, int]]:
    """(vertical, horizontal) of each bit, from the lowest; without the mean, which says nothing of the form."""
    every = [(v, u) for v in range(_LOWEST) for u in range(_LOWEST) if v or u]
    return sorted(every, key=lambda pair: (sum(pair), pair))[:64]


_VERTICAL, _HORIZONTAL = np.array(_frequencies()).T
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)
MIRROR = int(_BITS[_HORIZONTAL % 2 == 1].sum())  # the bits that mirroring turns
_ANGLES = np.pi * np.outer(np.arange(_LOWEST), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
_COSINES = np.rint(4096 * np.cos(_ANGLES)).astype(np.int64)  # [frequencies, pixels]


def perceptual_hash(data: bytes) -> int | None:
    """The hash of an encoded picture; None of one that is all of one colour, and looks like every other such.

    Raises BadSampleError as `decode_rgb` does.
    """
    size, eighths = jpeg_size(data), WHOLE
    if size is not None:
        eighths = next((scale for scale in CHEAP_SCALES if max(size) * scale >= _LOOKED_AT * WHOLE), WHOLE)
    return hash_of_pixels(decode_rgb(data, eighths))


def hash_of_pixels(pixels: np.ndarray) -> int | None:
    """The same of uint8 [height, width, 3]."""
    image = Image.fromarray(pixels).convert("L")
    longer = max(image.size)
    if longer > _LOOKED_AT:
        width, height = (max(1, round(length * _LOOKED_AT / longer)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    grey = without_borders(np.asarray(image))
    if int(grey.max()) - int(grey.min()) <= _BLURRED:
        return None
    small = Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    spectrum = _COSINES @ np.asarray(small, np.int64) @ _COSINES.T
    return int(_BITS[spectrum[_VERTICAL, _HORIZONTAL] > 0].sum())


def without_borders(grey: np.ndarray) -> np.ndarray:
    """`grey`, uint8 [height, width], without the rows and columns at its edges that are of one shade.

    It is repeated until nothing changes: with a frame in front of it, a sky is cut off as it is without one.
    """
    left = grey
    for _ in range(_PASSES):
        before = left.shape
        for _ in range(4):  # the upper edge, and turned a quarter, so that after four it stands as it was
            uniform = _uniform_rows(left)
            if uniform == len(left):
                return grey
            left = np.rot90(left[uniform:])
        if left.shape == before:
            break
    return np.ascontiguousarray(left) if min(left.shape) >= _LEAST else grey


def _uniform_rows(grey: np.ndarray) -> int:
    """How many rows from the upper edge on are of its shade, and of what compression has made of it."""
    off = np.abs(grey.astype(np.int16) - int(np.median(grey[0])))
    rows = _leading(np.count_nonzero(off > _SHADE, axis=1) <= _ODD * grey.shape[1])
    if rows:
        blurred = off[rows : rows + _BLURRED_ROWS] > _BLURRED
        rows += _leading(np.count_nonzero(blurred, axis=1) <= _BLURRED_ODD * grey.shape[1])
    return rows


def _leading(true: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return len(true) if true.all() else int(np.argmin(true))
