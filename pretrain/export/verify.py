"""Reload an export through the public clients and compare what they compute with the trainer's model."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_tools.errors import UserError
from pretrain.assemble import image_settings
from pretrain.stream.transform import ImageTransform
from pretrain.towers.build import DualEncoder

RESIZED = 0.5  # grey levels, the mean: where two libraries resize alike; another filter or crop is far above
TOLERANCE = 1e-5  # largest difference of a component of the unit-norm features, and of the logit scale
PROBES = (
    "a photo of a dog.",
    "Two red circles above a large blue square",
    "don't stop: it's 1,234.5 km away!",
    "naïve café, straße, Ωmega",
    "",
    "word " * 200,  # longer than any context
)
"""Captions on which open_clip's and transformers' tokenizers agree; HTML entities (&amp;) are the known exception."""

# Features of images [4, d] and texts [6, d], logit scale, the large picture made ready [3, size, size].
Prepared = tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]


@torch.no_grad()
def verify_export(model: DualEncoder, folder: Path, formats: Sequence[str]) -> dict[str, float]:
    """Largest feature difference of each client against `model`, each client with its own preprocessing and tokenizer.

    A larger picture that is not square shows that they resize and crop as evaluation does, to within `RESIZED`.

    Returns:
        `{"open_clip image": difference, "open_clip text": ..., "transformers image": ..., ...}`.

    Raises:
        UserError: a difference above these, or a client that cannot load the folder.
    """
    model.eval()
    images = _images(model.spec.image_size)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    tokens = model.tokenize(list(PROBES))
    mine = model.encode_image(pixels), model.encode_text(tokens), float(model.export_state()["logit_scale"])
    clients = {"open_clip": _open_clip, "transformers": _transformers}
    differences = {}
    for name in formats:
        try:
            with _quiet():
                *theirs, resized = clients[name](Path(folder), images, _large(model.spec.image_size))
        except Exception as error:  # whatever a client raises, the export is not usable there
            raise UserError(f"{name} cannot load the export", got=f"{type(error).__name__}: {error}") from error
        for part, one, other in zip(("image", "text", "logit_scale"), mine, theirs, strict=True):
            difference = torch.as_tensor(one) - torch.as_tensor(other)
            differences[f"{name} {part}"] = float(difference.abs().max())
        _compare_resized(model, name, resized)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        found = ", ".join(f"{name} {value:.2g}" for name, value in wrong.items())
        raise UserError("the export computes other features than the model", got=found, expected=f"<= {TOLERANCE:g}")
    return differences


def _images(size: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in noise]


def _large(size: int) -> Image.Image:
    """Resized, it is twice as wide as the crop: of an odd margin transformers leaves the odd pixel on another side."""
    noise = np.random.default_rng(1).integers(0, 256, (2 * size, 4 * size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _compare_resized(model: DualEncoder, client: str, theirs: torch.Tensor) -> None:
    """`theirs`: the large picture as the client makes it ready, `[3, size, size]`, normalised."""
    file = io.BytesIO()
    _large(model.spec.image_size).save(file, "PNG")
    ours = torch.tensor(ImageTransform(image_settings(model.spec)).evaluate(file.getvalue())).permute(2, 0, 1)
    levels = theirs * model.pixel_std[0] + model.pixel_mean[0]
    difference = float((levels - ours).abs().mean())
    if not difference <= RESIZED:
        found = f"{difference:.1f} grey levels off, the mean"
        raise UserError(f"{client} resizes pictures in another way", got=found, expected=f"<= {RESIZED}")


def _open_clip(folder: Path, images: list[Image.Image], large: Image.Image) -> Prepared:
    import open_clip

    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip.eval()
    image = clip.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    text = clip.encode_text(tokenizer(list(PROBES)), normalize=True)
    return image, text, float(clip.logit_scale), preprocess(large)


def _transformers(folder: Path, images: list[Image.Image], large: Image.Image) -> Prepared:
    from transformers import CLIPModel, CLIPProcessor

    clip, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    odd = [f"{kind} {sorted(report[kind])}" for kind in ("missing_keys", "unexpected_keys") if report[kind]]
    if odd:
        raise ValueError("; ".join(odd))
    clip.eval()
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=list(PROBES), images=images, return_tensors="pt", padding=True, truncation=True)
    output = clip(**inputs)
    image, text = (F.normalize(embeds, dim=-1) for embeds in (output.image_embeds, output.text_embeds))
    resized = processor.image_processor(images=large, return_tensors="pt")["pixel_values"][0]
    return image, text, float(clip.logit_scale), resized


@contextmanager
def _quiet():
    """The clients log each step of a normal load, and transformers draws a bar."""
    from transformers.utils import logging as transformers_logging

    before, bar = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bar:
            transformers_logging.enable_progress_bar()
