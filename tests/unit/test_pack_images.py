"""Which images are packed, under which extension, with which bytes; and the error class of those that are not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools.media.bad import BadSampleError
from data_tools.media.decode import decode_rgb
from data_tools.pack.image import Limits, check_image
from packing import ORIENTATION, encoded, jpeg, picture

LIMITS = Limits(pixels=10_000, file_bytes=200_000)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (jpeg(1), "jpg"),
        (jpeg(1, progressive=True), "jpg"),
        (encoded(picture(1, mode="L")), "jpg"),
        (encoded(picture(1, mode="CMYK")), "jpg"),
        (encoded(picture(1), "PNG"), "png"),
        (encoded(picture(1, mode="RGBA"), "PNG"), "png"),
        (encoded(picture(1).quantize(16), "PNG", transparency=3), "png"),
        (encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "PNG"), "png"),
        (encoded(picture(1), "PNG", save_all=True, append_images=[picture(2)]), "png"),
        (encoded(picture(1), "WEBP"), "webp"),
        (encoded(picture(1), "WEBP", save_all=True, append_images=[picture(2)]), "webp"),
        (encoded(picture(1), "GIF"), "gif"),
        (encoded(picture(1), "BMP"), "bmp"),
        (encoded(picture(1), "TIFF"), "tif"),
    ],
)
def test_bytes_pass_untouched(data, extension):
    checked = check_image(data, LIMITS)
    assert checked.data is data
    assert (checked.extension, checked.width, checked.height, checked.orientation) == (extension, 40, 30, 1)


def png_with_bad_pixels() -> bytes:
    """A PNG whose image data have a wrong checksum, which Pillow's loading alone does not notice."""
    data = bytearray(encoded(picture(), "PNG"))
    at = data.index(b"IDAT")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    data[at + 4 + length] ^= 0xFF
    return bytes(data)


def damaged_jpeg() -> bytes:
    data = bytearray(encoded(picture(3, 96, 96), "JPEG", quality=95))
    middle = data.index(b"\xff\xda") + 40
    data[middle : middle + 60] = bytes(range(60))
    return bytes(data)


def claims_to_be_huge() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "undecodable"),
        (b"just some text", "undecodable"),
        (b"\xff\xd8\xff just some text", "undecodable"),
        (jpeg()[:-200], "undecodable"),
        (jpeg(4)[:-2], "undecodable"),
        (damaged_jpeg(), "undecodable"),
        (png_with_bad_pixels(), "undecodable"),
        (encoded(picture(), "PNG")[:-40], "undecodable"),
        (encoded(picture(), "WEBP")[:-40], "undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        (claims_to_be_huge(), "decompression_bomb"),
        (encoded(picture(0, 101, 101)), "decompression_bomb"),
        (encoded(picture(0, 101, 101), "PNG"), "decompression_bomb"),
        (jpeg() + bytes(200_000), "too_large"),
    ],
)
def test_error_class(data, kind):
    with pytest.raises(BadSampleError) as caught:
        check_image(data, LIMITS)
    assert caught.value.kind == kind
    assert " at 0x" not in str(caught.value)  # addresses would make two runs differ


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xda", b"\xff\xd9"])
def test_harmless_padding_between_segments_is_accepted(marker):
    data = jpeg(5, progressive=True)
    at = data.rindex(marker)
    padded = data[:at] + b"\0\0\0" + data[at:]
    assert check_image(padded, LIMITS).data is padded


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_once(orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    source = encoded(
        picture(7), kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {"quality": 95})
    )
    checked = check_image(source, LIMITS)
    upright = ImageOps.exif_transpose(opened(source)).convert("RGB")
    stored = opened(checked.data)
    assert checked.orientation == orientation
    assert (checked.width, checked.height) == upright.size == stored.size
    assert checked.extension == {"JPEG": "jpg"}.get(kind, "png")
    assert stored.getexif().get(ORIENTATION, 1) == 1
    difference = np.abs(np.asarray(stored.convert("RGB"), int) - np.asarray(upright, int))
    assert difference.mean() <= (3 if kind == "JPEG" else 0)
    assert check_image(checked.data, LIMITS).data is checked.data


def test_exif_without_a_turn_passes_untouched():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = encoded(picture(), exif=exif.tobytes())
    assert check_image(data, LIMITS).data is data
    broken = data.replace(b"MM\0*", b"XXXX").replace(b"II*\0", b"XXXX")
    assert broken != data
    assert check_image(broken, LIMITS).data is broken


@pytest.mark.parametrize(
    ("image", "kind", "extension", "mode"),
    [
        (picture(1, 90, 60), "JPEG", "jpg", "RGB"),
        (picture(1, 90, 60, "L"), "JPEG", "jpg", "L"),
        (picture(1, 90, 60, "CMYK"), "JPEG", "jpg", "CMYK"),
        (picture(1, 90, 60, "RGBA"), "PNG", "png", "RGBA"),
        (picture(1, 90, 60).quantize(16), "PNG", "png", "RGB"),
        (picture(1, 90, 60), "WEBP", "png", "RGB"),
        (Image.fromarray(np.full((60, 90), 40_000, np.uint16)), "PNG", "png", "I;16"),
    ],
)
def test_resize_shrinks_the_shortest_side(image, kind, extension, mode):
    data = encoded(image, kind)
    checked = check_image(data, Limits(10_000, 200_000, resize=30))
    stored = opened(checked.data)
    assert (checked.width, checked.height) == stored.size == (45, 30)
    assert (checked.extension, stored.mode) == (extension, mode)
    reference = np.asarray(image.convert("RGB").resize((45, 30), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(stored.convert("RGB"), float) - reference).mean() < 6
    assert check_image(data, Limits(10_000, 200_000, resize=60)).data is data
    assert check_image(data, Limits(10_000, 200_000, resize=500)).data is data


def test_resize_and_turn_together():
    checked = check_image(jpeg(2, orientation=6), Limits(10_000, 200_000, resize=15))
    assert opened(checked.data).size == (checked.width, checked.height) == (15, 20)


def saved(image: Image.Image, kind: str, **options: object) -> bytes | None:
    try:
        return encoded(image, kind, **options)
    except (OSError, ValueError, KeyError):  # a kind of pixel that the format does not hold
        return None


GREY_16 = Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40))
WIDE = {mode: picture(1, mode=mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")}
WIDE |= {"I;16": GREY_16, "I": GREY_16.convert("I"), "PA": picture(1).convert("P").convert("PA")}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_no_picture_that_decodes_is_lost_by_turning_or_shrinking(kind):
    """Whatever kind of pixels the format holds."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    seen = 0
    for mode, image in WIDE.items():
        for data in (saved(image, kind), saved(image, kind, exif=exif)):
            if data is None:
                continue
            seen += 1
            whole = decode_rgb(data)
            for resize in (None, 10):
                checked = check_image(data, Limits(10_000, 200_000, resize))
                stored = decode_rgb(checked.data)
                assert stored.shape == (checked.height, checked.width, 3), mode
                assert (stored.shape[0] > stored.shape[1]) == (whole.shape[0] > whole.shape[1]), mode
                assert resize or np.abs(stored.astype(int) - whole).mean() < 3, mode
                assert resize is None or abs(stored.mean() - whole.mean()) < 6, mode
    assert seen
