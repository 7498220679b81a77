"""The bytes to store for an image file: untouched, or upright and shrunk."""

import io
from dataclasses import dataclass

from PIL import Image
from PIL.ImageFile import ImageFile

from data_tools.media.bad import BadSampleError
from data_tools.media.check import check, load_whole, opened_sound
from data_tools.media.image import (
    EXTENSIONS,
    UPRIGHT,
    check_pixels,
    grey16,
    jpeg_orientation,
    jpeg_size,
    orientation,
    to_rgb,
)

JPEG_QUALITY = 95
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Limits:
    """Largest picture in pixels, largest file in bytes, and the shortest side to shrink to (None: keep)."""

    pixels: int
    file_bytes: int
    resize: int | None = None


@dataclass(frozen=True)
class CheckedImage:
    """Bytes to store, the extension of their format and size in pixels; `orientation` is the EXIF value applied, 1 for
    none."""

    data: bytes
    extension: str
    width: int
    height: int
    orientation: int = 1


def common_extension(formats: set[str], resize: int | None) -> str | None:
    """The one extension under which a corpus stores images of these formats; None where there are none.

    Readers expect one member name in all samples (Hugging Face `datasets` drops a second one without a word), know the
    usual ones, and go by the bytes: of several formats all are `jpg`. Turning or shrinking makes a PNG of all but JPEG.
    """
    if not formats:
        return None
    if len(formats) > 1 or "jpg" in formats:
        return "jpg"
    return "png" if resize else next(iter(formats))


def check_image(data: bytes, limits: Limits) -> CheckedImage:
    """Decode an image completely. Its bytes pass untouched unless EXIF turns it or a resize is asked.

    Raises BadSampleError: undecodable, decompression_bomb or too_large.
    """
    if len(data) > limits.file_bytes:
        raise BadSampleError("too_large", f"{len(data)} bytes, the limit is {limits.file_bytes}")
    stored = _untouched_jpeg(data, limits) or _with_pillow(data, limits)
    check_pixels(stored.width, stored.height)  # `limits` may admit a larger one that is to be shrunk
    return stored


def _untouched_jpeg(data: bytes, limits: Limits) -> CheckedImage | None:
    """The short way for a JPEG that is stored as it is; None for one that is turned or shrunk, and for no JPEG."""
    size = jpeg_size(data)
    if size is None:
        return None
    check_pixels(*size, limits.pixels)
    if _target(size, limits) or jpeg_orientation(data) != 1:
        return None
    facts = check(data, limits.pixels)
    return CheckedImage(data, facts.extension, facts.width, facts.height)


def _target(size: tuple[int, int], limits: Limits) -> tuple[int, int] | None:
    """The size to shrink to; None for an image that is small enough, or when no resize is asked."""
    shortest = limits.resize
    if shortest is None or min(size) <= shortest:
        return None
    width, height = (max(shortest, round(side * shortest / min(size))) for side in size)
    return width, height


def _with_pillow(data: bytes, limits: Limits) -> CheckedImage:
    with opened_sound(data, limits.pixels) as image:
        return _store(image, data, limits)


def _store(image: ImageFile, data: bytes, limits: Limits) -> CheckedImage:
    extension = EXTENSIONS[image.format or ""]
    target = _target(image.size, limits)
    is_jpeg = image.format in ("JPEG", "MPO")
    if target and is_jpeg:
        image.draft(None, target)  # decodes at 1/2, 1/4 or 1/8, never below the target
    turned = load_whole(image)
    if turned == 1 and not target:
        return CheckedImage(data, extension, *image.size)
    profile = image.info.get("icc_profile")
    stored: Image.Image = image
    if target:
        stored = _resizable(image).resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if (still := orientation(image)) != 1:  # loading has turned a TIFF
        stored = stored.transpose(UPRIGHT[still])
    extension, encoded = _encode(stored, is_jpeg, profile)
    return CheckedImage(encoded, extension, *stored.size, turned)


def _resizable(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "PA", "1"):
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    return image


def _encode(image: Image.Image, as_jpeg: bool, profile: bytes | None) -> tuple[str, bytes]:
    """JPEG stays JPEG; the others become PNG, without loss. Metadata go, the colour profile stays."""
    file = io.BytesIO()
    if as_jpeg:
        image.save(file, "JPEG", quality=JPEG_QUALITY, icc_profile=profile)
        return "jpg", file.getvalue()
    if image.mode.startswith("I"):
        image = Image.fromarray(grey16(image))
    elif image.mode not in _PNG_MODES:
        image, profile = to_rgb(image), None
    image.save(file, "PNG", icc_profile=profile, exif=b"")
    return "png", file.getvalue()
