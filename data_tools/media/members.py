"""What a stored sample means: which member is the image, which texts are its captions, what is its label."""

from dataclasses import dataclass, replace
from typing import Any

from data_tools.corpus import Corpus, Sample
from data_tools.errors import UsageError
from data_tools.media import DEFAULT_CAPTIONS
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import as_texts, captions_of_text, has_caption_lines, parse_json, usable
from data_tools.media.image import IMAGE_EXTENSIONS

LINES = "lines"


@dataclass(frozen=True)
class Fields:
    """The key mapping of a source.

    Args:
        image: extensions of the image member, the first that a sample has is taken.
        captions: places of the captions: `EXTENSION` for the member's whole text, `json:FIELD` (dots go deeper) for a
            text or a list of texts, `lines` for the lines of the txt. The first place with a text is taken.
    """

    image: tuple[str, ...] = IMAGE_EXTENSIONS
    captions: tuple[str, ...] = tuple(DEFAULT_CAPTIONS.split(";"))

    def __post_init__(self) -> None:
        if not self.image or not self.captions or not all((*self.image, *self.captions)):
            raise UsageError("an empty name in a key mapping", got=f"{self.image}, {self.captions}")

    def lacks_image(self, sample: Sample) -> str | None:
        """What a sample without an image member lacks, with the names looked for; None: it has one."""
        there = any(extension in sample.members for extension in self.image)
        return None if there else f"image ({', '.join(self.image)})"

    def lacks_caption(self, sample: Sample) -> str | None:
        """Likewise for captions. Only whether something is there is asked, not what it holds."""
        there = any(holds(sample, place) for place in self.captions)
        return None if there else f"caption ({', '.join(self.captions)})"

    def image_bytes(self, sample: Sample) -> bytes:
        """Raises BadSampleError `no_image`."""
        for extension in self.image:
            if extension in sample.members:
                return sample.members[extension]
        raise BadSampleError("no_image", f"members are {', '.join(sample.members)}")

    def all_captions(self, sample: Sample) -> list[str]:
        """Every caption at the first place that has any.

        Raises BadSampleError `no_caption`, or `bad_json`, `bad_text` or `huge_text`.
        """
        captions = next(filter(None, (captions_at(sample, place) for place in self.captions)), [])
        if not captions:
            raise BadSampleError("no_caption", f"no text at {', '.join(self.captions)}; {describe(sample)}")
        return captions


DEFAULT_FIELDS = Fields()


def parse_fields(image: str | None, captions: str | None) -> Fields:
    """The mapping as settings and command lines write it: names with `;` between, None for the usual ones."""
    names = IMAGE_EXTENSIONS if image is None else tuple(image.lower().split(";"))
    return Fields(names, tuple((captions or DEFAULT_CAPTIONS).split(";")))


def fitting(fields: Fields, corpus: Corpus) -> Fields:
    """The mapping as the layout of a corpus has it: of CLIP_benchmark's, the lines of a txt are captions."""
    if "txt" in fields.captions and has_caption_lines(corpus.urls[0]):
        return replace(fields, captions=tuple(LINES if place == "txt" else place for place in fields.captions))
    return fields


def found_at(sample: Sample, place: str) -> Any:
    """What stands at a place of a sample, an extension or `json:FIELD` (dots go deeper): the bytes of a whole member,
    or the value of a json's field; None where nothing does. Raises BadSampleError `bad_json`."""
    extension, colon, path = place.partition(":")
    data = sample.members.get("txt" if place == LINES else extension)
    if data is None or not colon:
        return data
    content = parse_json(data)
    if not isinstance(content, dict):
        raise BadSampleError("bad_json", f"the {extension} is no object")
    for name in path.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def holds(sample: Sample, place: str) -> bool:
    """Whether anything stands at a place, readable or not."""
    try:
        return found_at(sample, place) is not None
    except BadSampleError:
        return True


def captions_at(sample: Sample, place: str) -> list[str]:
    """The captions at one place of a sample, none where nothing stands there. Raises BadSampleError as `all_captions`
    does for what it cannot read."""
    found = found_at(sample, place)
    if isinstance(found, bytes):
        return captions_of_text(found, lines=place == LINES)
    return usable(as_texts(found))


def lacks_label(sample: Sample) -> str | None:
    """What a sample without a label lacks; None: it has one."""
    return None if "cls" in sample.members else "label (cls)"


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
        content = parse_json(sample.members["json"]) if "json" in sample.members else None
    except BadSampleError:
        return text
    return text + (f"; fields of its json {', '.join(content)}" if isinstance(content, dict) else "")
