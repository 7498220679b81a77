"""Is this file an image a trainer can read? The bytes to store, upright, and the error class if not."""

import io
import re
from dataclasses import dataclass

import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

# Formats that Pillow decodes by itself (EPS, for one, would start another program) -> extension in the shard.
_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
_FORMATS = tuple(name for name in _EXTENSIONS if name != "MPO")  # opened as JPEG, then found to hold several
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
JPEG_QUALITY = 95
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_MAGIC = b"\xff\xd8\xff"
_ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of an object, in Pillow's messages: it differs between runs
# libjpeg's warning about padding between segments: the picture is whole.
_HARMLESS = re.compile("extraneous bytes before marker")

Image.MAX_IMAGE_PIXELS = None  # `Limits.pixels` is checked here, before any pixel is decoded


class BadImageError(Exception):
    """An image that is not packed; `kind` is its error class."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """Largest picture in pixels, largest file in bytes, and the shortest side to shrink to (None: keep)."""

    pixels: int
    file_bytes: int
    resize: int | None = None


@dataclass(frozen=True)
class CheckedImage:
    """Bytes to store, their extension and size in pixels; `orientation` is the EXIF value applied, 1 for none."""

    data: bytes
    extension: str
    width: int
    height: int
    orientation: int = 1


def check_image(data: bytes, limits: Limits) -> CheckedImage:
    """Decode an image completely. Its bytes pass untouched unless EXIF turns it or a resize is asked.

    Raises BadImageError: undecodable, decompression_bomb or too_large.
    """
    if len(data) > limits.file_bytes:
        raise BadImageError("too_large", f"{len(data)} bytes, the limit is {limits.file_bytes}")
    if data.startswith(_JPEG_MAGIC):
        checked = _check_jpeg(data, limits)
        if checked:
            return checked
    return _check_with_pillow(data, limits)


def _check_jpeg(data: bytes, limits: Limits) -> CheckedImage | None:
    """The short way for a JPEG that is stored as it is; None when Pillow has to look at it."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg has no name for
        return None
    _check_pixels(width, height, limits)
    if _target((width, height), limits) or (b"Exif\0\0" in data and _orientation_of(data) != 1):
        return None
    try:
        # All entropy-coded data are decoded; the inverse transform, which cannot fail, runs at 1/8 and in grey.
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1)
    except ValueError as error:
        if _HARMLESS.search(str(error)):
            return None
        raise BadImageError("undecodable", str(error)) from None
    return CheckedImage(data, "jpg", width, height)


def _orientation_of(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _orientation(image)
    except Exception:  # Pillow raises of many kinds on damaged metadata; the pixels are judged elsewhere
        return 1


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise BadImageError("decompression_bomb", f"{width}x{height} pixels, the limit is {limits.pixels} pixels")


def _target(size: tuple[int, int], limits: Limits) -> tuple[int, int] | None:
    """The size to shrink to; None for an image that is small enough, or when no resize is asked."""
    shortest = limits.resize
    if shortest is None or min(size) <= shortest:
        return None
    width, height = (max(shortest, round(side * shortest / min(size))) for side in size)
    return width, height


def _check_with_pillow(data: bytes, limits: Limits) -> CheckedImage:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_pixels(*image.size, limits)
            image.verify()  # checksums of PNG chunks, which loading does not look at
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _store(image, data, limits)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("undecodable", "not an image of a known format") from None
    except Exception as error:  # damaged files make Pillow's decoders raise OSError, SyntaxError, struct.error and more
        detail = _ADDRESS.sub("", str(error))
        raise BadImageError("undecodable", f"{type(error).__name__}: {detail}") from None


def _store(image: ImageFile, data: bytes, limits: Limits) -> CheckedImage:
    extension, orientation = _EXTENSIONS[image.format or ""], _orientation(image)
    target = _target(image.size, limits)
    if target and extension == "jpg":
        image.draft(None, target)  # decodes at 1/2, 1/4 or 1/8, never below the target
    image.load()
    if orientation == 1 and not target:
        return CheckedImage(data, extension, *image.size)
    profile = image.info.get("icc_profile")
    stored: Image.Image = image
    if target:
        stored = _resizable(image).resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if orientation != 1:
        stored = stored.transpose(_UPRIGHT[orientation])
    extension, encoded = _encode(stored, extension, profile)
    return CheckedImage(encoded, extension, *stored.size, orientation)


def _resizable(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "PA", "1"):
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    return image


def _encode(image: Image.Image, extension: str, profile: bytes | None) -> tuple[str, bytes]:
    """JPEG stays JPEG; the others become PNG, without loss. Metadata go, the colour profile stays."""
    file = io.BytesIO()
    if extension == "jpg":
        image.save(file, "JPEG", quality=JPEG_QUALITY, icc_profile=profile)
        return "jpg", file.getvalue()
    image.save(file, "PNG", icc_profile=profile, exif=b"")
    return "png", file.getvalue()
