"""Reload an export through the public clients and compare what they compute with the trainer's model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.errors import UserError
from pretrain.export.clients import Client
from pretrain.export.formats import formats_of
from pretrain.export.probes import (
    DIFFERS,
    PLAIN,
    RESIZED,
    TEXTS,
    TOLERANCE,
    Divergence,
    off,
    picture_divergences,
    text_divergences,
)
from pretrain.stream.fields.image import image_settings
from pretrain.stream.transform import ImageTransform
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier
from pretrain.towers.quiet import quiet
from pretrain.towers.spec import ModelSpec


@dataclass(frozen=True)
class Verification:
    """What a look at an export through its clients found.

    `differences`: the largest of what each client computes from the trainer's model, as `"open_clip image"`,
    `"open_clip text"`, `"open_clip logit_scale"`, or of a classifier `"timm scores"`, in units of its scale.
    `divergences`: kinds of input on which a client is known to compute something else, and does.
    """

    differences: dict[str, float] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)


@torch.no_grad()
def verify_export(model: DualEncoder | Classifier, folder: Path, formats: Sequence[str]) -> Verification:
    """Load `folder` through each client, and compare what it computes by its own preprocessing and tokenizer with
    `model`.

    A larger picture that is not square shows that they resize and crop as evaluation does.

    Raises:
        UserError: a difference, but on the kinds of input on which a client is known to differ; or a client that cannot
            load the folder.
    """
    model.eval()
    found, mine = Verification(), _own(model)
    for name in formats:
        try:
            with quiet():
                client = formats_of(model)[name].load(Path(folder))
                theirs = _computed(client, model)
                resized = client.prepare(_large(model.spec.image_size))
        except Exception as error:  # whatever a client raises, the export is not usable there
            raise UserError(f"{name} cannot load the export", got=f"{type(error).__name__}: {error}") from error
        classes = model.classes if isinstance(model, Classifier) else ()
        if client.classes != classes:
            raise UserError(f"{name} finds other classes", got=client.classes[:5], expected=classes[:5])
        differences = {f"{name} {part}": float((value - theirs[part]).abs().max()) for part, value in mine.items()}
        _compare_resized(model.spec, name, resized)
        wrong = ", ".join(f"{part} {value:.2g}" for part, value in differences.items() if not value <= TOLERANCE)
        if wrong:
            raise UserError(DIFFERS, got=wrong, expected=f"<= {TOLERANCE:g}")
        found.differences.update(differences)
        with quiet():
            found.divergences.extend(picture_divergences(model, name, client))
            if isinstance(model, DualEncoder):
                found.divergences.extend(text_divergences(model, name, client))
    return found


def _own(model: DualEncoder | Classifier) -> dict[str, torch.Tensor]:
    """What the trainer's model computes of the probes, by part."""
    images = _images(model.spec.image_size)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    if isinstance(model, Classifier):
        return {"scores": model.scores(pixels) / model.scale}
    texts = model.encode_text(model.tokenize(list(TEXTS[PLAIN])))
    return {"image": model.encode_image(pixels), "text": texts, "logit_scale": model.export_state()["logit_scale"]}


def _computed(client: Client, model: DualEncoder | Classifier) -> dict[str, torch.Tensor]:
    images = client.images(_images(model.spec.image_size))
    if isinstance(model, Classifier):
        return {"scores": images / model.scale}
    return {"image": images, "text": client.texts(TEXTS[PLAIN]), "logit_scale": torch.tensor(client.logit_scale)}


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
    difference = off(spec, theirs, ours)
    if not difference <= RESIZED:
        found = f"{difference:.1f} grey levels off, the mean"
        raise UserError(f"{client} resizes pictures in another way", got=found, expected=f"<= {RESIZED}")
