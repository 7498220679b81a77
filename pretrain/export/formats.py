"""The layouts of an export by name: a new one is an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.export import how, open_clip_format, timm_format, transformers_format
from pretrain.export.clients import (
    Client,
    open_clip_client,
    timm_classifier,
    transformers_classifier,
    transformers_client,
)
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier


@dataclass(frozen=True)
class Format:
    """A layout of the exported folder.

    `obstacle`: why a model has no such form, or None. `write`: puts the files of a model without obstacle into a
    folder. `load`: opens the folder as users do. `how`: the lines of the model card that say so.
    """

    obstacle: Callable[[Any], str | None]
    write: Callable[[Any, Path], None]
    load: Callable[[Path], Client]
    how: str


DUAL_ENCODER = {
    "open_clip": Format(lambda model: None, open_clip_format.write, open_clip_client, how.OPEN_CLIP),
    "transformers": Format(
        transformers_format.obstacle, transformers_format.write, transformers_client, how.TRANSFORMERS
    ),
}
CLASSIFIER = {  # one folder that both clients read
    "timm": Format(timm_format.obstacle, timm_format.write, timm_classifier, how.TIMM_CLASSIFIER),
    "transformers": Format(
        timm_format.obstacle, timm_format.write, transformers_classifier, how.TRANSFORMERS_CLASSIFIER
    ),
}


def formats_of(model: DualEncoder | Classifier) -> dict[str, Format]:
    """The layouts that there are for a model of its kind."""
    return CLASSIFIER if isinstance(model, Classifier) else DUAL_ENCODER
