"""Texts and pictures of awkward kinds: where the clients of an export compute what the trainer does, and where not."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from data_tools.errors import UserError
from pretrain.export.clients import Client
from pretrain.stream.fields.image import image_settings
from pretrain.stream.transform import ImageTransform
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier
from pretrain.towers.spec import ModelSpec

TOLERANCE = 1e-5  # largest difference of a component of the unit-norm features, of the logit scale, of scores / scale
RESIZED = 0.5  # grey levels, the mean: where two libraries resize alike; another filter or crop is far above
DIFFERS = "the export computes other features than the model"
_EQUAL = 0.01  # grey levels: what the rounding of a normalisation leaves

PLAIN = "plain captions"
ENTITIES, QUOTES, LIGATURES = "HTML entities", "typographic quotes", "ligatures"
WIDTHS, DECODED_TWICE, INVISIBLE = "full- and half-width forms", "text decoded twice", "invisible characters"
SPECIAL = "names of special tokens"
TEXTS = {
    PLAIN: (
        "a photo of a dog.",
        "Two red circles above a large blue square",
        "don't stop: it's 1,234.5 km away!",
        "na\u00efve caf\u00e9, stra\u00dfe, \u03a9mega",
        "",
        "word " * 200,  # longer than any context
    ),
    "decomposed accents": ("cafe\u0301 nai\u0308ve", "u\u0308ber"),
    "other scripts and signs": (
        "\u4e00\u53ea\u72d7",
        "\u043a\u043e\u0442",
        "\U0001f600 100 % \u2013 \u00bd\u2026",
        "<b>A_b</b>\tc",
    ),
    ENTITIES: ("fish &amp; chips", "caf&eacute; &lt;3 &#39;", "a &amp;amp; b"),
    QUOTES: ("\u201cquoted\u201d", "it\u2019s a dog", "\u201elow\u201c"),
    LIGATURES: ("\ufb01ne \ufb02ower", "o\ufb03ce"),
    WIDTHS: ("\uff21\uff22\uff23 \uff11\uff12\uff01", "\uff76\uff80\uff76\uff85"),
    DECODED_TWICE: ("sch\u00c3\u00b6n", "it\u00e2\u20ac\u2122s"),
    INVISIBLE: ("zero\ufeffwidth", "bell\x07", "\x1b[31mred"),
    SPECIAL: ("a <end_of_text> b", "a <|endoftext|> b"),
}
_CLEANED = (ENTITIES, QUOTES, LIGATURES, WIDTHS, DECODED_TWICE, INVISIBLE)  # by what training does to every text
_TEXTS_DIFFER = {"transformers": (*_CLEANED, SPECIAL)}

GREY_16, TURNED = "16-bit grey", "EXIF orientation"
_PICTURES_DIFFER = (GREY_16, TURNED, "alpha", "grey with alpha", "palette", "palette with transparency", "1 bit")


@dataclass(frozen=True)
class Divergence:
    """A kind of input on which a client computes something else: the lowest cosine of its features with the
    trainer's."""

    client: str
    kind: str
    cosine: float


def text_divergences(model: DualEncoder, name: str, client: Client) -> list[Divergence]:
    """The kinds of texts on which the client is known to differ, and does.

    Raises:
        UserError: it differs on another kind, or still does once the texts are cleaned as training cleans them.
    """
    from open_clip.tokenizer import basic_clean

    found, known = [], _TEXTS_DIFFER.get(name, ())
    for kind, texts in TEXTS.items():
        mine = model.encode_text(model.tokenize(list(texts)))
        theirs = client.texts(texts)
        if _difference(mine, theirs) > TOLERANCE:
            _expect(kind in known, name, kind, _difference(mine, theirs))
            found.append(Divergence(name, kind, float((mine * theirs).sum(dim=1).min())))
        if kind in _CLEANED and kind in known:
            cleaned = _difference(mine, client.texts([basic_clean(text) for text in texts]))
            _expect(cleaned <= TOLERANCE, name, f"{kind}, cleaned", cleaned)
    return found


def picture_divergences(model: DualEncoder | Classifier, name: str, client: Client) -> list[Divergence]:
    """The kinds of pictures on which the client is known to differ when they are given as Pillow opens them, and does.

    Raises:
        UserError: it differs on another kind, or on any when given as `ready` makes them.
    """
    spec, transform = model.spec, ImageTransform(image_settings(model.spec))
    towers = model.towers if isinstance(model, Classifier) else model
    found: dict[str, Divergence] = {}
    for kind, data, limit in _pictures(spec.image_size):
        mine = torch.tensor(transform.evaluate(data)).permute(2, 0, 1)
        theirs = client.prepare(ready(_opened(data)))
        _expect(off(spec, theirs, mine) <= limit, name, f"pictures: {kind}", off(spec, theirs, mine), "grey levels")
        raw = client.prepare(_opened(data))
        if off(spec, raw, mine) <= limit:
            continue
        _expect(kind in _PICTURES_DIFFER, name, f"pictures: {kind}", off(spec, raw, mine), "grey levels")
        features = towers.encode_image(mine[None]), towers.encode_image(raw[None])
        cosine = float((features[0] * features[1]).sum())
        if kind not in found or cosine < found[kind].cosine:
            found[kind] = Divergence(name, kind, cosine)
    return list(found.values())


def ready(image: Image.Image) -> Image.Image:
    """The picture as training sees it before it is resized: upright, 16 bits scaled to 8, without alpha. The model card
    tells users to do the same."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(((np.asarray(image).astype(int) + 128) // 257).astype(np.uint8))
    return image.convert("RGBA").convert("RGB")


def off(spec: ModelSpec, theirs: torch.Tensor, mine: torch.Tensor) -> float:
    """Mean difference in grey levels of a client's normalised picture from uint8 `mine`, both `[3, size, size]`."""
    mean, std = (torch.tensor(spec.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return float((255 * (theirs * std + mean) - mine).abs().mean())


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).abs().max())


def _expect(holds: bool, client: str, kind: str, difference: float, unit: str = "") -> None:
    if not holds:
        raise UserError(
            DIFFERS,
            got=f"{client}, {kind}: {difference:.2g} {unit}",
            expected=f"<= {RESIZED if unit else TOLERANCE:g}",
        )


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _pictures(size: int) -> Iterator[tuple[str, bytes, float]]:
    """(kind, file, how far off in grey levels a client may be) of pictures as large as the model's, and larger."""
    generator = np.random.default_rng(0)
    for side, limit in ((size, _EQUAL), (5 * size // 2, RESIZED)):
        noise = generator.integers(0, 256, (side, side, 4), dtype=np.uint8)
        rgba, turned = Image.fromarray(noise), Image.Exif()
        rgb, turned[ExifTags.Base.Orientation] = rgba.convert("RGB"), 6
        kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
            "colour": (rgb, "PNG", {}),
            "grey": (rgb.convert("L"), "PNG", {}),
            "CMYK": (rgb.convert("CMYK"), "TIFF", {}),
            "1 bit": (rgb.convert("1"), "PNG", {}),
            "palette": (rgb.quantize(64), "PNG", {}),
            "palette with transparency": (rgb.quantize(64), "PNG", {"transparency": 3}),
            "alpha": (rgba, "PNG", {}),
            "grey with alpha": (rgba.convert("LA"), "PNG", {}),
            TURNED: (rgb, "PNG", {"exif": turned}),
            GREY_16: (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG", {}),
        }
        for kind, (image, form, options) in kinds.items():
            file = io.BytesIO()
            image.save(file, form, **options)
            yield kind, file.getvalue(), limit
