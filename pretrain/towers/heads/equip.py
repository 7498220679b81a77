"""What a model has beside its towers: heads, and further fields that its encoders read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

import torch

from data_tools.errors import UserError, shown
from pretrain.config.check import settings_of
from pretrain.towers.buffers import make_tables_non_persistent
from pretrain.towers.heads import HEADS, HeadConfig
from pretrain.towers.model import STORED, Model

_KEY = "equipment"
_ENCODERS = ("image", "text", STORED)


@dataclass(frozen=True)
class Equipment:
    """By name: `encoder_of` further fields, `sizes` of those that are stored, and settings of the `heads`."""

    encoder_of: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[str, HeadConfig] = field(default_factory=dict)

    def give(self, model: Model, seed: int) -> None:
        """Equip `model`. The weights of each head follow from `seed` and its name alone. Raises UserError where its
        encoders have not what a head needs, or a head keeps what a checkpoint would lack."""
        model.encoder_of |= self.encoder_of
        model.sizes |= self.sizes
        for name, settings in self.heads.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed << 32 ^ crc32(name.encode())) % 2**63)
                head = HEADS[settings.type].load()(settings, model)
            make_tables_non_persistent(head, f"head {name}", "register its buffers with persistent=False")
            model.heads[name] = head

    def described(self) -> dict[str, Any]:
        """What model.json says of it, for `equipment_in`; nothing where there is none."""
        if not (self.encoder_of or self.heads):
            return {}
        heads = {name: asdict(settings) for name, settings in self.heads.items()}
        return {_KEY: {"encoder_of": dict(self.encoder_of), "sizes": dict(self.sizes), "heads": heads}}


def equipment_in(description: Mapping[str, Any], where: str) -> Equipment:
    """That of model.json `description`; `where`: the file, for messages.

    Raises:
        UserError: what is none.
    """
    found = description.get(_KEY)
    if found is None:
        return Equipment()
    try:
        encoder_of, sizes, heads = found["encoder_of"], found["sizes"], found["heads"]
        fit = all(encoder in _ENCODERS for encoder in encoder_of.values())
        if not fit or any(type(size) is not int or not 0 < size < 2**20 for size in sizes.values()):
            raise TypeError(shown(f"encoders {encoder_of}, sizes {sizes}"))
        settings = {name: settings_of(HEADS, one, f"heads.{name}.") for name, one in heads.items()}
    except (UserError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where} describes heads that are none", got=error, expected=", ".join(HEADS)) from None
    return Equipment(encoder_of, sizes, settings)
