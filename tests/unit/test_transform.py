"""Decoding and resizing of every kind of picture that corpora hold."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

from data_tools.errors import UsageError
from data_tools.media.bad import BadSampleError
from data_tools.media.decode import decode_rgb
from pretrain.stream import transform
from pretrain.stream.draw import Draw
from pretrain.stream.transform import ImageSettings, ImageTransform, random_crop_box


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def textured(width: int, height: int) -> Image.Image:
    """A picture with edges and gradients, so that resampling errors show."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), ((x // 7 + y // 5) % 2) * 255], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_jpeg_equals_pillow():
    data = encode(textured(70, 50), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_rgb(data), expected)


def test_grey_jpeg_has_three_equal_channels():
    pixels = decode_rgb(encode(textured(40, 30).convert("L"), "JPEG"))
    assert pixels.shape == (30, 40, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("colour", [(250, 10, 20), (10, 240, 30), (240, 240, 240)])
def test_cmyk_jpeg_keeps_its_colours(colour):
    data = encode(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_rgb(data).astype(int) - np.array(colour)).max() <= 6


def _awkward() -> dict[str, bytes]:
    """Pictures of 8 bits in every mode that Pillow writes, noisy in every channel."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 31, 4), dtype=np.uint8))
    rgb = noise.convert("RGB")
    return {
        "RGBA": encode(noise),
        "LA": encode(noise.convert("LA")),
        "L": encode(rgb.convert("L")),
        "1": encode(rgb.convert("1")),
        "P": encode(rgb.quantize(50)),
        "P, a colour transparent": encode(rgb.quantize(50), transparency=7),
        "P, colours half transparent": encode(rgb.quantize(50), transparency=bytes(range(0, 250, 5))),
        "RGB, a colour transparent": encode(rgb, transparency=rgb.getpixel((3, 3))),
        "L, a grey transparent": encode(rgb.convert("L"), transparency=9),
        "GIF": encode(rgb.quantize(50), "GIF", transparency=7),
        "WEBP with alpha": encode(noise, "WEBP", lossless=True, exact=True),
        "TIFF, CMYK": encode(rgb.convert("CMYK"), "TIFF"),
    }


@pytest.mark.parametrize("kind", _awkward())
def test_eight_bits_are_what_pillow_converts_them_to(kind):
    """As open_clip, wds' `pilrgb` and most loaders read pictures: alpha is dropped, palettes are looked up."""
    data = _awkward()[kind]
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_rgb(data), wanted)


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.array([[0, 257 * 50, 257 * 128, 65535]], dtype=np.uint16)
    assert decode_rgb(encode(Image.fromarray(ramp)))[0, :, 1].tolist() == [0, 50, 128, 255]


