"""Random changes of a training sample beyond its crop: hashes of (seed, epoch, sample id), as the crop is.

The picture's follow torchvision's RandomHorizontalFlip and ColorJitter, with the three factors in a fixed order; the
caption's is the random deletion of EDA (arXiv 1901.11196).
"""

import numpy as np
from PIL import Image, ImageEnhance

from pretrain.stream.draw import Draw, Purpose

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def mirror(pixels: np.ndarray, share: float, draw: Draw) -> np.ndarray:
    """`pixels` uint8 [h, w, 3], or in a `share` of all draws their mirror image."""
    if share and draw.numbers(Purpose.MIRROR, 1)[0] < share:
        return pixels[:, ::-1]
    return pixels


def jitter_colors(pixels: np.ndarray, strength: float, draw: Draw) -> np.ndarray:
    """Brightness, contrast and saturation of uint8 `pixels` [h, w, 3] times a factor each, uniform in 1 +- `strength`.
    Pillow computes one pixel at a time, so the width of vector instructions does not enter the bits."""
    if not strength:
        return pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    numbers = draw.numbers(Purpose.COLORS, len(_ENHANCERS))
    for enhancer, number in zip(_ENHANCERS, numbers, strict=True):
        picture = enhancer(picture).enhance(1 + strength * (2 * number - 1))
    return np.asarray(picture)


def drop_words(caption: str, share: float, draw: Draw) -> str:
    """`caption` without each of its words (what white space parts) with probability `share`; the first word stays where
    none would."""
    if not share:
        return caption
    words = caption.split()
    numbers = draw.numbers(Purpose.WORDS, len(words))
    return " ".join([word for word, number in zip(words, numbers, strict=True) if number >= share] or words[:1])
