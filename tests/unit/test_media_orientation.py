"""Which way is up: the eight orientations of every format against Pillow's own rule, in every way a picture is read."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from data_tools.media.decode import decode_rgb, stored_box, thumbnail, turn, upright_size
from data_tools.pack.image import Limits, check_image
from packing import ORIENTATION, encoded
from pretrain.stream.draw import Draw
from pretrain.stream.transform import ImageSettings, ImageTransform

SAVED_AS = {
    "JPEG": {"quality": 90},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    **({"AVIF": {"quality": 90}} if features.check("avif") else {}),
}
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def photo(width: int = 90, height: int = 60) -> Image.Image:
    """Different in every corner, smooth enough that a scaled decoding resembles it."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tagged(kind: str, orientation: int, image: Image.Image | None = None, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image or photo(), kind, exif=exif, **SAVED_AS[kind], **options)


def reference(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", SAVED_AS)
def test_decoding_turns_as_pillow_does(kind, orientation):
    data = tagged(kind, orientation)
    expected = reference(data)
    assert expected.shape[:2] == ((90, 60) if orientation >= 5 else (60, 90))
    assert np.array_equal(decode_rgb(data), expected)
    assert thumbnail(data, 30).size == ((20, 30) if orientation >= 5 else (30, 20))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_xmp_counts_where_exif_is_silent(kind, orientation):
    field = {"PNG": "pnginfo"}.get(kind, "xmp")
    value: object = XMP.format(orientation).encode()
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        value = PngInfo()
        value.add_itxt("XML:com.adobe.xmp", XMP.format(orientation))
    data = encoded(photo(), kind, **{field: value}, **SAVED_AS[kind])
    expected = reference(data)
    assert expected.shape[:2] == ((60, 90) if orientation == 1 else (90, 60))
    assert np.array_equal(decode_rgb(data), expected)
    assert check_image(data, Limits(10_000, 200_000)).orientation == orientation


def test_damaged_metadata_turn_nothing():
    data = tagged("JPEG", 6)
    broken = data.replace(b"MM\0*", b"XXXX").replace(b"II*\0", b"XXXX")
    assert broken != data
    assert decode_rgb(broken).shape == (60, 90, 3)
    absurd = tagged("JPEG", 9)
    assert np.array_equal(decode_rgb(absurd), reference(absurd))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_lies_in_the_same_place_of_the_stored_picture(orientation):
    stored = np.random.default_rng(0).integers(0, 256, (7, 11, 3)).astype(np.uint8)
    upright = turn(stored, orientation)
    assert upright.shape[:2][::-1] == upright_size(11, 7, orientation)
    left, top, right, bottom = box = 1, 2, 4, 6
    a, b, c, d = stored_box(box, 11, 7, orientation)
    assert np.array_equal(turn(stored[b:d, a:c], orientation), upright[top:bottom, left:right])


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_training_and_evaluation_see_the_upright_picture(kind, orientation):
    """The crop is drawn on the upright picture: equal to that of the same pixels stored upright, without loss."""
    data = tagged(kind, orientation, photo(400, 300))
    upright = encoded(Image.fromarray(reference(data)), "PPM")
    whole = ImageTransform(ImageSettings(32, crop_scale=(0.2, 0.8), scaled_decode=False, flip=0.5))
    assert np.array_equal(whole.evaluate(data), whole.evaluate(upright))
    for sample in range(5):
        assert np.array_equal(whole.train(data, Draw(0, 0, sample)), whole.train(upright, Draw(0, 0, sample)))


def change_by_scaling(data: bytes) -> float:
    """Mean difference between crops of the scaled and of the whole picture; a wrong region differs far more."""
    upright = encoded(Image.fromarray(reference(data)), "PPM")
    scaled = ImageTransform(ImageSettings(32, crop_scale=(0.3, 1.0)))
    crops = [
        [scaled.train(bytes_, Draw(0, 0, sample)).astype(int) for sample in range(8)] for bytes_ in (data, upright)
    ]
    assert np.abs(crops[0][0] - crops[1][0][:, ::-1]).mean() > 15  # the measure tells pictures apart
    return float(np.abs(np.array(crops[0]) - np.array(crops[1])).mean())


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("shape", [(401, 300), (333, 517)])
def test_scaled_decoding_sees_the_same_region(orientation, shape):
    """No further off than in the same picture stored upright."""
    data = tagged("JPEG", orientation, photo(*shape), subsampling=0)
    plain = tagged("JPEG", 1, Image.fromarray(reference(data)), subsampling=0)
    assert change_by_scaling(data) < 2 * change_by_scaling(plain) + 0.5 < 12


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("resize", [None, 30])
def test_packing_turns_a_tiff_once(orientation, resize):
    data = tagged("TIFF", orientation)
    checked = check_image(data, Limits(10_000, 200_000, resize))
    with Image.open(io.BytesIO(checked.data)) as stored:
        assert stored.size == (checked.width, checked.height)
        assert stored.getexif().get(ORIENTATION, 1) == 1
        pixels = np.asarray(stored)
    expected = Image.fromarray(reference(data))
    if resize:
        expected = expected.resize(stored.size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    assert checked.orientation == orientation
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= (3 if resize else 0)
