"""Image bytes -> square uint8 picture: the random resized crop of training, open_clip's preprocessing of evaluation."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_tools.errors import UsageError
from data_tools.media import MAX_PIXELS
from data_tools.media.decode import (
    CHEAP_SCALES,
    WHOLE,
    Box,
    decode_jpeg,
    decode_rgb,
    decode_stored,
    decode_with_pillow,
    scaled_size,
    stored_box,
    turn,
    upright_size,
)
from data_tools.media.image import jpeg_orientation, jpeg_size
from pretrain.stream.augment import jitter_colors, mirror
from pretrain.stream.draw import Draw, Purpose

CROP_ATTEMPTS = 10
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "squash")


@dataclass(frozen=True)
class ImageSettings:
    """How images become pictures of `size` x `size` pixels.

    Args:
        crop_scale: range of the training crop's share of the image area.
        crop_ratio: range of the training crop's width / height.
        flip: share of the training pictures that are mirrored.
        color_jitter: how far from 1 the factors of training's brightness, contrast and saturation may lie.
        interpolation: bicubic or bilinear.
        resize_mode: evaluation resizes the shortest side and crops the centre (`shortest`), or bends the aspect
            (`squash`).
        scaled_decode: training decodes a JPEG no larger than its crop needs; false: always at full size.
    """

    size: int
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    color_jitter: float = 0.0
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    scaled_decode: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError("the image size is not positive", got=self.size)
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UsageError("crop_scale is no range of areas", got=self.crop_scale, expected="0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise UsageError("crop_ratio is no range of aspects", got=self.crop_ratio, expected="0 < low <= high")
        if self.interpolation not in _FILTERS:
            raise UsageError("unknown interpolation", got=self.interpolation, expected=" or ".join(_FILTERS))
        if self.resize_mode not in _RESIZE_MODES:
            raise UsageError("unknown resize_mode", got=self.resize_mode, expected=" or ".join(_RESIZE_MODES))


class ImageTransform:
    """Image bytes -> uint8 [size, size, 3]. Both ways raise BadSampleError for bytes that cannot be decoded."""

    def __init__(self, settings: ImageSettings):
        self.settings = settings

    def train(self, data: bytes, draw: Draw) -> np.ndarray:
        """The random resized crop, perhaps mirrored and recoloured: a function of the draw."""
        pixels = self._resized(self._random_crop(data, draw))
        pixels = mirror(pixels, self.settings.flip, draw)
        return jitter_colors(pixels, self.settings.color_jitter, draw)

    def _resized(self, crop: np.ndarray) -> np.ndarray:
        """The crop at `size`. One of the right size is not resampled.

        PyTorch's 8-bit kernel equals Pillow on the crop to within one grey level, is three to four times as fast, and
        gives the same bits with and without vector instructions.
        """
        size = (self.settings.size, self.settings.size)
        if crop.shape[:2] == size:
            return crop
        planes = torch.from_numpy(crop).permute(2, 0, 1)[None]  # [1, 3, h, w]
        resized = F.interpolate(planes, size, mode=self.settings.interpolation, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()

    def _random_crop(self, data: bytes, draw: Draw) -> np.ndarray:
        """The crop, drawn on the upright picture in full size, cut from it or from the smaller one that suffices."""
        size = jpeg_size(data) if self.settings.scaled_decode else None
        pixels: np.ndarray | None = None
        if size:
            (width, height), orientation = size, jpeg_orientation(data)
        else:
            pixels, orientation = decode_stored(data)
            height, width = pixels.shape[:2]
        box = random_crop_box(*upright_size(width, height, orientation), self.settings, draw)
        box = stored_box(box, width, height, orientation)
        if pixels is None:
            eighths = sufficient_scale(box, self.settings.size)
            pixels = decode_jpeg(data, eighths)
            pixels = decode_with_pillow(data).pixels if pixels is None else pixels
            if pixels.shape[:2] == (scaled_size(height, eighths), scaled_size(width, eighths)):
                box = scale_box(box, eighths)
        left, top, right, bottom = box
        return turn(pixels[top:bottom, left:right], orientation)

    def evaluate(self, data: bytes) -> np.ndarray:
        """What open_clip's preprocessing gives before its normalisation, to within one grey level."""
        pixels = decode_rgb(data)
        if self.settings.resize_mode == "squash":
            return self._resize_whole(pixels, self.settings.size, self.settings.size)
        return self._resize_and_crop_centre(pixels)

    def _resize_and_crop_centre(self, pixels: np.ndarray) -> np.ndarray:
        """Rounding follows torchvision's Resize and CenterCrop."""
        size, (height, width) = self.settings.size, pixels.shape[:2]
        short = min(width, height)
        new_width, new_height = int(size * width / short), int(size * height / short)
        left, top = round((new_width - size) / 2), round((new_height - size) / 2)
        if new_width * new_height <= MAX_PIXELS:
            resized = self._resize_whole(pixels, new_width, new_height)
            return resized[top : top + size, left : left + size]
        # A strip of a picture: only the kept part is computed. Pillow may then take its two passes in the other order,
        # which moves grey levels, so this is not the usual way.
        x, y = width / new_width, height / new_height
        box = left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)
        return np.asarray(Image.fromarray(pixels).resize((size, size), _FILTERS[self.settings.interpolation], box=box))

    def _resize_whole(self, pixels: np.ndarray, width: int, height: int) -> np.ndarray:
        if pixels.shape[:2] == (height, width):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[self.settings.interpolation]))


def sufficient_scale(box: Box, size: int) -> int:
    """The smallest cheap scale, in eighths, at which the box still has `size` pixels both ways; else the whole."""
    left, top, right, bottom = box
    short = min(right - left, bottom - top)
    return next((eighths for eighths in CHEAP_SCALES if short * eighths >= size * WHOLE), WHOLE)


def scale_box(box: Box, eighths: int) -> Box:
    """The box in a picture at that scale, its edges rounded to the nearest pixel.

    Halves go up, never to the even one: edges n or more pixels apart then stay n apart, so the box is not too small.
    """
    left, top, right, bottom = ((edge * eighths + WHOLE // 2) // WHOLE for edge in box)
    return left, top, right, bottom


def random_crop_box(width: int, height: int, settings: ImageSettings, draw: Draw) -> Box:
    """The crop of Inception training: area uniform in `crop_scale`, aspect log-uniform in `crop_ratio`, place uniform.

    Where no drawn shape fits, it is the largest centred crop whose aspect lies in the range.
    """
    low, high = settings.crop_scale
    log_low, log_high = (math.log(ratio) for ratio in settings.crop_ratio)
    for attempt in range(CROP_ATTEMPTS):
        area, aspect = draw.pair(Purpose.CROP, 2 * attempt)
        area = (low + area * (high - low)) * width * height
        ratio = math.exp(log_low + aspect * (log_high - log_low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = draw.pair(Purpose.CROP, 2 * attempt + 1)
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    narrowest, widest = settings.crop_ratio
    w, h = min(width, max(1, round(height * widest))), min(height, max(1, round(width / narrowest)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
