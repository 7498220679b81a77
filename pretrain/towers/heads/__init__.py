"""What stands on the towers: the settings of each head, and where it stands. No torch.

A head is a file, and an entry in HEADS. It is there where an objective needs it, under the name that this one gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.declare import Section
from pretrain.config.registry import Entry


@dataclass(frozen=True)
class HeadConfig(Section):
    """A head that an objective reads, under the name that the objective has for it: `heads: {fusion: {layers: 2}}`. One
    that is not set here has the defaults."""

    type: str = "???"  # which head; may be left out where the name says it


HEADS: dict[str, Entry] = {}
