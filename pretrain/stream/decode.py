"""Image bytes -> 8-bit RGB. EXIF orientation is not looked at: packing applied it to the pixels."""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pretrain.stream.bad import BadSampleError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's own limit, above which it suspects a decompression bomb
_JPEG_START = b"\xff\xd8"
WHOLE = 8  # eighths
CHEAP_SCALES = (1, 2, 3, 4)  # eighths; libjpeg-turbo's 5/8 to 7/8 lack vector code and take longer than 8/8
_REFUSED = (ValueError, KeyError)  # KeyError: a subsampling that simplejpeg has no name for
_WHITE = (255, 255, 255, 255)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header; None where the bytes are no JPEG or libjpeg does not take their header."""
    if not data.startswith(_JPEG_START):
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except _REFUSED:
        return None
    return width, height


def decode_rgb(data: bytes, eighths: int = WHOLE) -> np.ndarray:
    """Decode to RGB, uint8 [height, width, 3]. Alpha lies on white, 16 bits are scaled to 8, animations give frame one.

    Args:
        eighths: scale at which a JPEG is decoded, see `scaled_size`; what libjpeg refuses or warns of, and every other
            format, comes at its own size. Which bytes are bad does not depend on it: all of the stream is read.

    Raises:
        BadSampleError: `undecodable`, or `too_large` above `MAX_PIXELS`, judged by the header alone.
    """
    if data.startswith(_JPEG_START):
        pixels = _decode_jpeg(data, eighths)
        if pixels is not None:
            return pixels
    return _decode_with_pillow(data)


def scaled_size(length: int, eighths: int) -> int:
    """Pixels of a JPEG's side of `length` at that scale: libjpeg rounds up, the last pixel lies partly outside."""
    return -(-length * eighths // WHOLE)


def _decode_jpeg(data: bytes, eighths: int) -> np.ndarray | None:
    """None where Pillow has to judge: streams that libjpeg refuses or warns of (cut, or only untidy)."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        # simplejpeg takes the smallest of libjpeg's eighths that reaches both sides
        least = {"min_height": scaled_size(height, eighths), "min_width": scaled_size(width, eighths)}
        return simplejpeg.decode_jpeg(data, colorspace="RGB", **least)
    except BadSampleError:
        raise
    except _REFUSED:
        return None


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size)
                return np.array(_to_rgb(image))
    except (BadSampleError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSampleError("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds a memory address
        raise BadSampleError("undecodable", "no known image format") from error
    except Exception as error:  # Pillow's format plug-ins raise whatever their parser meets in damaged bytes
        raise BadSampleError("undecodable", f"{type(error).__name__}: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSampleError("too_large", f"{width}x{height} pixels, at most {MAX_PIXELS} are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    if image.mode == "F":
        raise BadSampleError("undecodable", "floating-point pixels have no agreed range")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values 0..65535 scaled to 0..255: Pillow's own conversion would clip them."""
    grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
