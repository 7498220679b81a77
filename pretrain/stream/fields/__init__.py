"""What of a sample a model can see beside its image and its text: the settings of each field, and where it stands. No
torch.

A field is a file, and an entry in FIELDS. It is there where an objective needs it, under the name that this one gives
it; images, texts and labels are there by the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pretrain.config.declare import Section
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


FIELDS: dict[str, Entry] = {}
