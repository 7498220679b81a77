"""Scaled decoding of training crops: never enlarged, the same region, the same verdict on bad bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.media.bad import BadSampleError
from data_tools.media.decode import CHEAP_SCALES, WHOLE, decode_rgb, scaled_size
from data_tools.media.image import jpeg_size
from pretrain.config.reading import dump_config
from pretrain.config.tree import DataConfig, RunConfig, TrainConfig
from pretrain.process.runtime import Runtime
from pretrain.stream import transform
from pretrain.stream.draw import Draw
from pretrain.stream.sources import train_stream
from pretrain.stream.transform import ImageSettings, ImageTransform, random_crop_box, scale_box, sufficient_scale
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.contrastive import pair_fields
from pretrain.towers.spec import resolve_spec
from stream_corpora import write_corpus

KINDS = [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"}, {"restart_marker_blocks": 4}]


def blobs(width: int, height: int) -> Image.Image:
    """Colours that change over about an eighth of the picture, in every direction, like large shapes in a photo."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def outcome(pictures: ImageTransform, data: bytes, sample: int = 1) -> np.ndarray | tuple[str, str]:
    """Pixels, or the kind and reason of the bad sample."""
    try:
        return pictures.train(data, Draw(0, 0, sample))
    except BadSampleError as error:
        return error.kind, error.reason


@settings(max_examples=400, deadline=None)
@given(
    width=st.integers(1, 3000), height=st.integers(1, 3000), size=st.integers(1, 400),
    low=st.floats(0.01, 1.0), sample=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_a_scaled_crop_is_large_enough_and_a_larger_scale_would_be_waste(width, height, size, low, sample):
    box = random_crop_box(width, height, ImageSettings(size, crop_scale=(low, 1.0)), Draw(0, 0, sample))
    sides = box[2] - box[0], box[3] - box[1]
    eighths = sufficient_scale(box, size)
    left, top, right, bottom = scale_box(box, eighths)
    assert 0 <= left < right <= scaled_size(width, eighths)
    assert 0 <= top < bottom <= scaled_size(height, eighths)
    if eighths == WHOLE:
        assert (left, top, right, bottom) == box
        assert min(sides) < 2 * size
    else:
        assert min(right - left, bottom - top) >= size
        assert eighths == 1 or min(sides) * (eighths - 1) < size * WHOLE


def test_edges_between_two_pixels_round_alike():
    """To the nearest even, the box would lose a pixel: 12 / 8 to 2, and 20 / 8 too."""
    for left in range(16):
        for eighths in CHEAP_SCALES:
            start, _, stop, _ = scale_box((left, 0, left + 8, 8), eighths)
            assert stop - start == eighths


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_libjpeg_gives_the_scale_that_is_asked_for(kind):
    for width, height in ((200, 131), (67, 66), (9, 40)):
        data = jpeg(blobs(width, height), **kind)
        assert jpeg_size(data) == (width, height)
        for eighths in (*CHEAP_SCALES, WHOLE):
            pixels = decode_rgb(data, eighths)
            assert pixels.shape == (scaled_size(height, eighths), scaled_size(width, eighths), 3)


def test_a_subsampling_without_a_name_is_left_to_pillow():
    data = bytearray(jpeg(blobs(64, 48)))
    frame = data.index(b"\xff\xc0")
    data[frame + 11] = 0x14  # the first component's factors: 4:4:1, which cameras write
    assert jpeg_size(bytes(data)) is None
    assert decode_rgb(bytes(data), 4).shape == (48, 64, 3)


def test_other_pictures_come_at_their_own_size():
    buffer = io.BytesIO()
    blobs(60, 40).save(buffer, "PNG")
    assert jpeg_size(buffer.getvalue()) is None
    assert decode_rgb(buffer.getvalue(), 4).shape == (40, 60, 3)
    data = jpeg(blobs(60, 40))
    assert decode_rgb(data[:-2] + b"\x00\x00junk" + data[-2:], 4).shape == (40, 60, 3)  # untidy: Pillow reads it


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (97, 160), (40, 300)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.1, 1.0)])
def test_the_resize_never_enlarges_what_full_decoding_reduces(shape, scale, monkeypatch):
    resized = []
    resize = transform.F.interpolate
    monkeypatch.setattr(
        transform.F, "interpolate", lambda x, size, **k: resized.append(tuple(x.shape[2:])) or resize(x, size, **k)
    )
    data, size = jpeg(blobs(*shape)), 48
    ours = ImageSettings(size, crop_scale=scale)
    for sample in range(40):
        resized.clear()
        left, top, right, bottom = random_crop_box(*shape, ours, Draw(0, 0, sample))
        assert ImageTransform(ours).train(data, Draw(0, 0, sample)).shape == (size, size, 3)
        height, width = resized[0] if resized else (size, size)
        if min(height, width) < size:
            assert (height, width) == (bottom - top, right - left)  # all pixels that there are
        else:
            assert min(height, width) < 2 * size or (height, width) == (bottom - top, right - left)


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_the_crop_shows_the_same_region(kind):
    """The mean difference in grey levels is small, and smaller than to a crop displaced by one of its 64 columns."""
    data, bound = jpeg(blobs(500, 375), quality=90, **kind), 2.5
    for scale in ((0.9, 1.0), (0.3, 1.0)):
        scaled = ImageTransform(ImageSettings(64, crop_scale=scale))
        exact = ImageTransform(ImageSettings(64, crop_scale=scale, scaled_decode=False))
        for sample in range(12):
            ours, theirs = (pictures.train(data, Draw(2, 1, sample)).astype(int) for pictures in (scaled, exact))
            assert not np.array_equal(ours, theirs)
            assert np.abs(ours - theirs).mean() < bound
            assert np.abs(ours[:, 1:] - theirs[:, :-1]).mean() > 1.5 * np.abs(ours - theirs).mean()
            assert np.abs(ours[:, :-1] - theirs[:, 1:]).mean() > 1.5 * np.abs(ours - theirs).mean()


