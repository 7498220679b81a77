"""What a stored sample means: which member is the image, which texts are its captions, what is its label."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.errors import UsageError
from data_tools.shards import Sample
from pretrain.stream.bad import BadSampleError
from pretrain.stream.sample_rng import Purpose, random_bits

Target = Literal["caption", "label"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
CAPTIONS = "json:captions;txt"
MAX_TEXT = 1 << 16  # bytes; a longer text is no caption and would hold up the tokenizer
CHOICES = ("random", "first")


@dataclass(frozen=True)
class Fields:
    """The key mapping of a source.

    Args:
        image: extensions of the image member, the first that a sample has is taken.
        captions: places of the captions: `EXTENSION` for the member's whole text, `json:FIELD` (dots go deeper) for a
            text or a list of texts. The first place with a text is taken.
        choose: which of several captions a training step sees: `random`, by a hash of (seed, epoch, sample id), or
            `first`.
    """

    image: tuple[str, ...] = IMAGE_EXTENSIONS
    captions: tuple[str, ...] = tuple(CAPTIONS.split(";"))
    choose: str = "random"

    def __post_init__(self) -> None:
        if not self.image or not self.captions or not all((*self.image, *self.captions)):
            raise UsageError("an empty name in a key mapping", got=f"{self.image}, {self.captions}")
        if self.choose not in CHOICES:
            raise UsageError("unknown rule to choose a caption", got=self.choose, expected=" or ".join(CHOICES))

    def missing(self, sample: Sample, target: Target | None) -> str | None:
        """What the sample lacks of the kind that this mapping expects, with the names looked for; None: nothing. Only
        whether it is there is asked, not what it holds."""
        if not any(extension in sample.members for extension in self.image):
            return f"image ({', '.join(self.image)})"
        if target == "label" and "cls" not in sample.members:
            return "label (cls)"
        if target == "caption" and not any(_present(sample, place) for place in self.captions):
            return f"caption ({', '.join(self.captions)})"
        return None

    def image_bytes(self, sample: Sample) -> bytes:
        """Raises BadSampleError `no_image`."""
        for extension in self.image:
            if extension in sample.members:
                return sample.members[extension]
        raise BadSampleError("no_image", f"members are {', '.join(sample.members)}")

    def training_caption(self, sample: Sample, seed: int, epoch: int) -> str:
        """The caption of this epoch. Raises BadSampleError `no_caption`, or `bad_json`, `bad_text` or `huge_text`."""
        captions = next(filter(None, (_texts(sample, place) for place in self.captions)), [])
        if not captions:
            raise BadSampleError("no_caption", f"no text at {', '.join(self.captions)}; {describe(sample)}")
        if self.choose == "first":
            return captions[0]
        return captions[random_bits(seed, epoch, sample.id, Purpose.CAPTION) % len(captions)]


PLAIN = Fields()


def all_captions(sample: Sample) -> list[str]:
    """Every caption, for evaluation: `captions` of the json, else the lines of the txt. May be empty."""
    if captions := _texts(sample, "json:captions"):
        return captions
    return _nonempty([line for text in _texts(sample, "txt") for line in text.splitlines()])


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


def describe(sample: Sample) -> str:
    """The members of a sample and the fields of its json, for a message."""
    text = f"members {', '.join(sample.members)}"
    try:
        content = sample_json(sample, "json") if "json" in sample.members else None
    except BadSampleError:
        return text
    return text + (f"; fields of its json {', '.join(content)}" if isinstance(content, dict) else "")


def _present(sample: Sample, place: str) -> bool:
    try:
        return _find(sample, place) is not None
    except BadSampleError:
        return True


def _texts(sample: Sample, place: str) -> list[str]:
    """The texts at one place of a sample, stripped, without the empty ones."""
    found = _find(sample, place)
    texts = [found] if isinstance(found, str) else found or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSampleError("bad_json", f"`{place}` is no text and no list of texts")
    return _nonempty(texts)


def _find(sample: Sample, place: str) -> Any:
    """What stands at a place; None where nothing does."""
    extension, colon, path = place.partition(":")
    if extension not in sample.members:
        return None
    if not colon:
        return _decode(sample.members[extension])
    content = sample_json(sample, extension)
    if not isinstance(content, dict):
        raise BadSampleError("bad_json", f"the {extension} is no object")
    for name in path.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def sample_json(sample: Sample, extension: str) -> Any:
    """What the member says. Raises BadSampleError `bad_json`."""
    try:
        return json.loads(sample.members[extension])
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise BadSampleError("bad_json", str(error)) from error


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError("bad_text", str(error)) from error


def _nonempty(texts: list[str]) -> list[str]:
    stripped = [found for text in texts if (found := text.strip())]
    longest = max(map(len, stripped), default=0)
    if longest > MAX_TEXT:
        raise BadSampleError("huge_text", f"a text of {longest} characters, at most {MAX_TEXT} are read")
    return stripped
