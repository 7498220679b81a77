"""What a stored sample means: which member is the image, which texts are its captions, what is its label."""

import json
from typing import Literal

from data_tools.shards import Sample
from pretrain.stream.bad import BadSampleError
from pretrain.stream.sample_rng import Purpose, random_bits

Target = Literal["caption", "label"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_TARGET_EXTENSIONS: dict[Target, tuple[str, ...]] = {"caption": ("json", "txt"), "label": ("cls",)}


def missing_member(sample: Sample, target: Target | None) -> str | None:
    """The kind of member that the sample lacks, with the extensions looked for; None when it has all."""
    wanted = {"image": IMAGE_EXTENSIONS} | ({target: _TARGET_EXTENSIONS[target]} if target else {})
    for what, extensions in wanted.items():
        if not any(extension in sample.members for extension in extensions):
            return f"{what} ({', '.join(extensions)})"
    return None


def image_bytes(sample: Sample) -> bytes:
    """Raises BadSampleError `no_image`."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSampleError("no_image", f"members are {', '.join(sample.members)}")


def training_caption(sample: Sample, seed: int, epoch: int) -> str:
    """One caption, chosen by a hash of (seed, epoch, sample id) from `captions` of the json; else the whole txt.

    Raises BadSampleError `no_caption`, or `bad_json` or `bad_text` where they cannot be parsed.
    """
    captions = _json_captions(sample) or _nonempty([_text(sample)])
    if not captions:
        raise BadSampleError("no_caption", f"no text in members {', '.join(sample.members)}")
    return captions[random_bits(seed, epoch, sample.id, Purpose.CAPTION) % len(captions)]


def all_captions(sample: Sample) -> list[str]:
    """Every caption, for evaluation: `captions` of the json, else the lines of the txt. May be empty."""
    return _json_captions(sample) or _nonempty(_text(sample).splitlines())


def label(sample: Sample, num_classes: int = 0) -> int:
    """The class number in the cls member; checked against `num_classes` unless that is 0. Raises BadSampleError
    `no_label` or `bad_label`."""
    if "cls" not in sample.members:
        raise BadSampleError("no_label", f"members are {', '.join(sample.members)}")
    try:
        number = int(sample.members["cls"])
    except ValueError as error:
        raise BadSampleError("bad_label", str(error)) from error
    if number < 0 or (num_classes and number >= num_classes):
        raise BadSampleError("bad_label", f"class {number} of {num_classes}")
    return number


def _json_captions(sample: Sample) -> list[str]:
    if "json" not in sample.members:
        return []
    try:
        captions = json.loads(sample.members["json"]).get("captions", [])
    except (ValueError, AttributeError) as error:  # not JSON, or no object
        raise BadSampleError("bad_json", str(error)) from error
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSampleError("bad_json", "`captions` is no list of texts")
    return _nonempty(captions)


def _text(sample: Sample) -> str:
    try:
        return sample.members.get("txt", b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError("bad_text", str(error)) from error


def _nonempty(texts: list[str]) -> list[str]:
    return [stripped for text in texts if (stripped := text.strip())]