@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_the_exact_mode_is_full_decoding(kind):
    data = jpeg(blobs(300, 200), **kind)
    exact = ImageSettings(32, crop_scale=(0.3, 0.9), scaled_decode=False)
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)[None]
    for sample in range(4):
        left, top, right, bottom = random_crop_box(300, 200, exact, Draw(0, 0, sample))
        crop = whole[:, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
        expected = torch.nn.functional.interpolate(crop, (32, 32), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        assert np.array_equal(ImageTransform(exact).train(data, Draw(0, 0, sample)), expected.numpy())


def test_a_scaled_crop_is_repeatable():
    data = jpeg(blobs(300, 200))
    first, second = (ImageTransform(ImageSettings(32)).train(data, Draw(3, 1, 7)) for _ in range(2))
    assert np.array_equal(first, second)


def test_evaluation_is_always_exact():
    data, lossless = jpeg(blobs(300, 200)), io.BytesIO()
    Image.open(io.BytesIO(data)).save(lossless, "PNG")
    pictures = ImageTransform(ImageSettings(32))
    assert np.array_equal(pictures.evaluate(data), pictures.evaluate(lossless.getvalue()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damage_is_judged_as_by_full_decoding(kind):
    data, random = jpeg(blobs(120, 90), **kind), np.random.default_rng(1)
    damaged = [data[:length] for length in range(0, len(data), len(data) // 40)] + [data[:-2], data[:-30] + data[-2:]]
    for _ in range(60):
        changed = bytearray(data)
        for place in random.integers(0, len(data), 2):
            changed[place] = random.integers(0, 256)
        damaged.append(bytes(changed))
    scaled, exact = (ImageTransform(ImageSettings(16, scaled_decode=flag)) for flag in (True, False))
    assert not isinstance(outcome(scaled, data), tuple)
    bad = 0
    for version in damaged:
        ours, theirs = outcome(scaled, version), outcome(exact, version)
        assert isinstance(ours, tuple) == isinstance(theirs, tuple)
        if isinstance(theirs, tuple):
            bad += 1
            assert ours == theirs
    assert bad > 30


@pytest.mark.parametrize("flag", [True, False])
def test_the_setting_reaches_the_stream_and_the_resolved_config(flag, tmp_path):
    corpus = write_corpus(tmp_path, [8])
    data, run = DataConfig(scaled_decode=flag), RunConfig(dir=str(tmp_path))
    config = ContrastiveConfig(run=run, data=data, train=TrainConfig(global_batch=4))
    alone = Runtime(0, 1, 0, torch.device("cpu"), 1)
    with train_stream(config, corpus, pair_fields(config, resolve_spec("ViT-B-32")), alone) as stream:
        ((fields,),) = stream._build.fields
        assert fields["image"].settings.scaled_decode == flag
    assert f"scaled_decode: {str(flag).lower()}" in dump_config(config)
    assert DataConfig().scaled_decode


def test_photos_differ_little_from_full_decoding(shared_data):
    """Photos are sharper than shapes, so half a pixel shows; means over a photo, in grey levels."""
    files = sorted(Path(shared_data / "photos_original" / "images").glob("*.jpg"))[:40]
    scaled, exact = (ImageTransform(ImageSettings(112, scaled_decode=flag)) for flag in (True, False))
    gaps = []
    for sample, file in enumerate(files):
        ours, theirs = (
            pictures.train(file.read_bytes(), Draw(0, 0, sample)).astype(int) for pictures in (scaled, exact)
        )
        gaps.append(np.abs(ours - theirs).mean())
    assert max(gaps) > 0
    assert np.mean(gaps) < 5
    assert max(gaps) < 15
