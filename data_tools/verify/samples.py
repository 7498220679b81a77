"""The checks of one sample: everything that training, on captions or on labels, would call bad in it."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_tools.corpus.reader import Sample
from data_tools.errors import shown
from data_tools.media.bad import BadSampleError
from data_tools.media.check import check
from data_tools.media.image import is_image_name
from data_tools.media.members import Fields, captions_at, label

NO_IMAGE, NO_CAPTION, NO_LABEL = "no_image", "no_caption", "no_label"
_SHOWN = 5


class Fault(NamedTuple):
    """What is bad about a sample: one word for it, and the reason."""

    kind: str
    reason: str


def faults(sample: Sample, fields: Fields, num_classes: int, decode: bool) -> Iterator[Fault]:
    """What is bad about a sample. `no_caption` and `no_label` say that it lacks the one or the other, which only the
    shard as a whole can judge; `num_classes` is 0 where nobody knows them; `decode` looks into its images too."""
    yield from _raised(fields.image_bytes, sample)
    yield from _raised(fields.all_captions, sample)
    yield from _raised(label, sample, num_classes)
    for place in fields.captions[1:]:  # also those behind the first with a text: other readers take them
        yield from _raised(captions_at, sample, place)
    names = [name for name in sample.members if is_image_name(name) or name in fields.image]
    for name in names if decode else ():
        yield from _raised(_pixels, sample, name)


def _raised(judge: Callable, *arguments: object) -> Iterator[Fault]:
    try:
        judge(*arguments)
    except BadSampleError as error:
        yield Fault(error.kind, error.reason)


def _pixels(sample: Sample, name: str) -> None:
    try:
        check(sample.members[name])
    except BadSampleError as error:
        raise BadSampleError(error.kind, f"{name} does not decode: {error.reason}") from None


class Findings:
    """What is bad about the samples of one shard: counted by kind, the first few of each named.

    A sample has an image, and a caption or a label. What some samples of a shard have all must have, but for captions
    beside labels where class names tell of a corpus to classify (`classes`): there they are optional. A shard of
    captions in which nothing looks like an image is one of texts alone.
    """

    def __init__(self, classes: bool):
        self._captions_optional = classes
        self._samples = self._pictured = 0
        self._lacking: Counter[str] = Counter()
        self._counts: Counter[tuple[str, bool]] = Counter()
        self._named: dict[tuple[str, bool], list[str]] = {}

    def add(self, sample: Sample, found: list[Fault]) -> None:
        """Count the faults of a sample."""
        self._samples += 1
        self._pictured += any(map(is_image_name, sample.members))
        lacking = {fault.kind for fault in found} & {NO_CAPTION, NO_LABEL}
        self._lacking.update(lacking)
        if NO_CAPTION in lacking:  # said once
            found = [fault for fault in found if fault.kind != NO_LABEL]
        for kind, reason in dict(found).items():
            group = kind, lacking == {kind}  # whether it is all that the sample lacks
            self._counts[group] += 1
            named = self._named.setdefault(group, [])
            if len(named) < _SHOWN:
                named.append(f"sample {shown(sample.key)}: {kind}: {shown(reason)}")

    def problems(self) -> Iterator[str]:
        """A line for each sample named, and how many more there are of its kind."""
        for (kind, alone), named in self._named.items():
            if (alone and not self._counts_as_bad(kind)) or (kind == NO_IMAGE and self._texts_alone()):
                continue
            yield from named
            more = self._counts[kind, alone] - len(named)
            if more:
                yield f"and {more} more samples: {kind}"

    def _counts_as_bad(self, kind: str) -> bool:
        """Of samples that have a caption or a label, and lack the other one: `kind`."""
        optional = self._captions_optional and kind == NO_CAPTION
        return not optional and self._lacking[kind] < self._samples

    def _texts_alone(self) -> bool:
        return not self._pictured and not self._lacking[NO_CAPTION]