def test_one_bit_picture():
    assert decode_rgb(encode(Image.new("1", (2, 2), 1))).min() == 255


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_cut_picture_is_undecodable(format):
    data = encode(textured(200, 200), format)
    with pytest.raises(BadSampleError) as caught:
        decode_rgb(data[: len(data) // 2])
    assert caught.value.kind == "undecodable"


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8\xff"])
def test_other_bytes_are_undecodable(data):
    with pytest.raises(BadSampleError) as caught:
        decode_rgb(data)
    assert caught.value.kind == "undecodable"


def test_jpeg_with_untidy_bytes_is_still_read():
    data = encode(textured(64, 64), "JPEG", quality=80)
    pixels = decode_rgb(data[:-2] + b"\x00\x00\x00junk" + data[-2:])
    assert np.array_equal(pixels, decode_rgb(data))


def claiming(format: str, side: int) -> bytes:
    """A small picture whose header says that it is `side` pixels wide and high."""
    data = bytearray(encode(Image.new("L", (30, 30)), format))
    at = data.index(b"\xff\xc0") + 5 if format == "JPEG" else data.index(b"IHDR") + 4
    kind = ">HH" if format == "JPEG" else ">II"
    struct.pack_into(kind, data, at, side, side)
    if format == "PNG":
        struct.pack_into(">I", data, at + 13, zlib.crc32(data[at - 4 : at + 13]))
    return bytes(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_decompression_bomb_is_refused_by_its_header(format):
    data = claiming(format, 20_000)
    with pytest.raises(BadSampleError) as caught:
        decode_rgb(data)
    assert caught.value.kind == "decompression_bomb"


def test_pillows_own_bomb_guard_counts_as_well(monkeypatch):
    data = encode(Image.new("L", (300, 300)))
    for limit in (80_000, 40_000):  # Pillow warns, then raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadSampleError) as caught:
            decode_rgb(data)
        assert caught.value.kind == "decompression_bomb"


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (224, 224), (224, 300), (97, 61), (1000, 225), (60, 1)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_evaluation_equals_open_clip(shape, interpolation, resize_mode):
    from open_clip.transform import image_transform

    size = 224
    image = textured(*shape)
    pipeline = image_transform(size, is_train=False, interpolation=interpolation, resize_mode=resize_mode)
    expected = image
    for step in pipeline.transforms[:-2]:  # the last two make a tensor and normalise it
        expected = step(expected)
    ours = ImageTransform(ImageSettings(size, interpolation=interpolation, resize_mode=resize_mode)).evaluate(
        encode(image)
    )
    assert ours.shape == (size, size, 3)
    assert np.abs(ours.astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("scale", [(0.05, 0.08), (0.2, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_crop_equals_pillows(scale, interpolation):
    image = textured(320, 240)
    settings = ImageSettings(64, crop_scale=scale, interpolation=interpolation)
    for sample in range(8):
        crop = image.crop(random_crop_box(320, 240, settings, Draw(3, 1, sample)))
        resample = Image.Resampling[interpolation.upper()]
        # the passes one by one, because newer versions of Pillow choose their order, which moves clipped grey levels
        expected = np.asarray(crop.resize((64, crop.height), resample).resize((64, 64), resample)).astype(int)
        ours = ImageTransform(settings).train(encode(image), Draw(3, 1, sample)).astype(int)
        assert np.abs(ours - expected).max() <= 1


def test_real_photos_equal_open_clip(shared_data):
    from open_clip.transform import image_transform

    files = sorted((shared_data / "photos_original" / "images").glob("*.jpg"))[:12]
    assert len(files) == 12
    resize, crop, *_ = image_transform(96, is_train=False).transforms
    for file in files:
        data = file.read_bytes()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        assert np.array_equal(decode_rgb(data), np.asarray(image))
        ours = ImageTransform(ImageSettings(96)).evaluate(data).astype(int)
        assert np.abs(ours - np.asarray(crop(resize(image))).astype(int)).max() <= 1


def test_crops_stay_inside_and_in_range():
    settings = ImageSettings(32, crop_scale=(0.3, 0.9))
    for sample in range(2000):
        left, top, right, bottom = random_crop_box(120, 90, settings, Draw(0, 0, sample))
        w, h = right - left, bottom - top
        assert 0 <= left < right <= 120
        assert 0 <= top < bottom <= 90
        assert 0.28 <= w * h / (120 * 90) <= 0.92
        assert 0.72 <= w / h <= 1.4


def test_crops_are_spread_like_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    settings = ImageSettings(32, crop_scale=(0.3, 0.9))
    torch.manual_seed(0)
    image = Image.new("L", (120, 90))
    theirs = [RandomResizedCrop.get_params(image, [0.3, 0.9], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in theirs])
    ours = np.array([random_crop_box(120, 90, settings, Draw(0, 0, sample)) for sample in range(4000)])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 1.5
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 1.5


def test_crop_depends_on_seed_epoch_and_sample_only():
    settings = ImageSettings(32, crop_scale=(0.3, 0.9))
    boxes = {random_crop_box(120, 90, settings, Draw(*key)) for key in [(0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 2)]}
    assert len(boxes) == 4
    assert random_crop_box(120, 90, settings, Draw(0, 0, 1)) == random_crop_box(120, 90, settings, Draw(0, 0, 1))


def test_crop_is_frozen():
    settings = ImageSettings(224)
    boxes = [random_crop_box(500, 375, settings, Draw(7, 2, sample)) for sample in (1, 2**64 - 1)]
    assert boxes == [(36, 7, 499, 372), (1, 0, 469, 370)]


@pytest.mark.parametrize("shape", [(300, 1), (1, 300), (1, 1)])
def test_one_pixel_high_picture(shape):
    pictures = ImageTransform(ImageSettings(16))
    data = encode(textured(*shape))
    assert pictures.train(data, Draw(0, 0, 5)).shape == (16, 16, 3)
    assert pictures.evaluate(data).shape == (16, 16, 3)


def test_whole_crop_of_a_fitting_picture_is_not_resampled(monkeypatch):
    image = textured(32, 32)
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: pytest.fail("resampled"))
    monkeypatch.setattr(transform.F, "interpolate", lambda *a, **k: pytest.fail("resampled"))
    pictures = ImageTransform(ImageSettings(32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)))
    assert np.array_equal(pictures.train(encode(image), Draw(0, 0, 1)), np.asarray(image))
    assert np.array_equal(pictures.evaluate(encode(image)), np.asarray(image))
    monkeypatch.undo()
    assert pictures.train(encode(textured(33, 33)), Draw(0, 0, 1)).shape == (32, 32, 3)


def test_training_pixels_are_frozen():
    """Also across processors: integer arithmetic, with or without vector instructions."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 97, 3)).astype(np.uint8)
    settings = ImageSettings(48, crop_scale=(0.2, 0.9))
    pixels = [
        ImageTransform(settings).train(encode(Image.fromarray(noise)), Draw(1, 2, sample)) for sample in range(20)
    ]
    assert xxhash.xxh3_64_hexdigest(np.ascontiguousarray(pixels)) == "7ea92ff609b4a229"


def test_a_strip_is_evaluated_without_resizing_all_of_it(monkeypatch):
    image = textured(30_000, 2)
    usual = ImageTransform(ImageSettings(16)).evaluate(encode(image))
    monkeypatch.setattr(transform, "MAX_PIXELS", 16 * 1000)
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k)
    )
    strip = ImageTransform(ImageSettings(16)).evaluate(encode(image))
    assert sizes == [(16, 16)]
    assert np.abs(strip.astype(int) - usual.astype(int)).max() <= 16


@pytest.mark.parametrize(
    ("change", "word"),
    [({"size": 0}, "size"), ({"crop_scale": (0.0, 1.0)}, "crop_scale"), ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
     ({"interpolation": "nearest"}, "interpolation"), ({"resize_mode": "longest"}, "resize_mode")],
)  # fmt: skip
def test_settings_are_checked(change, word):
    with pytest.raises(UsageError, match=word):
        ImageSettings(**{"size": 8, **change})
