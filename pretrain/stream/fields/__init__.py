"""What of a sample a model can see beside its image and its text: the settings of each field, and where it stands. No
torch.

A field is a file, and an entry in FIELDS. It is there where an objective needs it, under the name that this one gives
it; images, texts and labels are there by the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pretrain.config.declare import Fault, Section, choice, number
from pretrain.config.registry import Entry


@dataclass(frozen=True)
class FieldConfig(Section):
    """A field that an objective reads, under the name that the objective has for it: `fields: {masked_text: {share:
    0.2}}`. One that is not set here has the defaults."""

    type: str = "???"  # which field; may be left out where the name says it

    ENCODER: ClassVar[str | None] = None  # what its rows go through: image, text, `stored` (nothing), or None: no rows

    @property
    def width(self) -> int | None:
        """Numbers of a row that is stored."""
        return None


@dataclass(frozen=True)
class MaskedTextConfig(FieldConfig):
    """The text that is shown, with some of its words (tokens of the tokenizer) hidden, by a hash of seed, epoch, sample
    id and place."""

    type: str = choice("masked_text")
    share: float = number(0.15, gt=0, le=1)  # of the words that are hidden
    mask: float = number(0.8, ge=0, le=1)  # share of the hidden ones that become the mask token
    random: float = number(0.1, ge=0, le=1)  # share of them that become any word; the rest stays and is asked for too
    # The id that stands for a hidden word; null: the tokenizer's own, or one that no text holds (of open_clip's that of
    # the byte 255).
    mask_token: int | None = number(None, ge=0, lt=2**31)

    ENCODER: ClassVar[str | None] = "text"

    def check(self) -> Iterator[Fault]:
        """The shares of the hidden words are no more than all."""
        if self.mask + self.random > 1:
            yield Fault("random", "at most 1 - mask", "what is left of 1 stays as it is")


@dataclass(frozen=True)
class EmbeddingConfig(FieldConfig):
    """A vector that lies with a sample, such as a teacher's feature. With several captions it may be one for each."""

    type: str = choice("embedding")
    # Where it stands: an extension of a .npy (float16 or float32), or `json:FIELD` (dots go deeper), a list of numbers;
    # null: NAME.npy.
    member: str | None = None
    # Numbers of a vector, which must be set; one of another size is a bad sample.
    size: int | None = number(None, ge=1, le=65536)
    normalise: bool = True  # give vectors unit norm

    ENCODER: ClassVar[str | None] = "stored"

    @property
    def width(self) -> int | None:
        """That of a vector."""
        return self.size

    def check(self) -> Iterator[Fault]:
        """The size is known before any sample is read."""
        if self.size is None:
            yield Fault("size", "how many numbers a stored vector has")


FIELDS: dict[str, Entry] = {
    "masked_text": Entry(MaskedTextConfig, "pretrain.stream.fields.masked_text:MaskedText"),
    "embedding": Entry(EmbeddingConfig, "pretrain.stream.fields.embedding:Embedding"),
}
