"""The public clients of an export, as their users call them: each loads the folder and computes by its own means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from PIL import Image

Images = Sequence[Image.Image]


def _no_texts(texts: Sequence[str]) -> NoReturn:
    raise TypeError("a classifier takes no texts")


@dataclass(frozen=True)
class Client:
    """A loaded export.

    `prepare`: a picture -> what the client's own transform makes of it, normalised, fp32 [3, size, size].
    `images`: pictures -> unit-norm features [n, d], or the scores [n, classes] of a classifier.
    `texts`: texts -> unit-norm features [n, d], and `logit_scale`: its logarithm, of a dual encoder.
    `classes`: of a classifier.
    """

    prepare: Callable[[Image.Image], torch.Tensor]
    images: Callable[[Images], torch.Tensor]
    texts: Callable[[Sequence[str]], torch.Tensor] = _no_texts
    logit_scale: float = math.nan
    classes: tuple[str, ...] = ()


def open_clip_client(folder: Path) -> Client:
    """open_clip on a dual encoder."""
    import open_clip

    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip.eval()
    return Client(
        preprocess,
        lambda images: clip.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True),
        lambda texts: clip.encode_text(tokenizer(list(texts)), normalize=True),
        float(clip.logit_scale),
    )


def transformers_client(folder: Path) -> Client:
    """transformers on a dual encoder."""
    from transformers import CLIPModel, CLIPProcessor

    clip = _loaded(CLIPModel, folder)
    processor = CLIPProcessor.from_pretrained(folder)

    def pixels(images: Images) -> torch.Tensor:
        return processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]

    def encode(images: Images, texts: Sequence[str]):
        words = processor.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        return clip(pixel_values=pixels(images), **words)

    blank = [Image.new("RGB", (8, 8))]  # the two towers answer together
    return Client(
        lambda image: pixels([image])[0],
        lambda images: F.normalize(encode(images, [""]).image_embeds, dim=-1),
        lambda texts: F.normalize(encode(blank, texts).text_embeds, dim=-1),
        float(clip.logit_scale),
    )


def timm_classifier(folder: Path) -> Client:
    """timm on a classifier."""
    import timm

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()  # it has more than nn.Module declares
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    names = model.pretrained_cfg.get("label_names") or ()

    def prepare(image: Image.Image) -> torch.Tensor:
        return transform(image.convert("RGB"))  # timm leaves that to its callers

    def scores(images: Images) -> torch.Tensor:
        return model(torch.stack([prepare(image) for image in images]))

    return Client(prepare, scores, classes=tuple(names))


def transformers_classifier(folder: Path) -> Client:
    """transformers on a classifier."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.image_utils import load_image

    model = _loaded(AutoModelForImageClassification, folder, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    def pixels(images: Images) -> torch.Tensor:
        return processor([load_image(image) for image in images], return_tensors="pt")["pixel_values"]  # as pipelines

    names = tuple(model.config.id2label[number] for number in range(model.config.num_labels))
    return Client(lambda image: pixels([image])[0], lambda images: model(pixels(images)).logits, classes=names)


def _loaded(kind: Any, folder: Path, **options: bool) -> Any:
    """The model, in evaluation mode. Raises ValueError where the weights are not all that it has, and no others."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    odd = [f"{kind} {sorted(report[kind])}" for kind in ("missing_keys", "unexpected_keys") if report[kind]]
    if odd:
        raise ValueError("; ".join(odd))
    return model.eval()
