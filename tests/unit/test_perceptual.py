"""The hash of what a picture looks like: near for copies, mirrored by one exclusive or, the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools.dedup.near import distance
from data_tools.hashing.perceptual import MIRROR, hash_of_pixels, perceptual_hash, without_borders
from data_tools.media.bad import BadSampleError
from launch.benchmark.copies import KINDS, distances
from packing import encoded, picture

PHOTOS, SHARE, RADIUS = 200, 0.98, 8


def noise(seed, height=64, width=64):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def off(first, second):
    return int(distance(np.array([first], np.uint64), np.array([second], np.uint64))[0])


def test_a_mirrored_picture_has_the_hash_with_the_mirror_s_bits_turned():
    for seed in range(20):
        pixels = noise(seed)
        assert hash_of_pixels(pixels[:, ::-1]) == hash_of_pixels(pixels) ^ MIRROR


def test_the_hash_is_that_of_its_definition():
    """Signs of the lowest frequencies of the cosine transform, in fp64, of a picture of the transform's own size."""
    grey = np.asarray(Image.fromarray(noise(3, 32, 32)).convert("L"), np.float64)
    angles = np.pi * np.outer(np.arange(9), 2 * np.arange(32) + 1) / 64
    spectrum = np.cos(angles) @ grey @ np.cos(angles).T
    lowest = sorted(((v, u) for v in range(9) for u in range(9) if v or u), key=lambda pair: (sum(pair), pair))[:64]
    wanted = sum(1 << bit for bit, place in enumerate(lowest) if spectrum[place] > 0)
    assert hash_of_pixels(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)) == wanted


def test_a_hash_stays_what_it_is():
    """Columns of years ago are compared with those of today."""
    row, column = np.indices((96, 128)) // 8
    grey = ((row * row * 37 + column * 91 + row * column * 13) % 256).astype(np.uint8)
    assert hash_of_pixels(np.repeat(grey[..., None], 3, axis=2)) == 3568795518502600778


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (30, 90, 200)])
def test_a_frame_is_cut_off(color):
    inner = picture(4, 120, 90)
    framed = ImageOps.expand(inner, (10, 20, 30, 5), fill=color)
    assert hash_of_pixels(np.asarray(framed)) == hash_of_pixels(np.asarray(inner))


def test_pictures_of_one_colour_have_no_hash():
    assert hash_of_pixels(np.full((50, 80, 3), 200, np.uint8)) is None
    assert perceptual_hash(encoded(Image.new("RGB", (40, 40), "red"))) is None


def test_what_would_leave_nothing_is_not_cut():
    """A line on paper: its rows are all of one colour, or few are left."""
    page = np.full((100, 100), 255, np.uint8)
    page[50:53] = 0
    assert without_borders(page).shape == page.shape


def test_large_and_tiny_pictures_have_a_hash():
    large = Image.fromarray(noise(5, 8, 8)).resize((3000, 1500), Image.Resampling.BICUBIC)
    assert off(perceptual_hash(encoded(large)), perceptual_hash(encoded(large.resize((300, 150))))) <= 2
    assert perceptual_hash(encoded(picture(2, 3, 2), "PNG")) is not None


def test_what_does_not_decode_is_refused():
    with pytest.raises(BadSampleError, match="undecodable"):
        perceptual_hash(b"no picture")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("cropped by 5 %", "text over it")])
def test_copies_of_photos_are_near(kind, photos):
    assert np.mean(distances(photos, KINDS[kind]) <= RADIUS) >= SHARE


def test_other_photos_are_far(photos):
    found = np.array([perceptual_hash(data) for data in photos], np.uint64)
    near = distance(found[:, None], found[None]) <= RADIUS
    assert np.count_nonzero(np.triu(near, 1)) == 0


@pytest.fixture(scope="module")
def photos(shared_data):
    return [path.read_bytes() for path in sorted((shared_data / "photos/images").glob("*.jpg"))[:PHOTOS]]
