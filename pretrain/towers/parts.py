"""Which tower a parameter belongs to, and how deep it lies there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from data_tools.errors import UserError

if TYPE_CHECKING:  # it is built by way of this module
    from pretrain.towers.build import DualEncoder

_BLOCK = re.compile(r"^(.*?\.(?:resblocks|blocks?|layers?))\.(\d+)\.(.*)$")
_NUMBERED = re.compile(r"(?:^|\.)\d+\.")
_STEM = re.compile(r"embed|\.conv1\.|\.ln_pre\.|\.norm_pre\.|_token$")

_HEADS = "heads."
_TOWERS = {"image", "text"}


def tower_of(name: str) -> str:
    """image, text, logits (scale and bias), the name of a head, or head where a module around a `DualEncoder` has one,
    by a parameter's name."""
    if name.startswith(_HEADS):
        return name.split(".")[1]
    _, inside, native = name.partition("clip.")
    if not inside:
        return "head"
    return "image" if native.startswith("visual.") else "logits" if native.startswith("logit_") else "text"


def towers_of(model: nn.Module) -> DualEncoder:
    """The dual encoder of `model`: itself, or that which a classifier has around it."""
    towers: Any = getattr(model, "towers", model)
    return towers


def in_block(name: str) -> bool:
    """Whether a parameter belongs to one of the equal blocks of a tower."""
    return _BLOCK.match(name) is not None


def layers_above(names: list[str]) -> dict[str, int]:
    """For each of a model's parameters the layers between it and the output: 0 for what follows a tower's last block,
    1 for that block, and most for embeddings. What belongs to no tower is at 0.

    Raises:
        UserError: a tower whose blocks are not one numbered row.
    """
    above = dict.fromkeys(names, 0)
    for tower in sorted(_TOWERS & set(map(tower_of, names))):
        inside = [name for name in names if tower_of(name) == tower]
        found = {name: match for name in inside if (match := _BLOCK.match(name))}
        rows = {match[1] for match in found.values()}
        if len(rows) != 1 or any(_NUMBERED.search(match[3]) for match in found.values()):
            raise UserError(
                f"optim.layer_decay cannot number the layers of the {tower} tower",
                got=", ".join(sorted(rows)) or f"no blocks beside {inside[0]}",
                expected="a transformer, whose blocks are one row",
                remedy="optim.layer_decay=1.0",
            )
        blocks = {name: int(match[2]) for name, match in found.items()}
        count = 1 + max(blocks.values(), default=0)
        above |= {name: count - number for name, number in blocks.items()}
        above |= {name: count + 1 for name in inside if name not in blocks and _STEM.search(name)}
    return above
