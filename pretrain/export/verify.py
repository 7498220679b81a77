"""Reload an export through the public clients and compare what they compute with the trainer's model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.errors import UserError
from pretrain.assemble import image_settings
from pretrain.export.clients import Client
from pretrain.export.formats import formats_of
from pretrain.stream.transform import ImageTransform
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier
from pretrain.towers.quiet import quiet
from pretrain.towers.spec import ModelSpec

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


@torch.no_grad()
def verify_export(model: DualEncoder | Classifier, folder: Path, formats: Sequence[str]) -> dict[str, float]:
    """Largest difference of what each client computes from `model`, each client with its own preprocessing and
    tokenizer.

    A larger picture that is not square shows that they resize and crop as evaluation does, to within `RESIZED`.

    Returns:
        `{"open_clip image": difference, "open_clip text": ..., "transformers image": ..., ...}`; of a classifier
        `{"timm scores": ...}`, in units of its scale.

    Raises:
        UserError: a difference above these, or a client that cannot load the folder.
    """
    model.eval()
    mine, differences = _own(model), {}
    for name in formats:
        try:
            with quiet():
                client = formats_of(model)[name].load(Path(folder))
                theirs = _computed(client, model)
                resized = client.prepare(_large(model.spec.image_size))
        except Exception as error:  # whatever a client raises, the export is not usable there
            raise UserError(f"{name} cannot load the export", got=f"{type(error).__name__}: {error}") from error
        if client.classes != (model.classes if isinstance(model, Classifier) else ()):
            raise UserError(f"{name} finds other classes", got=client.classes[:5], expected=model.classes[:5])
        for part, value in mine.items():
            differences[f"{name} {part}"] = float((value - theirs[part]).abs().max())
        _compare_resized(model.spec, name, resized)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        found = ", ".join(f"{name} {value:.2g}" for name, value in wrong.items())
        raise UserError("the export computes other features than the model", got=found, expected=f"<= {TOLERANCE:g}")
    return differences


def _own(model: DualEncoder | Classifier) -> dict[str, torch.Tensor]:
    """What the trainer's model computes of the probes, by part."""
    images = _images(model.spec.image_size)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    if isinstance(model, Classifier):
        return {"scores": model(pixels) / model.scale}
    texts = model.encode_text(model.tokenize(list(PROBES)))
    return {"image": model.encode_image(pixels), "text": texts, "logit_scale": model.export_state()["logit_scale"]}


def _computed(client: Client, model: DualEncoder | Classifier) -> dict[str, torch.Tensor]:
    images = client.images(_images(model.spec.image_size))
    if isinstance(model, Classifier):
        return {"scores": images / model.scale}
    return {"image": images, "text": client.texts(PROBES), "logit_scale": torch.tensor(client.logit_scale)}


def _images(size: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in noise]


def _large(size: int) -> Image.Image:
    """Resized, it is twice as wide as the crop: of an odd margin transformers leaves the odd pixel on another side."""
    noise = np.random.default_rng(1).integers(0, 256, (2 * size, 4 * size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _compare_resized(spec: ModelSpec, client: str, theirs: torch.Tensor) -> None:
    """`theirs`: the large picture as the client makes it ready, `[3, size, size]`, normalised."""
    file = io.BytesIO()
    _large(spec.image_size).save(file, "PNG")
    ours = torch.tensor(ImageTransform(image_settings(spec)).evaluate(file.getvalue())).permute(2, 0, 1)
    difference = float((grey_levels(spec, theirs) - ours).abs().mean())
    if not difference <= RESIZED:
        found = f"{difference:.1f} grey levels off, the mean"
        raise UserError(f"{client} resizes pictures in another way", got=found, expected=f"<= {RESIZED}")


def grey_levels(spec: ModelSpec, pixels: torch.Tensor) -> torch.Tensor:
    """0 to 255 of normalised `pixels` [3, size, size]."""
    mean, std = (torch.tensor(spec.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return 255 * (pixels * std + mean)
