"""What stands on the towers: the settings of each head, and where it stands. No torch.

A head is a file, and an entry in HEADS. It is there where an objective needs it, under the name that this one gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.declare import Section, choice, number
from pretrain.config.registry import Entry


@dataclass(frozen=True)
class HeadConfig(Section):
    """A head that an objective reads, under the name that the objective has for it: `heads: {fusion: {layers: 2}}`. One
    that is not set here has the defaults."""

    type: str = "???"  # which head; may be left out where the name says it


@dataclass(frozen=True)
class FusionConfig(HeadConfig):
    """Text tokens that attend to image tokens (ALBEF, arXiv 2107.07651): does this text belong to this image?"""

    type: str = choice("fusion")
    layers: int = number(6, ge=1, le=256)  # each attends to the text, then to the image
    width: int | None = number(None, ge=1, le=65536)  # null: the text tower's
    heads: int | None = number(None, ge=1, le=4096)  # of attention, which share the width evenly; null: 64 numbers each


@dataclass(frozen=True)
class WordsConfig(HeadConfig):
    """Scores of all words where the field `masked_text` hides one."""

    type: str = choice("words")
    tied: bool = True  # by the text tower's embedding; false: by a matrix of its own


@dataclass(frozen=True)
class ProjectionConfig(HeadConfig):
    """A linear map of a field's features to the size of another's; where these have one size, nothing at all."""

    type: str = choice("projection")
    of: str = "image"  # whose features
    to: str = "teacher_image"  # whose size


HEADS: dict[str, Entry] = {
    "fusion": Entry(FusionConfig, "pretrain.towers.heads.fusion:Fusion"),
    "words": Entry(WordsConfig, "pretrain.towers.heads.words:Words"),
    "projection": Entry(ProjectionConfig, "pretrain.towers.heads.projection:Projection"),
}
